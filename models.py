"""U-Net, the one inference path, and the checkpoint that users load.

    [depth, base]: `depth` levels of widths base * 2^i; per level two (3x3 conv, batch norm, ReLU); 2x2 max-pool down,
    2x2 transposed conv up, skip connections, 1x1 conv to the classes (Ronneberger et al., MICCAI 2015).
    Student U-Net[4, 16]: 0.48 M parameters. Teacher U-Net[6, 64]: 124 M (Zhao et al., ICIP 2022, arXiv 2207.01900).

    net = UNet(4, 16)
    net, checkpoint = load_model("best.pt")
    labels = segment_volume(net, volume, **checkpoint["inference"])      # (Z, Y, X) in, (Z, Y, X) uint8 out
"""
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FORMAT = "act-net 1"


class CheckpointError(Exception):
    """A file that is not a usable checkpoint: one line that names it and the remedy."""


# ---------------------------------------------------------------------------------------------------------- network

def double_conv(c_in, c_out):
    layers = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(N, in_channels, H, W) float -> logits (N, num_classes, H, W). Any H, W: padded to a multiple of 2^(depth-1) with
    the border's values, and the logits cropped back."""

    def __init__(self, depth=4, base=16, in_channels=1, num_classes=4):
        super().__init__()
        if depth < 1 or base < 1:
            raise ValueError(f"UNet[{depth}, {base}]: depth and base must be at least 1")
        self.architecture = dict(depth=depth, base=base, in_channels=in_channels, num_classes=num_classes)
        widths = [base * 2**i for i in range(depth)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([in_channels] + widths, widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(double_conv(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(base, num_classes, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        step = 2 ** (len(self.down) - 1)
        if h % step or w % step:
            x = F.pad(x, (0, -w % step, 0, -h % step), mode="replicate")
        skips = []
        for i, conv in enumerate(self.down):
            x = conv(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)[..., :h, :w]


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


def count_macs(net, size):
    """Multiply-accumulates of one slice of size x size, convolutions only, counted on shapes without computing."""
    from torch.utils.flop_counter import FlopCounterMode
    shadow = UNet(**net.architecture).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, net.architecture["in_channels"], size, size, device="meta"))
    return counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------------------------- inference

def standardize(x):
    """(N, 1, H, W) -> the same with mean 0 and deviation 1 per slice; a constant slice becomes 0."""
    deviation, mean = torch.std_mean(x, dim=(-2, -1), keepdim=True, correction=0)
    return (x - mean) / deviation.clamp_min(1e-6)


@torch.no_grad()
def segment_volume(net, volume, size, view="heart", batch=16, return_probs=False):
    """Segment a stack of 2D slices on its native grid.

    volume: (Z, Y, X) numpy array or tensor, any real dtype, any range; scaled by its own minimum and maximum.
    size, view: "heart" reads the central window of at most size x size at native resolution, outside is background;
        "whole" squeezes the slice to size x size, and the logits are resized back before the argmax.
    Returns labels (Z, Y, X) uint8 numpy, and with return_probs also probabilities (Z, C, Y, X) float32 numpy.
    Raises ValueError unless the volume is 3D and finite. The network's mode is restored.
    """
    device = next(net.parameters()).device
    volume = torch.as_tensor(np.asarray(volume), dtype=torch.float32)
    if volume.ndim != 3 or volume.numel() == 0:
        raise ValueError(f"segment_volume wants (Z, Y, X), got {tuple(volume.shape)}")
    low, high = volume.min(), volume.max()
    if not torch.isfinite(high - low):
        raise ValueError("segment_volume: the volume holds NaN or infinity")
    slices = ((volume - low) / (high - low).clamp_min(1e-12))[:, None]                     # (Z, 1, Y, X)
    training = net.training
    net.eval()
    h, w = slices.shape[-2:]
    rows, columns = (h, w) if view == "whole" else (min(size, h), min(size, w))
    top, left = (h - rows) // 2, (w - columns) // 2
    probs = torch.empty(len(slices), net.architecture["num_classes"], h, w)
    for i in range(0, len(slices), batch):
        window = slices[i:i + batch, :, top:top + rows, left:left + columns].to(device)
        if view == "whole":
            window = F.interpolate(window, (size, size), mode="bilinear", antialias=True)
        logits = net(standardize(window).contiguous(memory_format=torch.channels_last)).float()
        if view == "whole":
            logits = F.interpolate(logits, (h, w), mode="bilinear")
        part = F.pad(logits.softmax(1), (left, w - columns - left, top, h - rows - top))
        part[:, 0] += 1 - part.sum(1)                                         # outside the window: background
        probs[i:i + batch] = part.cpu()
    net.train(training)
    labels = probs.max(1).indices.to(torch.uint8).numpy()                # ten times as fast as argmax on a CPU
    return (labels, probs.numpy()) if return_probs else labels


# ------------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path, content, previous=None):
    """Write tensors, numbers, strings and dicts to `path`, whole or not at all; what was there goes to `previous`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """Read what save_checkpoint wrote; nothing in the file is executed. Raises CheckpointError."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train one with train_actnet.py") from None
    except Exception as error:                           # torch.load raises a dozen kinds for damaged or foreign files
        kind = type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of tensors ({kind}); train it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{path}: format {found!r} where {FORMAT!r} is expected; not written by this version")
    return content


def load_model(path, device="cpu", which=None):
    """best.pt -> (network in eval mode, the checkpoint's dict). `which`: "student" or "coteacher", by default the one
    that was better on val. Raises CheckpointError."""
    checkpoint = load_checkpoint(path, device)
    try:
        which = which or checkpoint["better"]
        net = UNet(**checkpoint["architecture"])
        net.load_state_dict(checkpoint["networks"][which])
        size, view = checkpoint["inference"]["size"], checkpoint["inference"]["view"]
        if view not in ("heart", "whole") or not isinstance(size, int) or size < 1:
            raise ValueError(f"inference at size {size}, view {view}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: holds no network to run ({reason}); give a best.pt of a run") from None
    return net.to(device, memory_format=torch.channels_last).eval(), checkpoint

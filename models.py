"""U-Net, the one inference path, and the checkpoint that users load.

    [depth, base]: `depth` levels of widths base * 2^i; per level two (3x3 conv, batch norm, ReLU); 2x2 max-pool down,
    2x2 transposed conv up, skip connections, 1x1 conv to the classes (Ronneberger et al., MICCAI 2015).
    Student U-Net[4, 16]: 0.48 M parameters. Teacher U-Net[6, 64]: 124 M (Zhao et al., ICIP 2022, arXiv 2207.01900).

    net = UNet(4, 16)
    net, checkpoint = load_model("best.pt")
    labels = segment_volume(net, volume, **checkpoint["inference"])      # (Z, Y, X) in, (Z, Y, X) uint8 out
    focus = find_heart(net, volume, spacing, **checkpoint["inference"])  # another scanner, a heart off the centre
    labels = segment_volume(net, volume, **checkpoint["inference"], **focus)
"""
import math
import os
import platform
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FORMAT = "act-net 1"
FAR = (25, 5)                              # above so many times the 99th and the 99.9th percentile a maximum is no
                                           # tissue's: 12 and 3 at most in 160 frames of ACDC
PIXEL = 1.4                                # mm, to which find_heart resamples; ACDC has 0.70 to 1.95, mostly 1.2 to 1.8


class CheckpointError(Exception):
    """A file that is not a usable checkpoint: one line that names it and the remedy."""


class DeviceError(Exception):
    """A device that this machine lacks: one line that says which exist."""


def one_line(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def pick_device(gpu=None, cpu=False, threads=None):
    """--gpu N and --cpu of a command line -> torch.device: without either the first CUDA device, if any; a CPU with
    as many threads as choose_threads says, a GPU whose fp32 is fp32. Raises DeviceError where there is no device N, or
    torch cannot compute on it."""
    count = torch.cuda.device_count()
    if gpu is not None and not 0 <= gpu < count:
        have = f"devices 0 to {count - 1}" if count else \
            f"no CUDA device for torch {torch.__version__}; give --cpu instead"
        raise DeviceError(f"--gpu {gpu}: this machine has {have}")
    if cpu or not count:
        choose_threads(threads)
        return torch.device("cpu")
    device = torch.device("cuda", gpu or 0)
    torch.backends.cudnn.allow_tf32 = False
    try:
        torch.ones(1, device=device).add_(1).item()                    # counted is not usable: an old driver or card
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"--gpu {device.index}: torch {torch.__version__} cannot use it "
                          f"({one_line(error)}); update its driver, install a torch built for this card, or "
                          "give --cpu") from None
    return device


def choose_threads(number=None):
    """torch's threads: `number` (a resumed run's: sums are taken in their order), or as many as the machine has idle
    cores now and a container may use. OMP_NUM_THREADS decides where it is set. Fewer than usual are told."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    usual = torch.get_num_threads()
    chosen = number or max(1, round(min(usual, idle_cores(), cpu_limit())))
    torch.set_num_threads(chosen)
    if chosen < usual and not number:
        print(f"threads: {chosen} of {usual}, other work or a limit has the rest; OMP_NUM_THREADS={usual} takes all",
              file=sys.stderr)


def idle_cores(seconds=0.1):
    """How many cores nobody used for so long; infinite where /proc does not tell."""
    def read():
        with open("/proc/stat") as f:
            return np.array(f.readline().split()[1:], float)               # user, nice, system, idle, waiting for disks
    try:
        before = read()
        time.sleep(seconds)
        spent = read() - before
    except (OSError, ValueError):
        return float("inf")
    if not spent.sum() > 0:                                                    # a sandbox tells zeros
        return float("inf")
    return os.cpu_count() * spent[3:5].sum() / spent.sum()


def cpu_limit():
    """Cores that a container may use; infinite where nothing limits them."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):                                              # "max 100000"
        return float("inf")


def describe_device(device):
    """A name for tables: of the GPU, or of the CPU's kind with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def bf16_pays(device):
    """Whether the device computes in bf16, rather than emulate it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def fast_precision(device):
    """What to train in: bf16 where it pays; else fp16 on a GPU (before compute capability 8), fp32 on a CPU."""
    if bf16_pays(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


# ---------------------------------------------------------------------------------------------------------- network

class BatchNorm(nn.BatchNorm2d):
    """Counts no batches, which a fixed momentum does not need: one launch less in each layer."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)


def double_conv(c_in, c_out):
    layers = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), BatchNorm(c_out), nn.ReLU(inplace=True)]
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
        padded = h % step or w % step or torch.compiler.is_exporting()       # exported, it must fit any size
        if padded:
            x = F.pad(x, (0, -w % step, 0, -h % step), mode="replicate")
        skips = []
        for i, conv in enumerate(self.down):
            x = conv(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        x = self.head(x)
        return x[..., :h, :w] if padded else x


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


def count_macs(net, size):
    """Multiply-accumulates of one slice of size x size, convolutions only, counted on shapes without computing."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        shadow, slices = UNet(**net.architecture).eval(), torch.empty(1, net.architecture["in_channels"], size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(slices)
    return counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------------------------- inference

def standardize(x):
    """(N, 1, H, W) -> the same with mean 0 and deviation 1 per slice; a constant slice becomes 0."""
    deviation, mean = torch.std_mean(x, dim=(-2, -1), keepdim=True, correction=0)
    return (x - mean) / deviation.clamp_min(1e-6)


def rescale(volume):
    """(Z, Y, X), any real dtype -> float32 tensor from 0 to 1 by its minimum and maximum. Far outliers, on either side,
    are cut off before. Raises ValueError unless the volume is 3D and finite."""
    if isinstance(volume, torch.Tensor):
        volume = (volume.float() if volume.dtype is torch.bfloat16 else volume).numpy(force=True)
    volume = np.asarray(volume)
    if volume.ndim != 3 or volume.size == 0:
        raise ValueError(f"segment_volume wants (Z, Y, X), got {volume.shape}")
    with np.errstate(over="ignore", invalid="ignore"):                       # beyond fp32: infinite, refused below
        if not np.can_cast(volume.dtype, np.float32):
            volume = np.subtract(volume, volume.min(), dtype=np.float64)     # in fp32 an offset would eat the digits
        volume = np.array(volume, np.float32)                                # a copy; any byte order
        low, high = volume.min(), volume.max()
        if not np.isfinite(high - low):
            raise ValueError("segment_volume: the volume holds NaN or infinity")
    thin = volume[:, ::2, ::2]                                               # percentiles in a quarter of the time
    ranks = [int(q * (thin.size - 1)) for q in (0.001, 0.01, 0.99, 0.999)]
    lowest, p1, p99, highest = np.partition(thin, ranks, axis=None)[ranks]
    usual = p99 - p1
    with np.errstate(over="ignore"):                                         # then nothing is too far
        if 0 < min(FAR[0] * usual, FAR[1] * (highest - p1)) < high - p1:
            high = p1 + 2 * usual
        if 0 < min(FAR[0] * usual, FAR[1] * (p99 - lowest)) < p99 - low:
            low = p1
    volume = torch.from_numpy(volume).clamp_(float(low), float(high))
    return (volume - low) / max(high - low, 1e-12)


@torch.no_grad()
def segment_volume(net, volume, size, view="heart", batch=16, return_probs=False, center=None, zoom=(1.0, 1.0)):
    """Segment a stack of 2D slices on its native grid.

    volume: (Z, Y, X) numpy array or tensor, any real dtype, any range; rescale() brings it to 0..1.
    size, view: "heart" reads a window of at most size x size, outside is background; "whole" squeezes the slice to
        size x size, and the logits are resized back before the argmax.
    center: of the window, (y, x) in pixels, moved so that the window lies inside; by default the slice's middle.
    zoom: network pixels per image pixel in (y, x): other than 1, the window spans size / zoom pixels and is resampled.
    Returns labels (Z, Y, X) uint8 numpy, and with return_probs also probabilities (Z, C, Y, X) float32 numpy.
    Raises ValueError unless the volume is 3D and finite. The network's mode is restored unless it raises.
    """
    device = next(net.parameters()).device
    slices = rescale(volume)[:, None]                                                      # (Z, 1, Y, X)
    full = slices.shape[-2:]
    if view == "whole":
        extent, grid = full, (size, size)
    else:
        extent = [min(max(1, round(size / f)), n) for f, n in zip(zoom, full, strict=True)]
        grid = [max(1, round(n * f)) for f, n in zip(zoom, extent, strict=True)]
    middle = [n / 2 for n in full] if center is None else center
    top, left = (min(max(0, int(c - e / 2)), n - e) for c, e, n in zip(middle, extent, full, strict=True))
    rows, columns = slice(top, top + extent[0]), slice(left, left + extent[1])
    resampled = tuple(grid) != tuple(extent)
    labels = torch.zeros(len(slices), *full, dtype=torch.uint8)
    probs = torch.zeros(len(slices), net.architecture["num_classes"], *full) if return_probs else None
    training = net.training
    net.eval()
    for i in range(0, len(slices), batch):
        some = slice(i, i + batch)
        window = slices[some, :, rows, columns].to(device)
        if resampled:
            window = F.interpolate(window, grid, mode="bilinear", antialias=True)
        logits = net(standardize(window).contiguous(memory_format=torch.channels_last)).float()
        if resampled:
            logits = F.interpolate(logits, extent, mode="bilinear")
        part = logits.softmax(1)
        labels[some, rows, columns] = part.max(1).indices.to(torch.uint8).cpu()               # faster than argmax
        if return_probs:
            probs[some, 0] = 1                                                # outside the window: background
            probs[some, :, rows, columns] = part.cpu()
    net.train(training)
    return (labels.numpy(), probs.numpy()) if return_probs else labels.numpy()


def largest_component(labels):
    """Labels (Z, Y, X) without what is not connected, by faces, to the largest part of its class. Needs scipy."""
    from scipy import ndimage
    kept = np.zeros_like(labels)
    for k in range(1, int(labels.max()) + 1):
        parts, n = ndimage.label(labels == k)
        if n:
            kept[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = k
    return kept


def to_pixel(spacing, shape):
    """(z, y, x) mm, (..., Y, X) -> zoom (y, x) to PIXEL; at most to 1024 pixels a side, which no scan reaches."""
    return tuple(min(float(s) / PIXEL, 1024 / n) for s, n in zip(spacing[1:], shape[-2:], strict=True))


def find_heart(net, volume, spacing, size, view="heart", batch=16):
    """Where segment_volume should look -> its arguments {"center": (y, x), "zoom": (y, x)}.

    The window spans size pixels of PIXEL mm around the largest thing that the network takes for a heart when it looks
    at whole slices; around the middle where it sees none. spacing: (z, y, x) in mm, or None: not resampled. view
    "whole" sees all: {}. Needs scipy.
    """
    if view == "whole":
        return {}
    zoom = (1.0, 1.0) if spacing is None else to_pixel(spacing, volume.shape)
    seen = segment_volume(net, volume, 2**30, view, batch, zoom=zoom) > 0
    found = np.nonzero(largest_component(seen.astype(np.uint8)))
    center = tuple(float(i.mean()) + 0.5 for i in found[1:]) if seen.any() else None
    return dict(center=center, zoom=zoom)


POSITIONS = ("as ACDC", "turned 90 clockwise", "turned 180", "turned 90 counter-clockwise", "mirrored left-right",
             "transposed", "mirrored up-down", "transposed and turned 180")
UNSURE = 20                                # pixels of entropy 1 that it adds to each class: a lost RV is not a sure one
CLOSE = 1.15                               # times the least doubt; the surest by all slices came closer (34 frames)


def turn(array, position, back=False):
    """(..., Y, X) that lies as POSITIONS says -> as ACDC's, contiguous; with `back`, the way back."""
    if back:
        array = np.rot90(array, -(position % 4), axes=(-2, -1))
    if position >= 4:
        array = array[..., ::-1]
    if not back:
        array = np.rot90(array, position % 4, axes=(-2, -1))
    return np.ascontiguousarray(array)


def turn_spacing(spacing, position):
    """(z, y, x) of an array -> of `turn` of it."""
    z, y, x = spacing
    return (z, y, x) if position % 2 == 0 else (z, x, y)


def find_position(net, slices, spacing, size, view="heart", batch=16, few=slice(None)):
    """(N, Y, X) slices of one scan, spacing (z, y, x) in mm -> the index in POSITIONS of how they lie: the one in which
    the network is surest.

    Asked about whole slices in each, it doubts the largest thing that it takes for a heart by the mean over RV, MYO
    and LV of (sum of the entropy of their pixels + UNSURE) / (their number + UNSURE). It is asked about slices[few]
    first, then about all in the positions that come CLOSE. The eight are the same for all eight versions of a scan, so
    all get one answer; of equal doubts, the least array in C order decides, not how the scan lies. view "whole": 0.
    Needs scipy.
    """
    def doubt(position, asked):
        turned = turn(asked, position)
        zoom = to_pixel(turn_spacing(spacing, position), turned.shape)
        labels, probs = segment_volume(net, turned, 2**30, view, batch, zoom=zoom, return_probs=True)
        heart = largest_component((labels > 0).astype(np.uint8)) > 0
        labels, probs = labels[heart], probs.transpose(0, 2, 3, 1)[heart]                 # (pixels,), (pixels, C)
        entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(1) / math.log(probs.shape[1])
        classes = [entropy[labels == k] for k in range(1, probs.shape[1])]
        return float(np.mean([(e.sum(dtype=float) + UNSURE) / (len(e) + UNSURE) for e in classes]))

    if view == "whole":
        return 0
    doubts = {position: doubt(position, slices[few]) for position in range(len(POSITIONS))}
    close = [position for position in doubts if doubts[position] <= CLOSE * min(doubts.values())]
    if len(close) > 1:
        doubts = {position: doubt(position, slices) for position in close}
    equal = [position for position in doubts if doubts[position] == min(doubts.values())]
    turned = [turn(slices, position) for position in equal]
    return min((array.shape, array.tobytes(), position) for array, position in zip(turned, equal, strict=True))[-1]


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
    except (OSError, RuntimeError) as error:              # RuntimeError: torch's word for a write that failed half-way
        reason = f"cannot be written ({one_line(error)})"
        raise OSError(f"{path}: {reason}; free some space, what was there is whole") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_checkpoint(path):
    """Read what save_checkpoint wrote; nothing in the file is executed. Raises CheckpointError, and OSError where it is
    not permitted to read it."""
    if not os.path.isfile(path):                                                 # a pipe would be waited for
        what = "not a file" if os.path.exists(path) else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}; train one with train_actnet.py")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                                # a foreign pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:                              # no damage: load_last must not set it aside
        raise OSError(f"{path}: cannot be read; give yourself the right to read it") from None
    except MemoryError:
        raise
    except Exception as error:                           # torch.load raises a dozen kinds for damaged or foreign files
        kind = type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of tensors ({kind}); train it again") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format {found!r} where {FORMAT!r} is expected; not written by this version")
    return content


def load_model(path, device="cpu", which=None):
    """best.pt -> (network in eval mode, the checkpoint's dict). `which`: "student" or "coteacher", by default the one
    that was better on val. Raises CheckpointError."""
    checkpoint = load_checkpoint(path)
    try:
        which = which or checkpoint["better"]
        net = UNet(**checkpoint["architecture"])
        if which not in checkpoint["networks"]:
            raise ValueError(f"{which} is not among {', '.join(checkpoint['networks'])}")
        net.load_state_dict(checkpoint["networks"][which])
        if not all(v.isfinite().all() for v in net.state_dict().values()):
            raise ValueError("its weights are not finite")
        size, view = checkpoint["inference"]["size"], checkpoint["inference"]["view"]
        if view not in ("heart", "whole") or not isinstance(size, int) or size < 1:
            raise ValueError(f"inference at size {size}, view {view}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: holds no network to run ({one_line(error)}); give a best.pt of a run") from None
    return net.to(device, memory_format=torch.channels_last).eval(), checkpoint


def load_last(run):
    """A run's last.pt, or the checkpoint before it where last.pt is absent or damaged (then set aside as
    last.pt.damaged). Raises CheckpointError where neither is the state of a run."""
    def load(name):
        content = load_checkpoint(run / name)
        kinds = dict(networks=dict, optimizer=dict, config=dict, best=dict, scores=dict, step=int, seconds=float)
        wrong = [k for k, kind in kinds.items() if type(content.get(k)) is not kind]
        if wrong or content["step"] < 0:
            raise CheckpointError(f"{run / name}: not the state of a run ({', '.join(wrong) or 'step'})")
        return content

    try:
        return load("last.pt")
    except CheckpointError as error:
        if not (run / "previous.pt").exists():
            raise
        content = load("previous.pt")
        with suppress(FileNotFoundError):               # or the next save would put it in place of the good previous.pt
            os.replace(run / "last.pt", run / "last.pt.damaged")
        print(f"{error}. Going on from previous.pt, step {content['step']}", file=sys.stderr)
        return content


def restore(checkpoint, nets, optimizer, run, scaler=None):
    """The state of a run's networks {name: network} and, unless None, of their optimiser and its loss scaler, from what
    load_last gave. Raises CheckpointError where it does not fit."""
    try:
        for name, net in nets.items():
            net.load_state_dict(checkpoint["networks"][name])
        if optimizer:
            optimizer.load_state_dict(checkpoint["optimizer"])
            tensors = sum(len(group["params"]) for group in optimizer.param_groups)
            if len(optimizer.state) != tensors:
                raise ValueError(f"the optimiser's state is of {len(optimizer.state)} of {tensors} tensors")
        if scaler and checkpoint.get("scaler"):                               # empty: saved where no fp16 was wanted
            scaler.load_state_dict(checkpoint["scaler"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"--resume {run}: the checkpoint's state does not fit its config ({one_line(error)})"
                              ) from None

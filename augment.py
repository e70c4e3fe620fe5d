"""Augmentation of a batch of slices on its device: geometry shared by image and labels, intensity, CutMix.

    x  (N, 1, H, W) float images      y  (N, 1, H, W) float label maps      S  side of the training window, pixels
    rng        numpy.random.Generator: all that is drawn per slice      noise  torch.Generator on the batch's device

    grid = heart_window(len(x), 128, x.shape[-1], rng, x.device)                      # (N, S, S, 2) for grid_sample
    x, y = warp(x, grid), warp(y, grid, "nearest")
    seen = perturb(x, rng, noise, strength=1.0)                                       # what one network sees of it

Each function waits for nothing and copies little to the device: a few numbers per slice. Runs alone: torch, numpy.
"""
import numpy as np
import torch
import torch.nn.functional as F


def standardize(x):
    """(N, 1, H, W) -> the same with mean 0 and deviation 1 per slice; a constant slice becomes 0."""
    deviation, mean = torch.std_mean(x, dim=(-2, -1), keepdim=True, correction=0)
    return (x - mean) / deviation.clamp_min(1e-6)


def put(array, device, dtype=np.float32):
    """numpy -> tensor on the device."""
    return torch.from_numpy(array.astype(dtype)).to(device, non_blocking=True)


def smooth(nodes, size, device):
    """(N, C, K, K) numpy -> (N, C, size, size) float on the device: a smooth field through these values."""
    return F.interpolate(put(nodes, device), (size, size), mode="bicubic", align_corners=True)


def rotation(angle):
    """(N,) radians -> (N, 2, 2) numpy."""
    return np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(len(angle), 2, 2)


def warp(x, grid, mode="bilinear", outside="border"):
    """(N, C, H, W) float read at `grid` (N, S, S, 2) -> (N, C, S, S). Labels: mode "nearest", outside "zeros"."""
    return F.grid_sample(x, grid, mode=mode, padding_mode=outside, align_corners=False)


# --------------------------------------------------------------------------------------------------------- geometry

def turns_and_flips(n, size, rng, device):
    """-> grid (N, S, S, 2): quarter turns and mirror images of the whole slice, the field's augmentation."""
    linear = rotation(rng.integers(4, size=n) * np.pi / 2)
    linear[:, :, 0] *= rng.choice((-1, 1), (n, 1))
    theta = put(np.concatenate([linear, np.zeros((n, 2, 1))], 2), device)                                # (N, 2, 3)
    return F.affine_grid(theta, (n, 1, size, size), align_corners=False)


def heart_window(n, size, side, rng, device):
    """-> grid (N, S, S, 2): where the pixels of a training window of size x size lie in a slice of side x side.

    Turned by up to 60 degrees, as hearts lie (20 or 180 were worse on val), moved by up to an eighth of the window,
    scaled by up to e^0.25; then other hearts: stretched along one random axis, sheared, bent by a pixel or two.
    """
    linear = rotation(np.radians(rng.uniform(-60, 60, n)))
    shift = rng.uniform(-1, 1, (n, 2, 1)) * size / 4 / side
    linear *= np.exp(rng.uniform(-0.25, 0.25, (n, 1, 1))) * size / side
    stretch, shear, zero = np.exp(rng.uniform(-0.15, 0.15, n)), rng.uniform(-0.2, 0.2, n), np.zeros(n)
    axis = rotation(rng.uniform(0, np.pi, n))
    other = axis @ np.stack([stretch, shear, zero, 1 / stretch], 1).reshape(n, 2, 2) @ axis.transpose(0, 2, 1)
    bend = rng.uniform(0, 1, (n, 1, 1, 1)) * rng.normal(0, 6 / side, (n, 2, 6, 6)) * (size / 128)
    theta = put(np.concatenate([linear @ other, shift], 2), device)                                      # (N, 2, 3)
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)
    return grid + smooth(bend, size, device).permute(0, 2, 3, 1)


# -------------------------------------------------------------------------------------------------------- intensity

def perturb(x, rng, noise, strength):
    """(N, 1, S, S) in 0..1 -> the same, each slice with a gamma, a coil's uneven field, mean 0 and deviation 1, blur
    or sharpening, contrast, brightness and noise of its own. strength: number or (N,) numpy; 0 only standardises."""
    n, size, device = len(x), x.shape[-1], x.device
    strength = np.broadcast_to(strength, n)
    gamma, contrast, brightness, grain, blur = strength * rng.uniform(-1, 1, (5, n))
    numbers = np.stack([np.exp(0.5 * gamma), np.exp(0.3 * contrast), 0.3 * brightness, 0.2 * np.abs(grain), blur])
    gamma, contrast, brightness, grain, blur = put(numbers.reshape(5, n, 1, 1, 1), device).unbind()
    uneven = smooth(strength[:, None, None, None] * rng.normal(0, 0.3, (n, 1, 4, 4)), size, device).exp()
    x = x.clamp_min(1e-4) ** gamma
    x = standardize((x - x.amin((2, 3), keepdim=True)) * uneven)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, blur)                                                                  # below 0: sharper
    x = torch.addcmul(brightness, x, contrast)
    return torch.addcmul(x, grain, torch.randn(x.shape, device=device, generator=noise))


def perturb_each(views, rng, noise):
    """[(images (N, 1, S, S), strength)] -> [perturb of each], drawn and computed as one batch."""
    sizes = [len(x) for x, _ in views]
    strength = np.repeat([strength for _, strength in views], sizes)
    return perturb(torch.cat([x for x, _ in views]), rng, noise, strength).split(sizes)


# ----------------------------------------------------------------------------------------------------------- cutmix

def boxes(n, size, probability, rng, device):
    """CutMix -> mask (N, 1, S, S), true inside a box of a quarter to half of the side, in some of the slices."""
    side = size * rng.uniform(0.25, 0.5, (n, 2)) * (rng.random((n, 1)) < probability)
    low = rng.uniform(0, size - side)
    ticks = np.arange(size)
    inside = (ticks >= low[..., None]) & (ticks < (low + side)[..., None])                              # (N, 2, S)
    rows, columns = inside[:, None, 0, :, None], inside[:, None, 1, None, :]
    return put(rows, device, bool) & put(columns, device, bool)


def mix(x, mask):
    """(N, ...), mask (M, 1, S, S) of its last M rows: inside a row's box the row before it; the first N - M stay."""
    kept = len(x) - len(mask)
    last = x[kept:] if kept else x
    mixed = torch.where(mask, last.roll(1, 0), last)
    return torch.cat([x[:kept], mixed]) if kept else mixed

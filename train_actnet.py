"""Train the ACT-Net student from a few labelled patients: teacher, co-teacher and student in one run.

    L_seg = L_dice + L_ce                              labelled slices
    L_kd  = distance(softmax(s / tau), softmax(t / tau))   teacher -> student, all slices          (Hete-KD)
    L_co  = distance(softmax(s), softmax(c))               co-teacher -> student, other perturbation (Homo-KD);
            or L_seg on hard labels of the co-teacher, and of a frozen teacher, where these are sure (default)
    L_stu = L_seg + lambda_kd * L_kd + lambda_co * L_co
    theta_c <- ema * theta_c + (1 - ema) * theta_s     after every step, batch-norm statistics too

Zhao, Zhu, Zeng, Veeravalli, Guan: "ACT-Net: Asymmetric Co-Teacher Network for Semi-supervised Memory-efficient Medical
Image Segmentation", ICIP 2022, arXiv 2207.01900. Where this script departs from it: README, "Deviations".

    python train_actnet.py --demo                              # synthetic hearts, minutes on a laptop
    python train_actnet.py --labeled 7 --gpu 0                 # ACDC prepared by data_prep.py in data/ACDC
    python train_actnet.py --labeled 7 --cpu --preset cpu      # the same on two cores
    python train_actnet.py --resume runs/act-7-seed0
    torchrun --nproc_per_node=4 train_actnet.py --labeled 7    # the same batch, split over four GPUs
    python train_actnet.py --gpu 0 --bench                     # time per step and its shares -> results/step.csv
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data_prep
import evaluate
import models
import phantom
from data_prep import DataError as UserError
from kernels.dice_ce import dice_ce
from kernels.student_loss import student_loss
from models import UNet, count_parameters, load_checkpoint, pick_device, save_checkpoint, segment_volume


def flag(key):
    return "--" + key.replace("_", "-")


def option(default, text, choices=None, group=None, low=0, high=10**9):
    return field(default=default, metadata=dict(help=text, choices=choices, group=group, low=low, high=high))


@dataclass
class Config:
    data: str = option("data/ACDC", "prepared folder", group="run")
    out: str = option("", "run folder [runs/METHOD-LABELED-seedSEED]")
    table: str = option("", "CSV to which the finished run appends its val scores")
    labeled: int = option(7, "annotated patients, first of the train order; the rest without labels", low=1)
    gpu: int = option(-1, "CUDA device [the first, if any]", low=-1)
    cpu: bool = option(False, "train on the CPU")
    seed: int = option(0, "of weights, batches and augmentation", high=2**63 - 1)
    iters: int = option(30000, "steps", low=1)
    minutes: float = option(0.0, "stop and save after so long; 0: never")
    val_every: int = option(500, "steps between validations and checkpoints", low=1)
    log_every: int = option(20, "steps between rows of log.csv", low=1)
    precision: str = option("auto", "auto: bf16 where the device computes in it", ("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile the networks; did not pay on a CPU")
    deterministic: bool = option(False, "only kernels that repeat bit for bit, slower on a GPU")
    batch: int = option(24, "slices per step", group="data", low=1, high=2**16)
    labeled_batch: int = option(12, "of these with labels", low=1)
    cache: str = option("auto", "where slices wait; auto: the first that fits", ("auto", "device", "ram", "disk"))
    size: int = option(160, "side of the training window, pixels", low=8, high=2048)
    view: str = option("heart", "heart: centre, native resolution; whole: slice squeezed", ("heart", "whole"))
    intensity: float = option(1.0, "strength of gamma, uneven field, blur, contrast, brightness and noise", high=10)
    cutmix: float = option(0.5, "probability that an unlabelled slice gets a box of another", high=1)
    method: str = option("act", "labelled only; + co-teacher; + teacher; all", ("sup", "mt", "kd", "act"), "networks")
    network: str = option("student", "which is trained; teacher: sup, mt", ("student", "teacher"))
    teacher: tuple = option((6, 64), "depth and base width", low=1, high=4096)
    student: tuple = option((4, 16), "depth and base width", low=1, high=4096)
    teacher_ckpt: str = option("", "best.pt of a teacher: frozen instead of trained along")
    init: str = option("", "best.pt that the student starts from")
    ema: float = option(0.99, "decay of the co-teacher", high=1)
    optimizer: str = option("adamw", "weight decay 0.05; or momentum 0.9, weight decay 1e-4", ("adamw", "sgd"))
    lr: float = option(3e-3, "first learning rate; falls as (1 - step / iters) ** 0.9", low=1e-15, high=10)
    dice: str = option("linear", "p + y, foreground; p^2 + y^2, all classes", ("linear", "squared"), "losses")
    distill: str = option("kl", "distance of L_kd", ("kl", "mse"))
    tau: float = option(1.0, "temperature of L_kd", low=0.01, high=1000)
    lambda_kd: float = option(1.0, "weight of L_kd", high=1000)
    consistency: str = option("pseudo", "L_co: Dice + CE on hard labels; of probabilities", ("pseudo", "mse"))
    confidence: float = option(0.9, "pseudo: probability that a pixel needs to count", high=1)
    lambda_co: float = option(1.0, "weight of L_co", high=1000)
    ramp: float = option(0.5, "part of the run over which both weights rise as exp(-5 (1 - t)^2)", high=1)

    def __post_init__(self):
        """Each value of its default's type and within its bounds, from wherever it came: options or a checkpoint."""
        for f in fields(self):
            name, value, low, high = flag(f.name), getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            parts, defaults = (v if isinstance(v, tuple) else (v,) for v in (value, f.default))
            if [type(v) for v in parts] != [type(v) for v in defaults] or type(value) is not type(f.default):
                raise UserError(f"{name} {value!r}: not of the kind of {f.default!r}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise UserError(f"{name} {value!r}: choose from {', '.join(f.metadata['choices'])}")
            if type(parts[0]) in (int, float) and not all(low <= v <= high for v in parts):        # NaN fails too
                raise UserError(f"{name} {' '.join(map(str, parts))}: must lie between {low} and {high}")
        if self.labeled_batch > self.batch:
            raise UserError(f"--labeled-batch {self.labeled_batch}: must lie between 1 and --batch {self.batch}")
        if self.network == "teacher" and self.method in ("kd", "act"):
            raise UserError(f"--network teacher --method {self.method}: the teacher is trained alone, with sup or mt")
        if self.teacher_ckpt and self.method not in ("kd", "act"):
            raise UserError(f"--teacher-ckpt {self.teacher_ckpt}: --method {self.method} has no teacher; kd and act do")
        for key in ("student", "teacher"):
            depth, base = getattr(self, key)
            if depth > 12 or base * 2**(depth - 1) > 4096:
                raise UserError(f"--{key} {depth} {base}: wider than 4096 channels at its lowest level")


PRESETS = {
    "paper": dict(view="whole", size=256, batch=24, labeled_batch=12, iters=30000, optimizer="sgd", lr=0.01, ramp=0.2,
                  dice="squared", distill="mse", tau=20.0, consistency="mse", cutmix=0.0, intensity=0.3),
    "cpu": dict(size=128, batch=16, labeled_batch=8, iters=4000, teacher=(5, 16), val_every=250, log_every=10),
    "demo": dict(data="data/phantom", labeled=3, size=96, batch=8, labeled_batch=4, iters=450, teacher=(4, 16),
                 student=(4, 8), lr=0.01, ema=0.95, val_every=150, log_every=10),
}
MAY_CHANGE = {"iters", "minutes", "gpu", "cpu", "out", "data", "table"}          # on --resume


# ------------------------------------------------------------------------------------------------------------- data

def choose_cache(cache, device, need):
    """Where `need` bytes of slices wait: on the device, in memory, or on disk, read again for each batch."""
    if cache != "auto":
        return cache
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
    memory /= world()[1]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
    return "device" if need < free / 4 else "ram" if need < memory / 4 else "disk"


def deaf(worker):
    """SIGTERM and Ctrl-C are the parent's to handle: they may go to the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Slices:
    """The training slices, cut or resized to one side; batches are drawn, and augmented on `device`. Everything random
    is a function of (seed, step): a resumed run goes on with the same batches, wherever the slices wait."""

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        # A turned and scaled window of `size` mostly stays inside size + 64.
        self.side = cfg.size + 64 if cfg.view == "heart" else cfg.size
        self.names = names = data_prep.read_list(cfg.data, "train_slices", data_prep.SLICE)
        data_prep.require(names, f"{cfg.data}/train_slices.list", "empty")
        self.patients = data_prep.first_patients(names, cfg.labeled)
        self.n_labeled = sum(name[:10] in self.patients for name in names)
        names.sort(key=lambda name: name[:10] not in self.patients)                # stable; labelled first
        self.noise = torch.Generator(device)
        self.cache = choose_cache(cfg.cache, device, 3 * len(names) * self.side**2)
        if self.cache != "disk":
            self.images, self.labels = self.read(range(len(names)))
        if self.cache == "device":
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def read(self, index):
        """-> images (n, 1, S, S) fp16 in 0..1 and labels (n, 1, S, S) uint8 from the files."""
        images = torch.empty(len(index), 1, self.side, self.side, dtype=torch.float16)
        labels = torch.empty(images.shape, dtype=torch.uint8)
        slices = data_prep.read_slices(self.cfg.data, [self.names[i] for i in index])
        for i, (_, image, label) in enumerate(slices):
            image, label = torch.from_numpy(image)[None, None], torch.from_numpy(label)[None, None].float()
            if self.cfg.view == "heart":
                images[i], labels[i] = self.window(image, "replicate")[0], self.window(label, "constant")[0]
            else:
                shape = self.side, self.side
                images[i] = F.interpolate(image, shape, mode="bilinear", antialias=True)[0]
                labels[i] = F.interpolate(label, shape, mode="nearest-exact")[0]
        return images, labels

    def window(self, x, pad_mode):
        h, w = x.shape[-2:]
        top, left = (h - self.side) // 2, (w - self.side) // 2
        return F.pad(x, (-left, self.side - w + left, -top, self.side - h + top), mode=pad_mode)

    def indices(self, step):
        """The step's slices, labelled first: passes over each pool, every pass in an order of its own."""
        n_labeled, n_all, cfg = self.n_labeled, len(self.names), self.cfg
        semi = cfg.method != "sup" and n_labeled < n_all and cfg.labeled_batch < cfg.batch
        parts = [(0, n_labeled, cfg.labeled_batch if semi else cfg.batch)]
        if semi:
            parts.append((n_labeled, n_all - n_labeled, cfg.batch - cfg.labeled_batch))
        drawn = []
        for start, pool, n in parts:
            passes = range(step * n // pool, (step * n + n - 1) // pool + 1)
            order = np.concatenate([np.random.default_rng((cfg.seed, start, p)).permutation(pool) for p in passes])
            drawn.append(start + order[step * n - passes[0] * pool:][:n])
        return np.concatenate(drawn), parts[0][2]

    def __getstate__(self):                                  # for a reader, which needs no GPU and opens none
        return {**self.__dict__, "noise": None}

    def __getitem__(self, step):
        """-> images (B, 1, S, S), labels (L, 1, S, S) of its first L slices, both as they wait; or the error."""
        index, n_labeled = self.indices(step)
        if self.cache == "disk":
            try:
                images, labels = self.read(index)
            except UserError as error:                     # raised in a worker it would arrive with its traceback
                return error
            return images, labels[:n_labeled]
        index = torch.from_numpy(index).to(self.images.device, non_blocking=True)
        return self.images[index], self.labels[index[:n_labeled]]

    def batches(self, start, stop):
        """batch(step) of the steps start to stop, read ahead where the slices wait on disk."""
        ahead = dict(num_workers=min(8, os.cpu_count() or 2), worker_init_fn=deaf) if self.cache == "disk" else {}
        pin = self.device.type == "cuda" and self.cache != "device"
        loader = DataLoader(self, batch_size=None, sampler=range(start, stop), pin_memory=pin, **ahead)
        for step, raw in zip(range(start, stop), loader, strict=True):
            yield self.batch(step, raw)

    def batch(self, step, raw=None):
        """-> x (B, 1, S, S) float in 0..1, y (L, S, S) uint8 of its first L slices, and the step's random source."""
        raw = self[step] if raw is None else raw
        if isinstance(raw, UserError):
            raise raw
        images, labels = (part.to(self.device, non_blocking=True).float() for part in raw)
        rng = np.random.default_rng((self.cfg.seed, step))
        self.noise.manual_seed(int(rng.integers(2**62)))
        grid = self.geometry(len(images), rng)
        x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        y = F.grid_sample(labels, grid[:len(labels)], mode="nearest", align_corners=False)
        return x, y[:, 0].to(torch.uint8), rng

    def put(self, array):
        """numpy -> float on the device."""
        return torch.from_numpy(array).float().to(self.device, non_blocking=True)

    def smooth(self, nodes, size):
        """(n, C, K, K) numpy -> (n, C, size, size) float on the device: a field through these values."""
        return F.interpolate(self.put(nodes), (size, size), mode="bicubic", align_corners=True)

    def geometry(self, n, rng):
        """-> grid_sample's grid (n, S, S, 2), float on the device: where the pixels of a window lie in their slice."""
        size, side = self.cfg.size, self.side

        def turn(angle):
            return np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)

        if self.cfg.view == "whole":
            linear = turn(rng.integers(4, size=n) * np.pi / 2)
            linear[:, :, 0] *= rng.choice((-1, 1), (n, 1))
            theta = self.put(np.concatenate([linear, np.zeros((n, 2, 1))], 2))                           # (n, 2, 3)
            return F.affine_grid(theta, (n, 1, size, size), align_corners=False)
        linear = turn(np.radians(rng.uniform(-60, 60, n)))                 # as hearts lie; 20 or 180 are worse on val
        shift = rng.uniform(-1, 1, (n, 2, 1)) * size / 4 / side                           # an eighth of the window
        linear *= np.exp(rng.uniform(-0.25, 0.25, (n, 1, 1))) * size / side
        # Other hearts: stretched along one random axis and sheared, then bent by a pixel or two.
        stretch, shear, zero = np.exp(rng.uniform(-0.15, 0.15, n)), rng.uniform(-0.2, 0.2, n), np.zeros(n)
        axis = turn(rng.uniform(0, np.pi, n))
        form = axis @ np.stack([stretch, shear, zero, 1 / stretch], 1).reshape(n, 2, 2) @ axis.transpose(0, 2, 1)
        bend = rng.uniform(0, 1, (n, 1, 1, 1)) * rng.normal(0, 6 / side, (n, 2, 6, 6)) * (size / 128)
        theta = torch.cat([self.put(linear) @ self.put(form), self.put(shift)], 2)                       # (n, 2, 3)
        grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)
        return grid + self.smooth(bend, size).permute(0, 2, 3, 1)

    def perturb(self, x, rng, strength):
        """Gamma, a coil's uneven field, mean 0 and deviation 1 per slice, blur or sharpening, contrast, brightness and
        noise."""
        strength *= self.cfg.intensity
        gamma, contrast, brightness, sigma = self.put(strength * rng.uniform(-1, 1, (4, len(x), 1, 1, 1)))
        x = models.standardize(x.clamp_min(1e-4) ** torch.exp(0.5 * gamma))
        field = self.smooth(strength * rng.normal(0, 0.3, (len(x), 1, 4, 4)), x.shape[-1])
        x = models.standardize((x - x.amin((2, 3), keepdim=True)) * torch.exp(field))
        blur = self.put(strength * rng.uniform(-1, 1, (len(x), 1, 1, 1)))                        # below 0: sharper
        x = x + blur * (F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) - x)
        noise = torch.randn(x.shape, device=self.device, generator=self.noise)
        return x * torch.exp(0.3 * contrast) + 0.3 * brightness + 0.2 * sigma.abs() * noise

    def boxes(self, n, rng):
        """CutMix: mask (n, 1, S, S), true inside a box of a quarter to half of the side, in some slices."""
        size = self.cfg.size
        side = size * rng.uniform(0.25, 0.5, (n, 2)) * (rng.random((n, 1)) < self.cfg.cutmix)
        low = rng.uniform(0, size - side)
        edges = self.put(np.stack([low, low + side]))                                                     # (2, n, 2)
        ticks = torch.arange(size, device=self.device)
        inside = (ticks >= edges[0, :, :, None]) & (ticks < edges[1, :, :, None])                         # (n, 2, S)
        return inside[:, None, 0, :, None] & inside[:, None, 1, None, :]


# ---------------------------------------------------------------------------------------------------------- helpers

def bf16_pays(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def fingerprint(root):
    """SHA-256 of the slices and volumes that a run reads: another set would silently be another run."""
    sha = hashlib.sha256()
    for split, pattern in (("train_slices", data_prep.SLICE), ("val", data_prep.VOLUME)):
        for name in data_prep.read_list(root, split, pattern):
            sha.update(name.encode() + data_prep.h5_path(root, name).read_bytes())
    return sha.hexdigest()


def validate(net, volumes, inference):
    """Mean Dice over the volumes per class (RV, MYO, LV), on the native grid."""
    return np.mean([evaluate.dice(segment_volume(net, v.image, **inference), v.label) for v in volumes], axis=0)


def describe(cfg, device, slices, nets):
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()                 # shell: nothing where git is absent
    return dict(config=asdict(cfg), command=shlex.join(["python", *sys.argv]), commit=commit or "unknown",
                device=models.describe_device(device),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                              triton=getattr(sys.modules.get("triton"), "__version__", "")),
                labeled_patients=slices.patients, labeled_slices=slices.n_labeled, slices=len(slices.names),
                parameters={k: count_parameters(n) for k, n in nets.items()})


def append_row(path, row):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as f:
            writer = csv.DictWriter(f, row, lineterminator="\n")
            if f.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:                                                # a failed write does not name its file
        raise data_prep.refusal(path, error) from None


def draw_curves(run):
    from matplotlib.figure import Figure
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, columns in ((left, ("dice", "ce", "kd", "co", "teacher")), (right, ("val_student", "val_coteacher"))):
        for column in columns:
            points = [(int(r["step"]), float(r[column])) for r in rows if float(r[column] or 0)]
            if points:
                axes.plot(*zip(*points, strict=True), label=column, linewidth=1)
        if axes.lines:
            axes.legend()
    left.set(xlabel="step", yscale="log", title="training losses")
    right.set(xlabel="step", title="mean Dice on val")
    png = io.BytesIO()
    figure.savefig(png, dpi=90)
    data_prep.write_atomic(run / "curves.png", png.getvalue())


# ----------------------------------------------------------------------------------------------- several processes

def world():
    """(rank, number of processes): of torchrun, or of this process alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is the gradient's."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes; SyncBatchNorm wants a GPU, and waits for it in every layer."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        f, n = x.float(), x.numel() / x.shape[1] * world()[1]
        mean, square = _Sum.apply(torch.stack([f.sum((0, 2, 3)), f.square().sum((0, 2, 3))])) / n
        var = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (f * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def split(net):
    """The network for one of several processes: batch norm and gradients over all of them."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm
    return DistributedDataParallel(net)


def gather(logits):
    """This process' rows, rank::world of the batch -> the whole batch; a gradient flows into its own rows only."""
    rank, size = world()
    if size == 1:
        return logits
    logits = logits.float().contiguous()
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach())
    parts[rank] = logits
    return torch.stack(parts, 1).flatten(0, 1)                                    # (B / W, W, C, H, W) -> (B, C, H, W)


# ------------------------------------------------------------------------------------------------------------- step

TERMS = ("loss", "dice", "ce", "kd", "co", "teacher")


class ActNet:
    """The networks, their optimiser, and one step of training."""

    def __init__(self, cfg, device, slices):
        self.cfg, self.device, self.slices = cfg, device, slices
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bf16_pays(device))
        self.precision = "bf16" if bf16 else "fp32"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        torch.manual_seed(cfg.seed)
        layout = dict(memory_format=torch.channels_last)
        student = UNet(*(cfg.student if cfg.network == "student" else cfg.teacher)).to(device, **layout)
        if cfg.init:
            weights = models.load_model(cfg.init, device)[0]
            if weights.architecture != student.architecture:
                raise UserError(f"--init {cfg.init}: holds {weights.architecture}, not {student.architecture}")
            student.load_state_dict(weights.state_dict())
        self.nets, trained = dict(student=student), dict(student=student)
        if cfg.method in ("mt", "act"):
            self.nets["coteacher"] = coteacher = deepcopy(student).eval().requires_grad_(False)
            states = [list(net.state_dict().values()) for net in (coteacher, student)]
            self.averaged, self.copied = ([[v for v in state if v.is_floating_point() == real] for state in states]
                                          for real in (True, False))
        if cfg.method in ("kd", "act") and cfg.teacher_ckpt:
            teacher, kept = models.load_model(cfg.teacher_ckpt, device)
            trained_as = kept["config"].get("network") if isinstance(kept.get("config"), dict) else None
            if trained_as == "student":
                raise UserError(f"--teacher-ckpt {cfg.teacher_ckpt}: holds the student of its run, not a teacher; "
                                "train one with --network teacher --method sup")
            self.nets["teacher"] = teacher.requires_grad_(False)
            for key in ("in_channels", "num_classes"):
                if teacher.architecture[key] != student.architecture[key]:
                    raise UserError(f"--teacher-ckpt {cfg.teacher_ckpt}: {key} {teacher.architecture[key]}, "
                                    f"the student's is {student.architecture[key]}")
        elif cfg.method in ("kd", "act"):
            self.nets["teacher"] = trained["teacher"] = UNet(*cfg.teacher).to(device, **layout)
        parameters = [p for net in trained.values() for p in net.parameters()]
        if cfg.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.05, fused=True)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=cfg.lr, momentum=0.9, weight_decay=1e-4, fused=True)
        self.forward = dict(self.nets)
        if cfg.compile:                                       # static: the networks differ in their number of rows
            self.forward = {name: torch.compile(net, dynamic=False) for name, net in self.nets.items()}
        if world()[1] > 1:
            self.forward |= {name: split(self.forward[name]) for name in trained}

    def step(self, step, x, y, rng, mark=lambda stage: None):
        """One step on a batch of Slices -> TERMS (6,) float on the device. Waits for nothing; `mark` is told when a
        stage's work has been issued."""
        cfg, slices, n_labeled, n = self.cfg, self.slices, len(y), len(x)
        student, coteacher, teacher = (self.forward.get(name) for name in ("student", "coteacher", "teacher"))
        use_teacher, use_coteacher, frozen = teacher is not None, coteacher is not None, bool(cfg.teacher_ckpt)
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * max(0, 1 - step / cfg.iters) ** 0.9
        ramp = math.exp(-5 * (1 - min(1, step / max(1, cfg.ramp * cfg.iters))) ** 2)

        # One geometry for all three networks, an intensity of its own for each: the students of this game see hard
        # pictures, those who answer see mild ones. Of several processes each takes every world-th row.
        boxes = slices.boxes(n - n_labeled, rng)

        def mix(a):                                        # (B, ...), or its unlabelled slices alone: CutMix of these
            labeled, other = a.split([len(a) - len(boxes), len(boxes)])
            return torch.cat([labeled, torch.where(boxes, other.roll(1, 0), other)])

        mine = slice(world()[0], None, world()[1])
        x_s = mix(slices.perturb(x, rng, 1.0))[mine]
        seen = x[n_labeled if cfg.consistency == "pseudo" else 0:]            # what the co-teacher answers
        x_c = slices.perturb(seen, rng, 0.25)[mine] if use_coteacher and len(seen) else None
        asked = x[0 if frozen else n_labeled:]                                # what the teacher only answers
        x_t = slices.perturb(asked, rng, 0.25)[mine] if use_teacher and len(asked) else None
        x_l = slices.perturb(x[:n_labeled], rng, 1.0)[mine] if use_teacher and not frozen else None
        mark("data")

        t = c = t_seg = None
        with self.autocast:
            s = gather(student(x_s))                                                    # (B, C, S, S) logits
            mark("student")
            with torch.no_grad():
                if x_c is not None:
                    c = mix(gather(coteacher(x_c)))                                     # (B or B - L, C, S, S)
                mark("coteacher")
                if x_t is not None:
                    self.nets["teacher"].eval()
                    t = gather(getattr(teacher, "module", teacher)(x_t))      # inside DistributedDataParallel, if it is
            if use_teacher and not frozen:
                self.nets["teacher"].train()
                t_seg = gather(teacher(x_l))
                t = t_seg.detach() if t is None else torch.cat([t_seg.detach(), t])
            t = mix(t) if use_teacher else None
        mark("teacher")

        form = dict(squared=cfg.dice == "squared", include_background=cfg.dice == "squared")         # of Dice
        weights = 1.0, 1.0, ramp * cfg.lambda_kd, ramp * cfg.lambda_co
        dice, ce, kd, co = student_loss(s, y, t, c if cfg.consistency == "mse" else None, tau=cfg.tau,
                                        distill=cfg.distill, expected_grads=[world()[1] * w for w in weights], **form)
        if c is not None and cfg.consistency == "pseudo":
            answers = [c, t[n_labeled:]] if frozen else [c]                      # a teacher trained along lags behind c
            sure, hard = torch.stack([a.float().softmax(1) for a in answers]).mean(0).max(1)     # (B - L, H, W)
            co = co + sum(dice_ce(s[n_labeled:], hard.masked_fill(sure < cfg.confidence, -100), **form))
        loss = sum(w * term for w, term in zip(weights, (dice, ce, kd, co), strict=True))    # L_stu
        teacher_seg = s.new_zeros(()) if t_seg is None else sum(dice_ce(t_seg, y, **form))   # the teacher's L_seg
        mark("loss")

        self.optimizer.zero_grad(set_to_none=True)
        (world()[1] * (loss + teacher_seg)).backward()          # times W: each process holds its rows' share of a sum,
        mark("backward")                                        # and DistributedDataParallel takes the mean
        self.optimizer.step()
        mark("optimizer")
        if use_coteacher:                              # a plain mean of the first steps, then the moving average
            get_ema_multi_avg_fn(min(cfg.ema, step / (step + 1)))(*self.averaged, None)
            torch._foreach_copy_(*self.copied)
        mark("ema")
        return torch.stack([v.detach().float() for v in (loss, dice, ce, kd, co, teacher_seg)])


# ------------------------------------------------------------------------------------------------------------ train

COLUMNS = ("step", "seconds", "lr", "slices_per_s", *TERMS, "val_student", "val_coteacher")


def prepare(cfg):
    """The checks of a run -> its device, slices and networks."""
    local = dist.is_initialized() and torch.cuda.is_available() and not cfg.cpu  # torchrun: a GPU for each process
    gpu = int(os.environ.get("LOCAL_RANK", world()[0])) if local else None if cfg.gpu == -1 else cfg.gpu
    device = pick_device(gpu, cfg.cpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)                       # what has no tensor to go by: events, pinned memory, bf16?
    trained = [cfg.network] + ["teacher"] * (cfg.method in ("kd", "act") and not cfg.teacher_ckpt)
    for key, (depth, base) in ((key, getattr(cfg, key)) for key in trained):
        if cfg.size < 2**depth:                                 # batch norm would meet a single pixel
            raise UserError(f"--{key} {depth} {base}: needs --size {2**depth} at least, not {cfg.size}")
    size = world()[1]
    if cfg.batch % size or cfg.labeled_batch % size:
        raise UserError(f"--batch {cfg.batch} --labeled-batch {cfg.labeled_batch}: {size} processes want multiples")
    torch.backends.cudnn.benchmark = not cfg.deterministic
    torch.backends.cudnn.allow_tf32 = False                            # fp32, validation's too, is fp32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # warn_only: max-pooling's backward is called non-deterministic, but our windows do not overlap.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False          # NaN into each empty tensor: time only
    slices = Slices(cfg, device)
    return device, slices, ActNet(cfg, device, slices)


def train(cfg, resume=None):
    """One run. Returns its folder."""
    device, slices, act = prepare(replace(cfg, init="") if resume else cfg)          # its weights come from last.pt
    nets, rank = act.nets, world()[0]
    volumes = [data_prep.read_volume(cfg.data, name) for name in data_prep.read_list(cfg.data, "val")]
    data_prep.require(volumes, f"{cfg.data}/val.list", "empty, and the best checkpoint is chosen on val")
    for v in volumes:
        data_prep.require(v.label is not None, cfg.data, f"{v.name} of val.list holds no label")
    # A little more than was trained on: enough to hold every heart but the largest; far more costs a point of Dice.
    inference = dict(view=cfg.view, size=cfg.size * 9 // 8 if cfg.view == "heart" else cfg.size)

    run, start, trained_s, best = Path(cfg.out), 0, 0.0, dict(step=-1, score=-1.0)
    digest = fingerprint(cfg.data)
    if resume:
        start, trained_s, best = resume["step"], resume["seconds"], resume["best"]
        if start > cfg.iters or (start == cfg.iters and (run / "summary.json").exists()):
            raise UserError(f"--resume {run}: is at step {start}; a larger --iters goes on")
        if resume.get("data") != digest:
            raise UserError(f"--data {cfg.data}: not the slices and volumes that {run} began with; give those")
        try:
            for name, net in nets.items():
                net.load_state_dict(resume["networks"][name])
            act.optimizer.load_state_dict(resume["optimizer"])
            tensors = sum(len(group["params"]) for group in act.optimizer.param_groups)
            if len(act.optimizer.state) != tensors:
                raise ValueError(f"the optimiser's state is of {len(act.optimizer.state)} of {tensors} tensors")
            del resume["networks"], resume["optimizer"]                                             # gigabytes, perhaps
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = data_prep.one_line(error)
            raise UserError(f"--resume {run}: the checkpoint's state does not fit its config ({reason})") from None
    about = describe(cfg, device, slices, nets)                         # now: the code may change while it runs
    if resume:
        with suppress(OSError, ValueError, KeyError, TypeError):                            # damaged: the resume alone
            about["command"] = f"{json.loads((run / 'config.json').read_bytes())['command']} && {about['command']}"
    if rank == 0:
        if not resume:
            data_prep.write_atomic(run / "config.json", (json.dumps(about, indent=1) + "\n").encode())
        (run / "summary.json").unlink(missing_ok=True)
        keep_log_until(run / "log.csv", start)
        sizes = ", ".join(f"{k} {count_parameters(n) / 1e6:.2f} M" for k, n in nets.items())
        print(f"{run}: {cfg.method}, {len(slices.patients)} labelled patients ({slices.n_labeled} of "
              f"{len(slices.names)} slices, cache {slices.cache}), {sizes}, {device}, {act.precision}", flush=True)

    def save(step):
        save_checkpoint(run / "last.pt", dict(
            networks={k: n.state_dict() for k, n in nets.items()}, optimizer=act.optimizer.state_dict(), step=step,
            seconds=trained_s, best=best, config=asdict(cfg), data=digest, architecture=nets["student"].architecture,
            inference=inference, better="student"), previous=run / "previous.pt")

    def refuse(step, problem):
        names = " ".join(slices.names[i] for i in slices.indices(step)[0])
        raise UserError(f"step {step}: {problem}; slices {names}; the checkpoint before it, if any, is in {run}; "
                        "a lower --lr or --precision fp32 may help")

    def finite(history, done):
        """The steps' terms (steps, 6), of which none is NaN or infinite. Waits for the device."""
        terms = torch.stack(history).cpu().numpy()
        for step in np.flatnonzero(~np.isfinite(terms).all(1))[:1]:
            refuse(done - len(terms) + int(step),
                   ", ".join(f"{k} {v:.3g}" for k, v in zip(TERMS, terms[step], strict=True)))
        return terms

    history, began, marked, done = [], time.perf_counter(), (start, time.perf_counter()), start
    with watched(cfg.iters, start) as (bar, stop):
        for step, batch in enumerate(slices.batches(start, cfg.iters), start):
            history.append(act.step(step, *batch))

            done = step + 1
            bar.update()
            stopping = bool(stop) or 0 < 60 * cfg.minutes < time.perf_counter() - began
            due = done % cfg.log_every == 0 or done % cfg.val_every == 0 or done == cfg.iters
            if len(history) % 20 == 0 and not due:                   # found at most 20 steps late; due: looked at below
                finite(history, done)
            if device.type == "cpu" and done == start + 8 and rank == 0:
                hours = (time.perf_counter() - began) / 8 * (cfg.iters - start) / 3600
                advice = "; --preset cpu is smaller" if hours > 1 and cfg.teacher > PRESETS["cpu"]["teacher"] else ""
                bar.write(f"about {60 * hours:.0f} minutes on this CPU{advice}")
            if world()[1] > 1 and due:                                            # all stop, or none
                votes = torch.tensor(float(stopping), device=device)
                dist.all_reduce(votes)
                stopping = votes.item() > 0
            last = done == cfg.iters or (stopping and (due or world()[1] == 1))
            if not (due or last):
                continue

            # Everything below waits for the device; above only the look at the terms, every 20 steps, does.
            terms = finite(history, done)
            saves = done % cfg.val_every == 0 or last
            for name, net in nets.items() if saves else ():      # a loss may be finite and its gradient not
                if not all(v.isfinite().all() for v in net.state_dict().values()):
                    refuse(step, f"the {name}'s weights are no longer finite")
            seconds, history = time.perf_counter() - marked[1], []
            trained_s += seconds
            row = dict(zip(TERMS, terms.mean(0).round(6), strict=True), step=done, seconds=round(trained_s, 1),
                       lr=round(act.optimizer.param_groups[0]["lr"], 8),
                       slices_per_s=round((done - marked[0]) * cfg.batch / seconds, 1))
            if rank == 0:
                if done % cfg.val_every == 0 or done == cfg.iters:
                    val = {k: validate(net, volumes, inference) for k, net in nets.items() if k != "teacher"}
                    row |= {f"val_{k}": round(float(v.mean()), 5) for k, v in val.items()}
                    better = max(val, key=lambda k: val[k].mean())
                    if val[better].mean() > best["score"]:
                        best = dict(step=done, score=float(val[better].mean()), better=better,
                                    val={k: v.tolist() for k, v in val.items()})
                        save_checkpoint(run / "best.pt", dict(
                            networks={k: nets[k].state_dict() for k in val}, architecture=nets["student"].architecture,
                            inference=inference, better=better, step=done, val=best["val"], config=asdict(cfg)))
                append_row(run / "log.csv", {column: row.get(column, "") for column in COLUMNS})
                if saves:
                    save(done)
                    draw_curves(run)
                val_text = f"best val {best['score']:.4f}, " if best["step"] > 0 else ""
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {val_text}{row['slices_per_s']:.0f} slices/s")
            marked = done, time.perf_counter()
            if last:
                break
    if rank == 0 and done < cfg.iters:
        print(f"stopped at step {done} ({stop[0] if stop else '--minutes'}); "
              f"go on with: python train_actnet.py --resume {shlex.quote(str(run))}")
    elif rank == 0:
        finish(cfg, act, about, volumes, inference, best, round(trained_s, 1))
    return run


def finish(cfg, act, about, volumes, inference, best, seconds):
    """student.pt, the val scores of the last networks and the best on the screen, in summary.json and in --table."""
    run = Path(cfg.out)
    kept = load_checkpoint(run / "best.pt")                          # what to give away: one network, in fp16
    half = {k: v.half() if v.is_floating_point() else v for k, v in kept["networks"][kept["better"]].items()}
    save_checkpoint(run / "student.pt", {**kept, "networks": {kept["better"]: half}})
    networks = {("last", cfg.iters, name): net for name, net in act.nets.items()}
    for name in kept["val"]:
        networks["best", kept["step"], name] = models.load_model(run / "best.pt", act.device, name)[0]
    summary = dict(last={}, best=best, seconds=seconds)
    print(f"{'on val, Dice':23}     RV     MYO      LV    mean   HD95 in voxels, mean")
    for (when, step, name), net in networks.items():
        cases = [evaluate.case_metrics(segment_volume(net, v.image, **inference), v.label) for v in volumes]
        dice, hd95 = (evaluate.aggregate(cases)[metric] for metric in ("dice", "hd95_voxel"))
        dice, hd95 = ({c: round(x["mean"], 4) for c, x in metric.items()} for metric in (dice, hd95))
        print(f"{name:9} {when:4} {step:7} ", *(f"{x:7.4f}" for x in dice.values()), f"  {hd95['mean']:.2f}")
        if when == "last":
            summary["last"][name] = list(dice.values())[:-1]
        if cfg.table:
            append_row(Path(cfg.table), dict(
                date=time.strftime("%Y-%m-%d"), commit=about["commit"], device=about["device"], seconds=seconds,
                seed=cfg.seed, labeled=cfg.labeled, method=cfg.method, network=name, parameters=count_parameters(net),
                when=when, step=step, **{f"dice_{c}": x for c, x in dice.items()},
                **{f"hd95_{c}": x for c, x in hd95.items()}, command=about["command"]))
    data_prep.write_atomic(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    print(f"kept: the {kept['better']} of step {kept['step']} in {run / 'best.pt'}, alone and in fp16 in student.pt; "
          f"next: python evaluate.py {run / 'best.pt'} --data {cfg.data}")


# ------------------------------------------------------------------------------------------------------------ bench

def matrix_rate(device):
    """FLOP/s of a large bf16 (or fp32, where that is faster) matrix product: the floor of a step's time."""
    rates = []                                                 # bf16 without its instructions would take minutes
    for dtype in (torch.float32, torch.bfloat16)[:1 + bf16_pays(device)]:
        n = 8192 if device.type == "cuda" else 2048
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        clock = Clock(device)
        for _ in range(8):
            a @ b
            clock("product")
        rates.append(2 * n**3 / np.median(clock.seconds()["product"][2:]))
    return max(rates)


class Clock:
    """Seconds between marks by stage; CUDA events on a GPU, so that marking waits for nothing."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []
        self("")

    def __call__(self, stage):
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((stage, now))

    def seconds(self):
        if self.cuda:
            torch.cuda.synchronize()
        spans = {}
        for (_, a), (stage, b) in zip(self.marks, self.marks[1:], strict=False):
            spans.setdefault(stage, []).append(a.elapsed_time(b) / 1000 if self.cuda else b - a)
        return {stage: np.array(s) for stage, s in spans.items()}


def flop(act):
    """Arithmetic of a step, convolutions only: forward 1, forward and backward 3; two per multiply-accumulate."""
    cfg, n, labeled = act.cfg, act.cfg.batch, act.slices.indices(0)[1]
    passes = dict(student=3 * n, coteacher=n - labeled * (cfg.consistency == "pseudo"),
                  teacher=n + 2 * labeled * (not cfg.teacher_ckpt))
    return sum(2 * models.count_macs(net, cfg.size) * passes[name] for name, net in act.nets.items())


def bench(cfg, steps, table):
    """Time `steps` steps after a warm-up, print the shares and append a row to `table`."""
    device, slices, act = prepare(cfg)
    warm = 10 if device.type == "cuda" else 3
    batches = slices.batches(0, warm + steps)
    for step in range(warm):
        act.step(step, *next(batches))
    rate = matrix_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    for step, batch in enumerate(batches, warm):
        clock("data")
        act.step(step, *batch, clock)
    spans = clock.seconds()
    spans["data"] = spans["data"].reshape(steps, 2).sum(1)                                # drawn, then perturbed
    total = sum(spans.values())
    p20, p50, p80 = 1000 * np.quantile(total, (0.2, 0.5, 0.8))
    peak = torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else ""
    about = describe(cfg, device, slices, act.nets)
    shapes = {k: "{} {}".format(*n.architecture.values()) for k, n in act.nets.items() if k != "coteacher"}
    row = dict(
        date=time.strftime("%Y-%m-%d"), commit=about["commit"], device=about["device"], processes=world()[1],
        torch=torch.__version__, precision=act.precision, compile=cfg.compile, cache=slices.cache, view=cfg.view,
        method=cfg.method, **{"teacher": "", "student": "", **shapes}, size=cfg.size, batch=cfg.batch, steps=steps,
        ms_p20=p20, ms_p50=p50, ms_p80=p80, slices_per_s=1000 * cfg.batch / p50,
        **{f"{stage}_percent": 100 * s.sum() / total.sum() for stage, s in spans.items()},
        gflop=flop(act) / 1e9, matrix_tflops=rate / 1e12,                                  # the latter of one device
        floor_percent=1e5 * flop(act) / world()[1] / rate / p50, peak_mb=peak)
    row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    if world()[0] == 0:
        append_row(table, row)
        print("\n".join(f"{k:18} {v}" for k, v in row.items()))


# ---------------------------------------------------------------------------------------------------------- run folder

@contextmanager
def watched(total, start):
    """-> (progress bar, list of the signals that asked to stop); a second one stops at once, without saving."""
    stop = []

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(signal.Signals(number).name)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=world()[0] > 0,
                  mininterval=1 if sys.stderr.isatty() else 30) as bar:
            yield bar, stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def load_last(run):
    """last.pt, or the checkpoint before it where last.pt is absent or damaged (then set aside as last.pt.damaged)."""
    def load(name):
        content = load_checkpoint(run / name)
        kinds = dict(networks=dict, optimizer=dict, config=dict, best=dict, step=int, seconds=float)
        wrong = [k for k, kind in kinds.items() if type(content.get(k)) is not kind]
        if wrong or content["step"] < 0:
            raise models.CheckpointError(f"{run / name}: not the state of a run ({', '.join(wrong) or 'step'})")
        return content

    try:
        return load("last.pt")
    except models.CheckpointError as error:
        if not (run / "previous.pt").exists():
            raise
        content = load("previous.pt")
        with suppress(FileNotFoundError):               # or the next save would put it in place of the good previous.pt
            os.replace(run / "last.pt", run / "last.pt.damaged")
        print(f"{error}. Going on from previous.pt, step {content['step']}", file=sys.stderr)
        return content


def keep_log_until(path, step):
    """Drop the rows past the checkpoint that the run resumes from, and whatever is not a row."""
    def whole(row):
        with suppress(ValueError):
            values = [float(v or 0) for v in row.split(",")]
            return len(values) == len(COLUMNS) and values[0] <= step

    rows = path.read_text(errors="replace").splitlines() if path.exists() else []
    data_prep.write_atomic(path, "\n".join([",".join(COLUMNS), *filter(whole, rows), ""]).encode())


# ------------------------------------------------------------------------------------------------------------- main

def parse(argv):
    parser = data_prep.Parser(
        description=__doc__.splitlines()[0], usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        add_help=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=118))
    group = parser.add_argument_group("run")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    group.add_argument("--preset", choices=("paper", "cpu"),
                       help="paper: the field's protocol, its distances; cpu: half an hour on two cores, bf16")
    group.add_argument("--demo", action="store_true", help="train and evaluate on synthetic hearts")
    group.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    group.add_argument("--bench", nargs="?", type=int, const=50, metavar="STEPS",
                       help="time steps, append to results/step.csv [50]")
    for f in fields(Config):
        if f.metadata["group"] not in (None, "run"):
            group = parser.add_argument_group(f.metadata["group"])
        kind = dict(action=argparse.BooleanOptionalAction) if f.name == "compile" else \
            dict(action="store_true") if isinstance(f.default, bool) else \
            dict(type=int, nargs=2, metavar=("DEPTH", "BASE")) if isinstance(f.default, tuple) else \
            dict(type=type(f.default), choices=f.metadata["choices"],
                 metavar={int: "N", float: "X"}.get(type(f.default)))
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        default = "" if f.default in ("", -1, False, 0.0) else f" [{shown}]"
        group.add_argument(flag(f.name), help=f.metadata["help"] + default, **kind)
    blank, parser.format_help = parser.format_help, lambda: blank().replace("\n\n", "\n")      # it fits a screen
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}


def resolve(given):
    """Command-line options -> (Config, checkpoint to resume from or None): defaults < preset < given."""
    preset, demo, folder = given.pop("preset", None), given.pop("demo", False), given.pop("resume", None)
    if demo and preset:
        raise UserError("--demo and --preset: give one of them")
    if given.get("cpu") and "gpu" in given:
        raise UserError("--cpu and --gpu: give one of them")
    if folder is not None:
        resume = load_last(Path(folder))
        unknown = resume["config"].keys() ^ {f.name for f in fields(Config)}
        if unknown:
            raise UserError(f"--resume {folder}: {sorted(map(str, unknown))[0]} of its config is not of this version")
        saved = resume["config"]
        changed = [k for k, v in given.items() if k not in MAY_CHANGE and saved[k] != v]
        changed += ["preset"] * bool(preset) + ["demo"] * bool(demo) + ["out"] * (given.get("out", folder) != folder)
        if changed:
            raise UserError(f"--resume {folder}: {flag(changed[0])} may not change within a run")
        saved.update({"cpu": False} if "gpu" in given else {"gpu": -1} if "cpu" in given else {})
        return Config(**{**saved, **given, "out": folder}), resume
    usual = PRESETS.get("demo" if demo else preset, {})
    if "batch" in given and "labeled_batch" not in given:                     # the labelled share follows the batch
        share = Config(**usual)
        given["labeled_batch"] = max(1, given["batch"] * share.labeled_batch // share.batch)
    cfg = Config(**{**usual, **given})
    if not cfg.out:
        base = f"runs/{'demo-' if demo else ''}{cfg.method}-{cfg.labeled}-seed{cfg.seed}"
        names = [base] + [f"{base}-{i}" for i in range(2, 1000)]
        cfg = replace(cfg, out=next(name for name in names if not Path(name).exists()))
    elif any((Path(cfg.out) / name).exists() for name in ("last.pt", "previous.pt")):
        raise UserError(f"--out {cfg.out}: holds a run already; --resume {cfg.out} goes on with it")
    return cfg, None


REMEDIES = {                                                      # by what an error of torch or triton says of itself
    "c compiler": "Triton builds its launcher on first use: install gcc, or set CC",
    "calledprocesserror": "Triton could not build its launcher: install python3-dev",
    "dataloader worker": "a reader of slices died: --cache ram, or a larger /dev/shm",
}


def main(argv=None):
    given = parse(argv)
    demo, steps = given.get("demo"), given.pop("bench", None)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                                             # started by torchrun
        # Alone, nccl would also carry what is not on a GPU: the run's name, and everything of a run on CPUs.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))                         # a validation's patience
    rank, folder = world()[0], given.get("resume")
    # Until the loop, which saves first, SIGTERM is what Ctrl-C is: one line, nothing left behind.
    handler, held = signal.signal(signal.SIGTERM, signal.default_int_handler), ExitStack()
    try:
        if steps is not None and steps < 1:
            raise UserError(f"--bench {steps}: give 1 or more")
        if "gpu" in given and dist.is_initialized():
            raise UserError(f"--gpu {given['gpu']}: torchrun gives each process one; choose by CUDA_VISIBLE_DEVICES")
        if folder is not None and rank == 0:
            held.enter_context(data_prep.locked_folder(Path(folder)))                 # before it is read
        cfg, resume = resolve(given)
        if demo and rank == 0 and not (Path(cfg.data) / "manifest.json").exists() and \
                (code := phantom.prepare_demo(cfg.data)):
            return code
        if dist.is_initialized():
            shared = [cfg.out]
            dist.broadcast_object_list(shared)
            cfg = replace(cfg, out=shared[0])
        if steps is not None:
            bench(cfg, steps, Path(__file__).parent / "results" / "step.csv")
            return 0
        if folder is None and rank == 0:
            held.enter_context(data_prep.locked_folder(Path(cfg.out)))
        with held:
            run = train(cfg, resume)
        if dist.is_initialized():
            dist.barrier()                                                                   # nobody leaves early
        if demo and rank == 0 and (run / "summary.json").exists():                              # not stopped before
            where = ["--cpu"] if cfg.cpu else ["--gpu", str(cfg.gpu)] if cfg.gpu >= 0 else []
            return evaluate.main([str(run / "best.pt"), "--data", cfg.data, "--out", str(run / "test"), *where])
    except (UserError, models.CheckpointError, models.DeviceError, OSError) as error:
        if rank == 0 or isinstance(error, models.DeviceError):
            print(f"train_actnet.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, subprocess.CalledProcessError) as error:
        said = f"{type(error).__name__} {error}".lower()
        remedy = next((r for mark, r in REMEDIES.items() if mark in said), None)
        if data_prep.out_of_memory(error):
            remedy = remedy or "out of memory: a smaller --batch, --size or --teacher needs less"
        if remedy is None:                                                             # an illegal memory access, say
            raise
        print(f"train_actnet.py: {remedy} ({data_prep.one_line(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_actnet.py: interrupted, not saved; --resume goes on from the last checkpoint, if there is one",
              file=sys.stderr)
        return 130
    finally:
        held.close()
        signal.signal(signal.SIGTERM, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:             # at the interpreter's end torch's threads have been seen to abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

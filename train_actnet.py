"""Train a 0.48 M-parameter student from a few labelled patients and many without labels: one run, three stages.

    L_seg = L_dice + L_ce                                    labelled slices
    1. Teacher       T learns from L_seg alone; its best on val answers about every slice, once (a --round).
    2. Student       S learns from L_seg alone; its best on val goes on.
    3. Co-teaching   S learns from the labels, from T's answers t and from C, the moving average of its own weights:
       L_kd  = distance(softmax(s / tau), softmax(t / tau))  teacher -> student, all slices            (Hete-KD)
       L_co  = distance(softmax(s), softmax(c))              co-teacher -> student, other perturbation (Homo-KD);
               by default L_seg on hard labels of the unlabelled slices, where the mean of c and the kept t is sure
       L_stu = L_seg + lambda_kd * L_kd + lambda_co * L_co
       theta_c <- ema * theta_c + (1 - ema) * theta_s        after every step, at first a plain mean; batch norm too
    With --teacher-along (--preset paper) there is stage 3 alone, and T trains in every step.

Zhao, Zhu, Zeng, Veeravalli, Guan: "ACT-Net: Asymmetric Co-Teacher Network for Semi-supervised Memory-efficient
Medical Image Segmentation", ICIP 2022, arXiv 2207.01900. Where this script departs from it: README, "Deviations".

    python train_actnet.py --demo                              # synthetic hearts, minutes on a laptop
    python train_actnet.py --labeled 7 --gpu 0                 # ACDC prepared by data_prep.py in data/ACDC
    python train_actnet.py --labeled 7 --cpu --preset cpu      # the same on two cores
    python train_actnet.py --resume runs/act-7-seed0
    torchrun --nproc_per_node=4 train_actnet.py --labeled 7    # the same batch, split over four GPUs
"""
import argparse
import csv
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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # before torch starts its threads: long spinning would keep a core from other work
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import augment
import data_prep
import distributed
import evaluate
import models
import phantom
from data_prep import DataError
from distributed import gather, own_rows, world
from kernels.dice_ce import dice_ce
from kernels.student_loss import student_loss
from models import UNet, count_parameters, load_checkpoint, load_model, pick_device, save_checkpoint
from slices import Slices, fingerprint, load_teacher, read_val


def flag(key):
    return "--" + key.replace("_", "-")


def option(default, text, choices=None, group=None, low=0, high=10**9):
    """A field of Config and its option; `group` begins a group of --help, for it and those after it."""
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
    iters: int = option(30000, "steps of all stages", low=1)
    stages: tuple = option((5, 5, 20), "their parts: teacher, student, co-teaching")
    minutes: float = option(0.0, "stop and save after so long; 0: never")
    val_every: int = option(500, "steps between validations", low=1)
    save_minutes: float = option(1.0, "least time between checkpoints, which validations make; 0: each")
    log_every: int = option(20, "steps between rows of log.csv", low=1)
    precision: str = option("auto", "auto: bf16 where the device computes in it, fp16 on an older GPU",
                            ("auto", "bf16", "fp16", "fp32"))
    compile: bool = option(False, "torch.compile the networks; did not pay on a CPU")
    deterministic: bool = option(False, "only kernels that repeat bit for bit, slower on a GPU")
    batch: int = option(24, "slices of a co-teaching step", group="data", low=1, high=2**16)
    labeled_batch: int = option(12, "of these with labels; follows --batch", low=1)
    sup_batch: int = option(24, "slices of a step on the labels alone; follows --batch", low=1, high=2**16)
    cache: str = option("auto", "where slices wait; auto: the first that fits", ("auto", "device", "ram", "disk"))
    size: int = option(160, "side of the training window, pixels", low=8, high=2048)
    view: str = option("heart", "heart: centre, native resolution; whole: slice squeezed", ("heart", "whole"))
    intensity: float = option(1.0, "strength of gamma, uneven field, blur, contrast, brightness and noise", high=10)
    cutmix: float = option(0.5, "probability that an unlabelled slice gets a box of another", high=1)
    method: str = option("act", "labelled only; + co-teacher; + teacher; all", ("sup", "mt", "kd", "act"), "networks")
    network: str = option("student", "which is trained; teacher: sup, mt", ("student", "teacher"))
    teacher: tuple = option((6, 64), "depth and base width", low=1, high=4096)
    student: tuple = option((4, 16), "depth and base width", low=1, high=4096)
    teacher_along: bool = option(False, "co-teaching alone, from random weights; the teacher trains in every step")
    teacher_ckpt: tuple = option((), "best.pt of one or more teachers: no teacher stage")
    init: str = option("", "best.pt that the student starts from: no student stage")
    views: int = option(5, "turns over which a teacher's answer is averaged", low=1, high=99)
    rounds: int = option(1, "parts of co-teaching; between them teacher and co-teacher answer anew", low=1)
    ema: float = option(0.99, "decay of the co-teacher", high=1)
    optimizer: str = option("adamw", "weight decay 0.05; or momentum 0.9, weight decay 1e-4", ("adamw", "sgd"))
    lr: float = option(3e-3, "a stage's first; falls as (1 - step / steps) ** 0.9", low=1e-15, high=10)
    dice: str = option("linear", "p + y, foreground; p^2 + y^2, all classes", ("linear", "squared"), "losses")
    distill: str = option("kl", "distance of L_kd", ("kl", "mse"))
    tau: float = option(1.0, "temperature of L_kd", low=0.01, high=1000)
    lambda_kd: float = option(1.0, "weight of L_kd", high=1000)
    consistency: str = option("pseudo", "L_co: Dice + CE on hard labels; of probabilities", ("pseudo", "mse"))
    confidence: float = option(0.9, "pseudo: probability that a pixel needs to count", high=1)
    lambda_co: float = option(1.0, "weight of L_co", high=1000)
    ramp: float = option(0.0, "part of co-teaching over which both weights rise as exp(-5 (1 - t)^2)", high=1)

    def __post_init__(self):
        """Each value of its default's type and within its bounds, from wherever it came: options or a checkpoint."""
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        if self.labeled_batch > self.batch:
            raise DataError(f"--labeled-batch {self.labeled_batch}: must lie between 1 and --batch {self.batch}")
        if self.network == "teacher" and self.method in ("kd", "act"):
            raise DataError(f"--network teacher --method {self.method}: the teacher is trained alone, with sup or mt")
        for key in ("teacher_ckpt", "teacher_along"):
            if getattr(self, key) and self.method not in ("kd", "act"):
                raise DataError(f"{flag(key)}: --method {self.method} has no teacher; kd and act do")
        if self.teacher_ckpt and self.teacher_along:
            raise DataError("--teacher-ckpt and --teacher-along: give one of them")
        if self.rounds > 1 and (self.method != "act" or self.teacher_along):
            raise DataError(f"--rounds {self.rounds}: a co-teacher answers anew, with --method act and cached "
                            "answers")
        for key in ("student", "teacher"):
            depth, base = getattr(self, key)
            if depth > 12 or base * 2**(depth - 1) > 4096:
                raise DataError(f"--{key} {depth} {base}: wider than 4096 channels at its lowest level")


def check_value(f, value):
    """DataError where a value for a field of Config is of another kind than its default, or out of bounds."""
    parts = value if isinstance(value, tuple) else (value,)
    usual = f.default if isinstance(f.default, tuple) else (f.default,)
    if f.default == ():                                                                      # any number of names
        usual = ("",) * len(parts)
    name, shown, bounds = flag(f.name), " ".join(map(str, parts)), f.metadata
    if type(value) is not type(f.default) or [type(v) for v in parts] != [type(v) for v in usual]:
        raise DataError(f"{name} {shown!r}: not of the kind of {f.default!r}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise DataError(f"{name} {shown!r}: choose from {', '.join(bounds['choices'])}")
    if not all(bounds["low"] <= v <= bounds["high"] for v in parts if type(v) in (int, float)):        # NaN fails too
        raise DataError(f"{name} {shown}: must lie between {bounds['low']} and {bounds['high']}")


PRESETS = {
    "paper": dict(view="whole", size=256, optimizer="sgd", lr=0.01, ramp=0.2, dice="squared", distill="mse", tau=20.0,
                  consistency="mse", cutmix=0.0, intensity=0.3, teacher_along=True),
    "cpu": dict(size=128, batch=16, labeled_batch=4, sup_batch=8, iters=16000, stages=(4000, 4000, 8000),
                teacher=(5, 16)),
    "demo": dict(data="data/phantom", labeled=3, size=96, batch=8, labeled_batch=4, sup_batch=8, iters=550,
                 stages=(150, 100, 300), teacher=(4, 12), student=(4, 8), views=1, lr=0.01, ema=0.95, val_every=150,
                 log_every=10),
}
MAY_CHANGE = {"iters", "minutes", "save_minutes", "gpu", "cpu", "data", "table"}                        # on --resume


def shape_of(cfg):
    """Depth and base width of the network that stages 2 and 3 train."""
    return cfg.student if cfg.network == "student" else cfg.teacher


class Stage(NamedTuple):
    number: int               # 1 teacher, 2 student, 3 co-teaching
    start: int                # step of the run at which it begins
    steps: int
    n_rounds: int = 1
    answers: bool = False     # asked of the teachers before each round

    @property
    def end(self):
        return self.start + self.steps

    @property
    def rounds(self):
        """[(first step, step after the last)]"""
        return list(pairwise(self.start + self.steps * i // self.n_rounds for i in range(self.n_rounds + 1)))


def count_steps(cfg):
    """--iters and --stages -> the steps of teacher, student and co-teaching; 0 where the run leaves one out."""
    if cfg.teacher_along:
        return 0, 0, cfg.iters
    present = dict(sup=(0, 1, 0), mt=(0, 1, 1), kd=(1, 1, 1), act=(1, 1, 1))[cfg.method]
    parts = [part * there for part, there in zip(cfg.stages, present, strict=True)]
    if cfg.teacher_ckpt:
        parts[0] = 0
    if cfg.init and cfg.method != "sup":
        parts[1] = 0
    if not any(parts[1:]):                                  # nothing is left for the learner: the method's last stage
        parts[1 if cfg.method == "sup" else 2] = 1
    steps = [max(1, cfg.iters * part // sum(parts)) if part else 0 for part in parts]
    longest = steps.index(max(steps))
    steps[longest] += cfg.iters - sum(steps)                # what rounding left over, or took too much
    if any(part and n < 1 for part, n in zip(parts, steps, strict=True)):
        raise DataError(f"--iters {cfg.iters}: fewer than one step for each of the stages")
    return tuple(steps)


def list_stages(cfg):
    """-> the stages of a run whose --stages are steps, in order."""
    teacher, student, coteaching = cfg.stages
    answers = cfg.method in ("kd", "act") and not cfg.teacher_along
    stages = (Stage(1, 0, teacher), Stage(2, teacher, student),
              Stage(3, teacher + student, coteaching, cfg.rounds, answers))
    return [stage for stage in stages if stage.steps]


# ------------------------------------------------------------------------------------------------------------- step

TERMS = ("loss", "dice", "ce", "kd", "co", "teacher")


class ActNet:
    """The networks of a stage, their optimiser, and one step of training.

    nets: {"student" or "teacher", the learner: ..., "coteacher": its average, "teacher": one that trains along}; the
    last two are not in every stage.
    """

    def __init__(self, cfg, device, stage, nets, noise):
        self.cfg, self.device, self.stage, self.nets, self.noise = cfg, device, stage, nets, noise
        self.learner = next(iter(nets))
        self.along = self.learner != "teacher" and "teacher" in nets
        self.precision = cfg.precision if cfg.precision != "auto" else models.fast_precision(device)
        dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(self.precision)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        if "coteacher" in nets:
            pair = [list(nets[name].state_dict().values()) for name in ("coteacher", self.learner)]
            self.averaged = [[v for v in state if v.is_floating_point()] for state in pair]
            self.copied = [[v for v in state if not v.is_floating_point()] for state in pair]             # counters
        trained = [self.learner] + ["teacher"] * self.along
        parameters = [p for name in trained for p in nets[name].parameters()]
        if cfg.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.05, fused=True)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=cfg.lr, momentum=0.9, weight_decay=1e-4, fused=True)
            for p in parameters:                          # torch's own is uninitialised after a skipped first step
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.wrapped = dict(nets)                                               # what a step calls
        if cfg.compile:                                       # static: the networks differ in their number of rows
            self.wrapped = {name: torch.compile(net, dynamic=False) for name, net in nets.items()}
        if world()[1] > 1:
            self.wrapped |= {name: distributed.parallel(self.wrapped[name], device, dtype) for name in trained}

    def step(self, step, x, y, answers, rng, mark=lambda part: None):
        """One step -> TERMS (6,) float on the device. Waits for nothing; `mark` is told when a part's work has been
        issued. As Slices.batches gives them: x (B, 1, S, S), y (L, S, S) uint8 of its first L slices, answers
        (B, C, S, S) logits or None, rng."""
        cfg, n_labeled, passed = self.cfg, len(y), step - self.stage.start
        coteacher, pseudo = self.wrapped.get("coteacher"), cfg.consistency == "pseudo"
        ramp = self.schedule(passed)

        # One geometry for all networks, an intensity of its own for each: hard pictures for those who learn, mild
        # ones for those who answer. The student's are mixed (CutMix); the others see whole slices, and their answers
        # are mixed. Of several processes each takes every world-th row.
        for_coteacher = x[:0]
        if coteacher is not None:
            for_coteacher = x[n_labeled:] if pseudo else x                   # hard labels only where there are none
        hard, mild = cfg.intensity, cfg.intensity / 4
        views = [(x, hard), (for_coteacher, mild)]
        if self.along:
            views += [(x[:n_labeled], hard), (x[n_labeled:], mild)]
        x_s, x_c, *x_along = augment.perturb_each(views, rng, self.noise)
        boxes = augment.boxes(len(x) - n_labeled, cfg.size, cfg.cutmix, rng, self.device)
        x_s = augment.mix(x_s, boxes)
        x_s, x_c, *x_along = map(own_rows, (x_s, x_c, *x_along))
        mark("data")

        c, t_seg, t = None, None, answers
        with self.autocast:
            s = gather(self.wrapped[self.learner](x_s))                                     # (B, C, S, S) logits
            mark("student")
            if len(x_c):
                with torch.no_grad():
                    c = augment.mix(gather(coteacher(x_c)), boxes)                          # (B or B - L, C, S, S)
            mark("coteacher")
            if self.along:
                t_seg, t = self.teach(*x_along)
            if t is not None:
                t = augment.mix(t, boxes)
        mark("teacher")

        dice_kind = dict(squared=cfg.dice == "squared", include_background=cfg.dice == "squared")
        w_kd, w_co = ramp * cfg.lambda_kd, ramp * cfg.lambda_co
        expected = None if self.scaler.is_enabled() else (1.0, 1.0, w_kd, w_co)
        dice, ce, kd, co = student_loss(s, y, t, None if pseudo else c, tau=cfg.tau, distill=cfg.distill,
                                        expected_grads=expected, **dice_kind)
        if c is not None and pseudo:
            said = [c]
            if answers is not None:                                             # a teacher along lags behind c
                said.append(t[n_labeled:])
            sure, labels = torch.stack([a.float().softmax(1) for a in said]).mean(0).max(1)      # (B - L, S, S)
            labels = labels.masked_fill(sure < cfg.confidence, -100)                             # ignored by dice_ce
            co = sum(dice_ce(s[n_labeled:], labels, **dice_kind), co)           # co is 0: its gradient is as expected
        loss = dice + ce + w_kd * kd + w_co * co                                                       # L_stu
        teacher_seg = sum(dice_ce(t_seg, y, **dice_kind)) if self.along else s.new_zeros(())           # its own L_seg
        mark("loss")

        self.optimizer.zero_grad(set_to_none=True)
        total = loss + teacher_seg if self.along else loss
        self.scaler.scale(total).backward()
        mark("backward")
        self.scaler.step(self.optimizer)                       # fp16: leaves the weights where a gradient is infinite
        self.scaler.update()
        mark("optimizer")
        if coteacher is not None:
            decay = min(cfg.ema, passed / (passed + 1))         # a mean of the first steps; skipped steps count too
            get_ema_multi_avg_fn(decay)(*self.averaged, None)
            torch._foreach_copy_(*self.copied)
        mark("ema")
        return torch.stack((loss, dice, ce, kd, co, teacher_seg)).detach()

    def schedule(self, passed):
        """The learning rate after so many of the stage's steps -> how far the weights of L_kd and L_co have risen."""
        cfg, steps = self.cfg, self.stage.steps
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * max(0, 1 - passed / steps) ** 0.9
        risen = min(1, passed / max(1, cfg.ramp * steps)) if cfg.ramp else 1
        return math.exp(-5 * (1 - risen) ** 2)

    def teach(self, x_l, x_t):
        """A teacher that trains along: logits (L, C, S, S) of the labelled slices, to learn from, and (B, C, S, S) of
        all, detached. x_l, x_t: this process' rows."""
        teacher, answers = self.wrapped["teacher"], []
        if len(x_t):
            self.nets["teacher"].eval()
            with torch.no_grad():
                answers = [gather(getattr(teacher, "module", teacher)(x_t))]                  # inside DDP, if it is
        self.nets["teacher"].train()
        t_seg = gather(teacher(x_l))
        return t_seg, torch.cat([t_seg.detach(), *answers])


# -------------------------------------------------------------------------------------------------------------- run

COLUMNS = ("step", "stage", "seconds", "lr", "slices_per_s", *TERMS, "val_teacher", "val_student", "val_coteacher")


def prepare(cfg, threads=None):
    """The checks of a run before anything is written -> its device and slices; `threads`: of a resumed run."""
    gpu = None if cfg.cpu else distributed.local_gpu()
    if gpu is None and cfg.gpu >= 0:
        gpu = cfg.gpu
    device = pick_device(gpu, cfg.cpu, threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # what has no tensor to go by: events, pinned memory, bf16?
    trained = {cfg.network}
    if cfg.stages[0] or cfg.teacher_along:
        trained.add("teacher")
    for key in sorted(trained):
        depth, base = getattr(cfg, key)
        if cfg.size < 2**depth:                                 # batch norm would meet a single pixel
            raise DataError(f"--{key} {depth} {base}: needs --size {2**depth} at least, not {cfg.size}")
    size = world()[1]
    if cfg.batch % size or cfg.labeled_batch % size or cfg.sup_batch % size:
        raise DataError(f"--batch {cfg.batch} --labeled-batch {cfg.labeled_batch} --sup-batch {cfg.sup_batch}: "
                        f"{size} processes want multiples")
    torch.backends.cudnn.benchmark = not cfg.deterministic
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # warn_only: max-pooling's backward is called non-deterministic, but our windows do not overlap.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False          # it would write NaN there, for nothing
    return device, Slices(cfg, device)


def describe_commit():
    done = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, text=True,
                          capture_output=True)                                  # shell: nothing where git is absent
    return done.stdout.strip() or "unknown"


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


def keep_log_until(path, step):
    """Drop the rows past the checkpoint that the run resumes from, and whatever is not a row."""
    kept = [",".join(COLUMNS)]
    for row in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            values = [float(v or 0) for v in row.split(",")]
            if len(values) == len(COLUMNS) and values[0] <= step:
                kept.append(row)
    data_prep.write_atomic(path, "\n".join([*kept, ""]).encode())


@contextmanager
def heed_signals():
    """-> list of the signals that asked to stop; a second one stops at once, without saving."""
    signals = []

    def on_signal(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(signal.Signals(number).name)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """What the stages of a run share: slices and val, the clock, the best on val, and the folder, which receives

        config.json, start.pt (--init), teacher*.pt (--teacher-ckpt)    before the first step
        log.csv                                                         every --log-every steps
        teacher.pt in stage 1, then best.pt                             at a validation that is better
        last.pt, the one before it as previous.pt; curves.png           a round's end, a stop, --save-minutes later
        start.pt; renewal-ROUND.pt                                      as stage 3 begins; as its next round begins
        student.pt, summary.json, a row of --table                      at the end
    """

    def __init__(self, cfg, resume):
        self.cfg, self.folder, self.main = cfg, Path(cfg.out), world()[0] == 0
        self.stages, self.resumed = list_stages(cfg), resume is not None
        self.device, self.slices = prepare(cfg, resume.get("threads") if resume else None)
        self.volumes, self.digest = read_val(cfg.data), fingerprint(cfg.data)
        # In the folder: the teacher of stage 1, or copies of --teacher-ckpt.
        self.teachers = ["teacher.pt", *(f"teacher-{i}.pt" for i in range(2, len(cfg.teacher_ckpt) + 1))]
        if resume and resume.get("data") != self.digest:
            raise DataError(f"--data {cfg.data}: not the slices and volumes that {cfg.out} began with; give those")
        # A little more than was trained on: holds every heart but the largest; far more costs a point of Dice.
        self.inference = dict(view=cfg.view, size=cfg.size * 9 // 8 if cfg.view == "heart" else cfg.size)
        shapes = [cfg.teacher]
        if cfg.teacher_ckpt:
            files = [self.folder / name for name in self.teachers] if resume else cfg.teacher_ckpt
            found = [load_teacher(file, cfg)[0].architecture for file in files]
            shapes = [(a["depth"], a["base"]) for a in found]
        # FLOP of the teachers' answer about one slice, near enough.
        self.answer_cost = cfg.views * sum(slice_cost(shape, self.inference["size"]) for shape in shapes)
        state = resume or dict(step=0, seconds=0.0, best={}, scores={})
        self.start_step = self.done = state["step"]
        self.seconds = state["seconds"]
        self.best = state["best"]                                        # of "teacher" and of the learner, as kept
        self.scores = state["scores"]                                    # of the last validation
        self.began = self.saved = time.perf_counter()
        self.bar, self.signals, self.entered = None, [], None             # entered: the ActNet of a resumed stage
        if resume:                                           # a state that does not fit is refused before a step
            now = next((stage for stage in self.stages if self.done < stage.end), None)
            self.entered = self.enter(now, resume) if now else None
            resume.clear()                                                # gigabytes, perhaps; the callers hold it too
        else:
            self.check_start()
        self.total = self.cost(cfg.iters)
        if self.main:
            self.open_folder()

    def check_start(self):
        """Whether the device and the start that was given suit a run that begins."""
        cfg = self.cfg
        if cfg.precision == "bf16" and not models.bf16_pays(self.device):
            raise DataError(f"--precision bf16: this device only emulates it; "
                            f"{models.fast_precision(self.device)} is what --precision auto takes here")
        if cfg.table and Path(cfg.table).is_dir():
            raise DataError(f"--table {cfg.table}: is a folder; name a CSV file")
        if cfg.init:
            self.load_learner(cfg.init)

    def load_learner(self, path):
        """-> the weights of a checkpoint that the learner goes on from."""
        net = load_model(path)[0]
        with torch.device("meta"):
            wanted = UNet(*shape_of(self.cfg)).architecture
        if net.architecture != wanted:
            raise DataError(f"{path}: holds {net.architecture}, which does not fit {wanted} (--init, --student)")
        return net.state_dict()

    def describe(self):
        """What config.json tells of the run."""
        about = dict(
            config=asdict(self.cfg), command=shlex.join(["python", *sys.argv]), commit=describe_commit(),
            device=models.describe_device(self.device),
            versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                          triton=getattr(sys.modules.get("triton"), "__version__", "")),
            labeled_patients=self.slices.patients, labeled_slices=self.slices.n_labeled,
            slices=len(self.slices.names))
        if self.resumed:
            with suppress(OSError, ValueError, KeyError, TypeError):                       # damaged: the resume alone
                first = json.loads((self.folder / "config.json").read_bytes())["command"]
                about["command"] = f"{first} && {about['command']}"
        return about

    def open_folder(self):
        cfg, self.about = self.cfg, self.describe()
        data_prep.write_atomic(self.folder / "config.json", (json.dumps(self.about, indent=1) + "\n").encode())
        if not self.resumed:                                           # copies: a resumed run needs no other file
            copies = dict(zip(self.teachers, cfg.teacher_ckpt, strict=False))
            if cfg.init:
                copies["start.pt"] = cfg.init
            else:
                (self.folder / "start.pt").unlink(missing_ok=True)     # of a run that died before it had a checkpoint
            for name, path in copies.items():
                data_prep.write_atomic(self.folder / name, Path(path).read_bytes())
        (self.folder / "summary.json").unlink(missing_ok=True)
        keep_log_until(self.folder / "log.csv", self.done)
        names = {1: "teacher", 2: cfg.network, 3: "co-teaching"}
        steps = ", ".join(f"{names[s.number]} {s.steps}" for s in self.stages)
        print(f"{cfg.out}: {cfg.method}, {len(self.slices.patients)} labelled patients ({self.slices.n_labeled} of "
              f"{len(self.slices.names)} slices, cache {self.slices.cache}), steps: {steps}, "
              f"{self.about['device']}", flush=True)

    # ---- the stages

    def networks(self, stage):
        """-> the stage's networks by name, the learner first, as they are at its first step."""
        cfg, layout = self.cfg, dict(memory_format=torch.channels_last)
        torch.manual_seed(cfg.seed)
        if stage.number == 1:
            return dict(teacher=UNet(*cfg.teacher).to(self.device, **layout))
        learner = UNet(*shape_of(cfg)).to(self.device, **layout)
        if (stage.number == 3 or cfg.init) and (self.folder / "start.pt").exists():
            learner.load_state_dict(self.load_learner(self.folder / "start.pt"))
        nets = {cfg.network: learner}
        if stage.number == 3 and cfg.method in ("mt", "act"):
            nets["coteacher"] = deepcopy(learner).eval().requires_grad_(False)
        if cfg.teacher_along:
            nets["teacher"] = UNet(*cfg.teacher).to(self.device, **layout)
        return nets

    def enter(self, stage, resume=None):
        """-> the stage's ActNet, as the run's step left it or as the stage begins: stage 3 from stage 2's best on
        val, which is kept apart, since stage 3 finds better ones."""
        start = self.folder / "start.pt"
        follows = stage.number == 3 and any(s.number == 2 for s in self.stages)
        if self.main and follows and not start.exists():
            data_prep.write_atomic(start, (self.folder / "best.pt").read_bytes())
        distributed.barrier()                                                # what the first process wrote is there
        actnet = ActNet(self.cfg, self.device, stage, self.networks(stage), self.slices.noise)
        if resume and self.done > stage.start:
            models.restore(resume, actnet.nets, actnet.optimizer, self.cfg.out, actnet.scaler)
        return actnet

    def learn(self, stage):
        """The steps of a stage, from the run's step on. Returns whether it came to its end."""
        actnet = self.entered or self.enter(stage)
        self.entered = None
        self.slices.begin(stage)
        for i, (begin, end) in enumerate(stage.rounds, 1):
            if self.done >= end:
                continue
            if stage.answers and not self.collect_answers(actnet, i, begin):
                return False
            if not self.train_until(actnet, end):
                return False
        return True

    def collect_answers(self, actnet, i, begin):
        """Ask the teachers, from the second round on with the co-teacher, about every slice. Returns False where the
        run was asked to stop: what was asked is asked again, the last checkpoint holds the rest."""
        cfg, slices, renewal = self.cfg, self.slices, self.folder / f"renewal-{i}.pt"
        if self.main and self.done == 0:
            self.save(actnet)                                                     # so that a run stopped here goes on
        nets = [load_teacher(self.folder / name, cfg) for name in self.teachers]
        if i > 1:
            if self.main and self.done == begin:
                save_checkpoint(renewal, self.content({"coteacher": actnet.nets["coteacher"]}))
            distributed.barrier()
            nets.append((load_model(renewal)[0], self.inference))
        nets = [(n.to(self.device, memory_format=torch.channels_last), inference) for n, inference in nets]
        slices.make_room(self.folder)
        for first in range(0, len(slices.names), 16):
            if self.stopping():
                return False
            index = range(first, min(first + 16, len(slices.names)))
            with actnet.autocast:
                slices.answer(nets, index)
            self.bar.update(len(index) * self.answer_cost)
            self.bar.set_postfix_str(f"answers {index.stop} of {len(slices.names)}")
        return True

    def stopping(self):
        """Whether a signal, --minutes or one of the other processes asks to stop."""
        late = 0 < 60 * self.cfg.minutes < time.perf_counter() - self.began
        return distributed.any_of(bool(self.signals) or late, self.device)

    def train_until(self, actnet, end):
        """Steps of the stage up to `end`. Returns False where the run was asked to stop, and has saved."""
        cfg, stage, history, alone = self.cfg, actnet.stage, [], world()[1] == 1
        cost, since, began = step_cost(cfg, stage), self.done, time.perf_counter()        # of the row to come
        for step, batch in enumerate(self.slices.batches(self.done, end), self.done):
            history.append(actnet.step(step, *batch))
            self.done = step + 1
            self.bar.update(cost)
            if self.done == self.start_step + 8:
                self.estimate()
            validates = self.done % cfg.val_every == 0 or self.done == end
            due = validates or self.done % cfg.log_every == 0
            if len(history) % 20 == 0 and not due:                                    # found at most 20 steps late
                self.finite(actnet, history)
            stop = (alone or due) and self.stopping()                    # several processes vote, and wait for it
            if not (due or stop):
                continue
            unsaved = (time.perf_counter() - self.saved) / 60                                             # minutes
            saves = self.done == end or stop or (validates and unsaved > cfg.save_minutes)

            # Everything below waits for the device; above only the look at the terms, every 20 steps, does.
            terms, history = self.finite(actnet, history, weights=saves or validates), []
            seconds = time.perf_counter() - began
            self.seconds += seconds
            slices = (self.done - since) * (cfg.sup_batch if stage.number < 3 else cfg.batch)
            row = dict(zip(TERMS, terms.mean(0).round(6), strict=True), step=self.done, stage=stage.number,
                       seconds=round(self.seconds, 1), lr=round(actnet.optimizer.param_groups[0]["lr"], 8),
                       slices_per_s=round(slices / seconds, 1))
            if self.main:
                if validates:
                    row |= self.validate(actnet)
                append_row(self.folder / "log.csv", {column: row.get(column, "") for column in COLUMNS})
                if saves:
                    self.save(actnet)
                    evaluate.draw_curves(self.folder / "log.csv", self.folder / "curves.png")
                self.tell(actnet, row)
            if stop and self.done < cfg.iters:
                return False
            since, began = self.done, time.perf_counter()
        return True

    # ---- looking at it

    def finite(self, actnet, history, weights=False):
        """The last steps' terms (steps, 6), of which none is NaN or infinite, nor, if asked, one of the weights: a
        loss may be finite and its gradient not. Waits for the device."""
        terms = torch.stack(history).cpu().numpy()
        for i in np.flatnonzero(~np.isfinite(terms).all(1))[:1]:
            said = ", ".join(f"{k} {v:.3g}" for k, v in zip(TERMS, terms[i], strict=True))
            self.refuse(self.done - len(terms) + int(i), said)
        if actnet.scaler.get_scale() < 1:                                 # halved by each skipped step, from 65536 on
            self.refuse(self.done - 1, "fp16: steps are skipped, their gradients infinite at any scale of the loss")
        for name, network in actnet.nets.items():
            if weights and not all(v.isfinite().all() for v in network.state_dict().values()):
                self.refuse(self.done - 1, f"the {name}'s weights are no longer finite")
        return terms

    def refuse(self, step, problem):
        names = " ".join(self.slices.names[i] for i in self.slices.indices(step)[0])
        raise DataError(f"step {step}: {problem}; slices {names}; the checkpoint before it, if any, is in "
                        f"{self.folder}; a lower --lr or --precision fp32 may help")

    def estimate(self):
        """On a CPU: how long it will take, after the first steps."""
        if self.device.type != "cpu" or not self.main:
            return
        done, left = self.bar.n - self.bar.initial, self.bar.total - self.bar.n                            # FLOP
        minutes = left / done * (time.perf_counter() - self.began) / 60
        smaller = minutes > 60 and self.cfg.teacher > PRESETS["cpu"]["teacher"]
        self.bar.write(f"about {minutes:.0f} minutes on this CPU{'; --preset cpu is smaller' if smaller else ''}")

    def tell(self, actnet, row):
        best = self.best.get(actnet.learner)
        val = f", best val {best['score']:.4f}" if best else ""
        self.bar.set_postfix_str(f"stage {row['stage']}, step {row['step']}, loss {row['loss']:.3f}{val}, "
                                 f"{row['slices_per_s']:.0f} slices/s")

    def validate(self, actnet):
        """Score the stage's networks on val, keep the best -> the row's columns."""
        kept = {name: net for name, net in actnet.nets.items() if name != "teacher" or not actnet.along}
        scored = actnet.nets if self.done == self.cfg.iters else kept     # a teacher along: told of at the end
        searches = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False                            # a search does not pay for val's shapes
        self.scores = {name: evaluate.validate(net, self.volumes, self.inference) for name, net in scored.items()}
        torch.backends.cudnn.benchmark = searches
        means = {name: float(np.mean(self.scores[name]["dice"])) for name in kept}
        better = max(means, key=means.get)
        before = self.best.get(actnet.learner)
        if before is None or means[better] > before["score"]:
            scores = {name: self.scores[name] for name in kept}
            self.best[actnet.learner] = dict(step=self.done, score=means[better], better=better, scores=scores)
            content = self.content(kept) | dict(
                better=better, val={name: s["dice"] for name, s in scores.items()}, entropy=scores[better]["entropy"])
            save_checkpoint(self.folder / ("teacher.pt" if actnet.stage.number == 1 else "best.pt"), content)
        return {f"val_{name}": round(score, 5) for name, score in means.items()}

    def content(self, nets):
        """What every checkpoint of the run holds."""
        first = next(iter(nets))
        return dict(networks={name: net.state_dict() for name, net in nets.items()}, better=first, step=self.done,
                    architecture=nets[first].architecture, inference=self.inference, config=asdict(self.cfg))

    def save(self, actnet):
        save_checkpoint(self.folder / "last.pt", self.content(actnet.nets) | dict(
            optimizer=actnet.optimizer.state_dict(), scaler=actnet.scaler.state_dict(), seconds=self.seconds,
            best=self.best, scores=self.scores, data=self.digest, threads=torch.get_num_threads(),
        ), previous=self.folder / "previous.pt")
        self.saved = time.perf_counter()

    def finish(self):
        """student.pt; the val scores of the last networks and of the best: on the screen, summary.json, --table."""
        cfg, best = self.cfg, self.best[self.cfg.network]
        kept = load_checkpoint(self.folder / "best.pt")
        better = kept["better"]                   # the file's word: after a kill a run may not find it again elsewhere
        half = {k: v.half() if v.is_floating_point() else v for k, v in kept["networks"][better].items()}
        small = self.folder / f"{cfg.network}.pt"                         # to give away: one network, in fp16
        save_checkpoint(small, {**kept, "networks": {better: half}})
        rows = [(name, "last", self.done, scores) for name, scores in self.scores.items()]
        for best_of in self.best.values():
            rows += [(name, "best", best_of["step"], scores) for name, scores in best_of["scores"].items()]
        print(evaluate.validation_table(rows))
        for row in rows if cfg.table else ():
            append_row(Path(cfg.table), self.table_row(*row))
        summary = dict(last={name: scores["dice"] for name, scores in self.scores.items()}, best=best,
                       teacher=self.best.get("teacher"), seconds=round(self.seconds, 1))
        data_prep.write_atomic(self.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        print(f"kept: the {better} of step {kept['step']} in {self.folder / 'best.pt'}, alone and in fp16 in "
              f"{small.name}; next: python evaluate.py {self.folder / 'best.pt'} --data {cfg.data}")

    def table_row(self, name, when, step, scores):
        """A row of --table: val scores of one network."""
        cfg, about, columns = self.cfg, self.about, {}
        for metric, values in (("dice", scores["dice"]), ("hd95", scores["hd95_voxel"])):
            for c, v in zip((*data_prep.CLASSES, "mean"), (*values, np.mean(values)), strict=True):
                columns[f"{metric}_{c}"] = round(float(v), 4)
        with torch.device("meta"):
            parameters = count_parameters(UNet(*(cfg.teacher if name == "teacher" else shape_of(cfg))))
        return dict(date=time.strftime("%Y-%m-%d"), commit=about["commit"], device=about["device"],
                    seconds=round(self.seconds, 1), seed=cfg.seed, labeled=cfg.labeled, method=cfg.method,
                    network=name, parameters=parameters, when=when, step=step, **columns, command=about["command"])

    def cost(self, until):
        """FLOP of the run's steps and answers up to the step `until`."""
        cost = 0
        for stage in self.stages:
            cost += step_cost(self.cfg, stage) * min(stage.steps, max(0, until - stage.start))
            if stage.answers:
                rounds = sum(end <= until for _, end in stage.rounds)
                cost += rounds * len(self.slices.names) * self.answer_cost
        return cost


def slice_cost(shape, size):
    """FLOP of one slice's forward pass, convolutions only, two per multiply-accumulate."""
    with torch.device("meta"):
        return 2 * models.count_macs(UNet(*shape), size)


def step_cost(cfg, stage):
    """FLOP of a step: forward 1, forward and backward 3."""
    own, teacher = slice_cost(shape_of(cfg), cfg.size), slice_cost(cfg.teacher, cfg.size)
    if stage.number < 3:
        return 3 * cfg.sup_batch * (own if stage.number == 2 else teacher)
    cost, unlabeled = 3 * cfg.batch * own, cfg.batch - cfg.labeled_batch
    if cfg.method in ("mt", "act"):
        cost += (unlabeled if cfg.consistency == "pseudo" else cfg.batch) * own
    if cfg.teacher_along:                                                  # learns from some, is asked about the others
        cost += (3 * cfg.labeled_batch + unlabeled) * teacher
    return cost


def train(cfg, resume=None):
    """One run: the teacher from the labels, the student from the labels, co-teaching. Returns its folder."""
    run = Run(cfg, resume)
    style = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"            # in FLOP: steps of the stages differ
    with heed_signals() as run.signals, tqdm(
            total=run.total, initial=run.cost(run.done), dynamic_ncols=True, disable=not run.main, bar_format=style,
            mininterval=1 if sys.stderr.isatty() else 30) as run.bar:
        ended = all(run.learn(stage) for stage in run.stages if run.done < stage.end)
    if run.main and not ended:
        print(f"stopped at step {run.done} ({run.signals[0] if run.signals else '--minutes'}); "
              f"go on with: python train_actnet.py --resume {shlex.quote(cfg.out)}")
    elif run.main:
        run.finish()
    return run.folder


# ------------------------------------------------------------------------------------------------------------- main

def parse(argv):
    parser = data_prep.Parser(
        description=__doc__.splitlines()[0], usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        add_help=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=118))
    group = parser.add_argument_group("run")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    group.add_argument("--preset", choices=("paper", "cpu"),
                       help="paper: the field's protocol, the paper's distances and figure; cpu: made for two cores")
    group.add_argument("--demo", action="store_true", help="train and evaluate on synthetic hearts")
    group.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    group.add_argument("--bench", action="store_true", help=argparse.SUPPRESS)         # moved; the error tells where
    for f in fields(Config):
        if f.metadata["group"] not in (None, "run"):
            group = parser.add_argument_group(f.metadata["group"])
        add_option(group, f)
    format_help = parser.format_help
    parser.format_help = lambda: format_help().replace("\n\n", "\n")                           # it fits a screen
    given = vars(parser.parse_args(argv))
    if given.pop("bench", False):
        parser.error("python -m tests.bench_step times a step")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def add_option(group, f):
    """A field of Config as an option."""
    default = f.default
    if isinstance(default, bool):
        kind = dict(action="store_true")
    elif default == ():
        kind = dict(nargs="+", metavar="FILE")
    elif isinstance(default, tuple):
        names = ("DEPTH", "BASE") if len(default) == 2 else ("T", "S", "C")
        kind = dict(type=int, nargs=len(names), metavar=names)
    else:
        metavar = {int: "N", float: "X"}.get(type(default))
        kind = dict(type=type(default), choices=f.metadata["choices"], metavar=metavar)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    told = f.name == "seed" or default not in ("", -1, False, 0.0, ())
    group.add_argument(flag(f.name), help=f.metadata["help"] + f" [{shown}]" * told, **kind)


def resolve(given):
    """Command-line options -> (Config, checkpoint to resume from or None): defaults < preset < given."""
    given = dict(given)
    preset, demo, folder = given.pop("preset", None), given.pop("demo", False), given.pop("resume", None)
    if demo and preset:
        raise DataError("--demo and --preset: give one of them")
    if given.get("cpu") and "gpu" in given:
        raise DataError("--cpu and --gpu: give one of them")
    if folder is not None:
        if preset or demo:
            raise DataError(f"--resume {folder}: --{'preset' if preset else 'demo'} may not change within a run")
        return resolve_resumed(given, folder)
    usual = dict(PRESETS.get("demo" if demo else preset, {}))
    if given.get("method") in ("sup", "mt") or given.get("teacher_ckpt"):        # --preset paper, no teacher along
        usual.pop("teacher_along", None)
    if "batch" in given:                                       # what is not given keeps its proportion to --batch
        before = Config(**usual)
        if given.get("method", before.method) == "sup":        # whose one stage --batch then means
            given.setdefault("sup_batch", given["batch"])
        for key in ("labeled_batch", "sup_batch"):
            given.setdefault(key, max(1, given["batch"] * getattr(before, key) // before.batch))
    cfg = Config(**{**usual, **given})
    if cfg.teacher_along and "stages" in given:
        raise DataError("--stages: with --teacher-along (--preset paper) co-teaching is the only stage")
    cfg = replace(cfg, stages=count_steps(cfg))                              # from here on steps, no longer parts
    if cfg.rounds > max(1, cfg.stages[2]):
        raise DataError(f"--rounds {cfg.rounds}: co-teaching has {cfg.stages[2]} steps")
    if list_stages(cfg)[-1].answers and not (cfg.stages[0] or cfg.teacher_ckpt):
        raise DataError("--stages: no teacher stage, and no --teacher-ckpt to answer in its place")
    if not cfg.out:
        base = f"runs/{'demo-' if demo else ''}{cfg.method}-{cfg.labeled}-seed{cfg.seed}"
        names = [base] + [f"{base}-{i}" for i in range(2, 1000)]
        cfg = replace(cfg, out=next(name for name in names if not Path(name).exists()))
    elif any((Path(cfg.out) / name).exists() for name in ("last.pt", "previous.pt", "summary.json")):
        raise DataError(f"--out {cfg.out}: holds a run already; choose another, or --resume {cfg.out} goes on with it")
    return cfg, None


def resolve_resumed(given, folder):
    """--resume FOLDER and what was given beside it -> (Config, its last checkpoint); nothing is written before."""
    resume = models.load_last(Path(folder))
    saved = resume["config"] | {"out": folder}
    unknown = saved.keys() ^ {f.name for f in fields(Config)}
    if unknown:
        raise DataError(f"--resume {folder}: {sorted(map(str, unknown))[0]} of its config is not of this version")
    changed = [key for key, value in given.items() if key not in MAY_CHANGE and saved[key] != value]
    if changed:
        raise DataError(f"--resume {folder}: {flag(changed[0])} may not change within a run")
    if "gpu" in given:
        given["cpu"] = False
    elif "cpu" in given:
        given["gpu"] = -1
    before = Config(**saved)
    cfg = replace(before, **given)
    if sum(before.stages) != before.iters:
        raise DataError(f"--resume {folder}: its stages do not add up to its --iters {before.iters}")
    if cfg.iters < before.iters:
        raise DataError(f"--iters {cfg.iters}: the run has {before.iters}, and can only be made longer")
    done = resume["step"]
    if done > cfg.iters or (done == cfg.iters and Path(folder, "summary.json").exists()):
        raise DataError(f"--resume {folder}: is at step {done}; a larger --iters goes on")
    steps = list(before.stages)
    steps[list_stages(before)[-1].number - 1] += cfg.iters - before.iters               # more steps lengthen the last
    return replace(cfg, stages=tuple(steps)), resume


REMEDIES = {                                                      # by what an error of torch or triton says of itself
    "c compiler": "Triton builds its launcher on first use: install gcc, or set CC",
    "calledprocesserror": "Triton could not build its launcher: install python3-dev",
    "dataloader worker": "a reader of slices died: --cache ram, or a larger /dev/shm",
}


def run_once(given):
    """What the command line asks for -> exit code."""
    rank, folder, demo = world()[0], given.get("resume"), given.get("demo")
    if "gpu" in given and world()[1] > 1:
        raise DataError(f"--gpu {given['gpu']}: torchrun gives each process one; choose by CUDA_VISIBLE_DEVICES")
    with ExitStack() as held:
        if folder is not None and rank == 0:
            held.enter_context(data_prep.locked_folder(Path(folder)))                           # before it is read
        cfg, resume = resolve(given)
        if demo and rank == 0 and not (Path(cfg.data) / "manifest.json").exists():
            code = phantom.prepare_demo(cfg.data)
            if code:
                return code
        cfg = replace(cfg, out=distributed.shared(cfg.out))
        if folder is None and rank == 0:
            held.enter_context(data_prep.locked_folder(Path(cfg.out)))
        try:
            run = train(cfg, resume)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            said = f"{type(error).__name__} {error}".lower()
            remedy = next((r for mark, r in REMEDIES.items() if mark in said), None)
            if remedy is None:                                                         # an illegal memory access, say
                raise
            raise DataError(f"{remedy} ({data_prep.one_line(error)})") from None
    distributed.barrier()                                                                        # nobody leaves early
    if demo and rank == 0 and (run / "summary.json").exists():                                   # not stopped before
        where = ["--cpu"] if cfg.cpu else []
        if cfg.gpu >= 0:                                                                         # never beside --cpu
            where = ["--gpu", str(cfg.gpu)]
        return evaluate.main([str(run / "best.pt"), "--data", cfg.data, "--out", str(run / "test"), *where])
    return 0


def main(argv=None):
    given = parse(argv)
    # Until the loop, which saves first, SIGTERM is what Ctrl-C is: one line.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work():
        try:
            distributed.start()
            return run_once(given)
        except (DataError, models.CheckpointError, OSError):
            if world()[0] > 0:                                                       # told by the first process
                return 2
            raise
    try:
        return data_prep.exit_code(
            "train_actnet.py", work, (models.CheckpointError, models.DeviceError),
            interrupted="not saved; --resume goes on from the last checkpoint, if there is one",
            memory="a smaller --batch, --size or --teacher needs less")
    finally:
        signal.signal(signal.SIGTERM, handler)
        distributed.stop()


if __name__ == "__main__":
    distributed.leave(main())

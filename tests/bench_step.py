"""What a training step costs and where it goes; and our loop beside one written the way this field writes it.

    python -m tests.bench_step --labeled 7 --gpu 0                         # each stage -> a row of results/step.csv
    python -m tests.bench_step --labeled 7 --cpu --preset cpu --steps 20 --beside

Options are those of train_actnet.py, with --steps N (50; of a round beside 8), --csv FILE and --beside: the two loops
in turns, same networks, batch, size and losses. The field's loop: one HDF5 file read per slice and step, turned and
resized by scipy in two worker processes, fp32, NCHW, losses of plain torch one by one, the moving average parameter by
parameter, the teacher along in every step, three waits for the device a step.
"""
import argparse
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

import data_prep
import models
import train_actnet
from models import UNet
from train_actnet import ActNet, list_stages, prepare, step_cost

PARTS = ("data", "student", "coteacher", "teacher", "loss", "backward", "optimizer", "ema")


class Clock:
    """Seconds between marks by part; CUDA events on a GPU, so that marking waits for nothing."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []
        self("")

    def __call__(self, part):
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((part, now))

    def seconds(self):
        if self.cuda:
            torch.cuda.synchronize()
        spans = {}
        for (_, a), (part, b) in zip(self.marks, self.marks[1:], strict=False):
            spans.setdefault(part, []).append(a.elapsed_time(b) / 1000 if self.cuda else b - a)
        return {part: np.array(s) for part, s in spans.items()}


def matrix_rate(device):
    """FLOP/s of a large matrix product in what is trained in (or fp32, where that is faster): the floor of a step."""
    rates, fast = [], dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[models.fast_precision(device)]
    for dtype in {torch.float32, fast}:
        n = 8192 if device.type == "cuda" else 2048
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        clock = Clock(device)
        for _ in range(8):
            a @ b
            clock("product")
        rates.append(2 * n**3 / np.median(clock.seconds()["product"][2:]))
    return max(rates)


def begin(cfg, device, slices, stage):
    """-> the stage's ActNet from random weights; where the run would hold a teacher's answers, random ones."""
    nets, learner = {}, "teacher" if stage.number == 1 else cfg.network
    names = [learner] + ["coteacher"] * (stage.number == 3 and cfg.method in ("mt", "act"))
    for name in names + ["teacher"] * cfg.teacher_along:
        shape = getattr(cfg, learner if name == "coteacher" else name)
        nets[name] = UNet(*shape).to(device, memory_format=torch.channels_last)
    if "coteacher" in nets:
        nets["coteacher"].eval().requires_grad_(False)
    slices.begin(stage)
    if stage.number == 3 and cfg.method in ("kd", "act") and not cfg.teacher_along:
        slices.make_room(Path.cwd())
        slices.answers.random_(0, 85)                                                        # three of them below 255
    return ActNet(cfg, device, stage, nets, slices.noise)


def time_stage(cfg, device, slices, stage, steps, rate):
    """-> a row for results/step.csv."""
    actnet = begin(cfg, device, slices, stage)
    warm = 10 if device.type == "cuda" else 3
    batches = slices.batches(stage.start, stage.start + warm + steps)
    for step in range(stage.start, stage.start + warm):
        actnet.step(step, *next(batches))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    for step, batch in enumerate(batches, stage.start + warm):
        clock("data")
        actnet.step(step, *batch, mark=clock)
    spans = clock.seconds()
    spans["data"] = spans["data"].reshape(steps, 2).sum(1)                                # drawn, then perturbed
    total = sum(spans.values())
    p20, p50, p80 = 1000 * np.quantile(total, (0.2, 0.5, 0.8))
    peak = torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else ""
    flop, n = step_cost(cfg, stage), cfg.batch if stage.number == 3 else cfg.sup_batch
    row = dict(
        date=time.strftime("%Y-%m-%d"), commit=train_actnet.describe_commit(), device=models.describe_device(device),
        processes=1, torch=torch.__version__, precision=actnet.precision, compile=cfg.compile,
        cache=slices.cache, view=cfg.view, method=cfg.method, stage=stage.number, along=cfg.teacher_along,
        teacher="{} {}".format(*cfg.teacher), student="{} {}".format(*cfg.student), size=cfg.size, batch=n, steps=steps,
        ms_p20=p20, ms_p50=p50, ms_p80=p80, slices_per_s=1000 * n / p50,
        **{f"{part}_percent": 100 * spans[part].sum() / total.sum() for part in PARTS}, gflop=flop / 1e9,
        matrix_tflops=rate / 1e12,                                                             # of one device
        floor_percent=100 * flop / rate / (p50 / 1000), peak_mb=peak)
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}


# ------------------------------------------------------------------------------------------------- the field's loop

class SliceFiles(Dataset):
    def __init__(self, cfg, names, seed):
        self.cfg, self.names, self.rng = cfg, names, np.random.default_rng(seed)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        with h5py.File(data_prep.h5_path(self.cfg.data, self.names[i])) as f:
            image, label = f["image"][:], f["label"][:]
        if self.rng.random() > 0.5:
            turns, axis = self.rng.integers(4), self.rng.integers(2)
            image, label = (np.flip(np.rot90(a, turns), axis).copy() for a in (image, label))
        elif self.rng.random() > 0.5:
            angle = self.rng.integers(-20, 20)
            image, label = (ndimage.rotate(a, angle, order=0, reshape=False) for a in (image, label))
        zoom = [self.cfg.size / side for side in image.shape]
        image, label = (ndimage.zoom(a, zoom, order=0) for a in (image, label))
        return torch.from_numpy(image)[None].float(), torch.from_numpy(label.astype(np.int64))


def field_loop(cfg, device, slices):
    """Generator: each next() trains one step."""
    student = UNet(*cfg.student).to(device)
    teacher = UNet(*cfg.teacher).to(device) if cfg.method in ("kd", "act") else None
    coteacher = UNet(*cfg.student).to(device).requires_grad_(False) if cfg.method in ("mt", "act") else None
    nets = [net for net in (student, teacher) if net]
    optimizer = torch.optim.SGD([p for n in nets for p in n.parameters()], lr=0.01, momentum=0.9, weight_decay=1e-4)

    def forever(names, batch):
        files = SliceFiles(cfg, names, cfg.seed)
        while True:
            yield from DataLoader(files, batch, shuffle=True, num_workers=2, drop_last=len(names) >= batch)

    def segmentation(logits, y):
        probs, hot = logits.softmax(1), F.one_hot(y, 4).movedim(-1, 1).float()
        overlap = (probs * hot).sum((0, 2, 3))
        dice = 1 - (2 * overlap + 1e-5) / (probs.square().sum((0, 2, 3)) + hot.square().sum((0, 2, 3)) + 1e-5)
        return dice.mean() + F.cross_entropy(logits, y)

    n, n_labeled = (cfg.sup_batch,) * 2 if cfg.method == "sup" else (cfg.batch, cfg.labeled_batch)
    labeled = forever(slices.names[:slices.n_labeled], n_labeled)
    others = forever(slices.names[slices.n_labeled:], n - n_labeled) if n_labeled < n else None
    for step in range(10**9):
        x, y = (a.to(device) for a in next(labeled))
        if others:
            x = torch.cat([x, next(others)[0].to(device)])
        s = student(x + 0.1 * torch.randn_like(x))
        loss = segmentation(s[:len(y)], y)
        if teacher:
            t = teacher(x)
            loss = loss + segmentation(t[:len(y)], y) + F.mse_loss(s.softmax(1), t.detach().softmax(1))
        if coteacher:
            with torch.no_grad():
                c = coteacher(x + 0.1 * torch.randn_like(x))
            loss = loss + F.mse_loss(s.softmax(1), c.softmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if coteacher:
            decay = min(0.99, 1 - 1 / (step + 1))
            for a, b in zip(coteacher.parameters(), student.parameters(), strict=True):
                a.mul_(decay).add_(b.detach(), alpha=1 - decay)
        yield loss.item(), s.max().item(), s.min().item()                               # three waits


def our_loop(actnet, slices):
    for step, batch in enumerate(slices.batches(actnet.stage.start, 10**9), actnet.stage.start):
        yield actnet.step(step, *batch)


def beside(cfg, device, slices, rounds=5, steps=8):
    """Slices per second of the last stage and of the field's loop in turns -> median ratio."""
    actnet = begin(cfg, device, slices, list_stages(cfg)[-1])
    loops = {"field": field_loop(cfg, device, slices), "ours": our_loop(actnet, slices)}
    n, speed = cfg.sup_batch if cfg.method == "sup" else cfg.batch, {name: [] for name in loops}
    for i in range(rounds + 1):                                                          # the first one warms up
        for name, loop in loops.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                next(loop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            speed[name] += [n * steps / (time.perf_counter() - began)] if i else []
    ratios = np.divide(speed["ours"], speed["field"])
    print(f"{cfg.method}, {n} slices of {cfg.size} x {cfg.size}, {actnet.precision} against fp32: "
          f"ours {np.median(speed['ours']):.1f}, the field's {np.median(speed['field']):.1f} slices/s, "
          f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}, n = {rounds})")
    return float(np.median(ratios))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent.parent / "results" / "step.csv")
    parser.add_argument("--beside", action="store_true")
    own, rest = parser.parse_known_args(argv)
    cfg, _ = train_actnet.resolve(train_actnet.parse(rest))
    device, slices = prepare(cfg)
    if own.beside:
        beside(cfg, device, slices, steps=own.steps or 8)
        return 0
    rate = matrix_rate(device)
    for stage in list_stages(cfg):
        row = time_stage(cfg, device, slices, stage, own.steps or 50, rate)
        train_actnet.append_row(own.csv, row)
        print("\n".join(f"{k:18} {v}" for k, v in row.items()), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(data_prep.exit_code("bench_step.py", main, (models.CheckpointError, models.DeviceError)))

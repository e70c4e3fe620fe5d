"""Our loop against one written the way this field writes it: same networks, batch, size and losses, side by side.

    python -m tests.loop_bench --data data/ACDC --cpu --preset cpu --batch 24 --method sup

The other loop: one HDF5 file read per slice and step, turned and resized by scipy in two worker processes, fp32, NCHW,
losses of plain torch one by one, the moving average parameter by parameter, three waits for the device a step. The two
take turns, ROUNDS times STEPS steps each; printed are the medians of slices per second and of the rounds' ratios.
"""
import sys
import time

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

import data_prep
import train_actnet
from models import UNet

ROUNDS, STEPS = 5, 8


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

    n_labeled = cfg.batch if cfg.method == "sup" else cfg.labeled_batch
    labeled = forever(slices.names[:slices.n_labeled], n_labeled)
    others = forever(slices.names[slices.n_labeled:], cfg.batch - n_labeled) if n_labeled < cfg.batch else None
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


def our_loop(act):
    for step, batch in enumerate(act.slices.batches(0, act.cfg.iters)):
        yield act.step(step, *batch)


def main(argv=None):
    cfg, _ = train_actnet.resolve(train_actnet.parse(argv))
    device, slices, act = train_actnet.prepare(cfg)
    loops = {"field": field_loop(cfg, device, slices), "ours": our_loop(act)}
    speed = {name: [] for name in loops}
    for i in range(ROUNDS + 1):                                                          # the first one warms up
        for name, loop in loops.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(STEPS):
                next(loop)
            if device.type == "cuda":
                torch.cuda.synchronize()
            speed[name] += [cfg.batch * STEPS / (time.perf_counter() - began)] if i else []
    ratios = np.divide(speed["ours"], speed["field"])
    print(f"{cfg.method}, {cfg.batch} slices of {cfg.size} x {cfg.size}, {act.precision} against fp32: "
          f"ours {np.median(speed['ours']):.1f}, the field's {np.median(speed['field']):.1f} slices/s, "
          f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}, n = {ROUNDS})")
    return float(np.median(ratios))


if __name__ == "__main__":
    sys.exit(main() <= 0)

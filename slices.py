"""What a run reads: the pool of training slices, the volumes of val, the teachers and what they say of each slice.

    slices = Slices(cfg, device)                  # cfg: train_actnet.Config
    slices.begin(stage)                           # which pools the stage draws from
    for x, y, t, rng in slices.batches(0, 100):   # images, labels, the teacher's logits or None, random source

The prepared set is small (1312 slices of 256 x 256: 172 MB in fp16): it is read once, cut or resized once, and waits
on the device, in memory or on disk; batches are drawn and augmented on the device. Everything random is a function of
(seed, step), so a resumed run goes on with the same batches, wherever the slices wait.
"""
import hashlib
import os
import signal
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import augment
import data_prep
from data_prep import DataError
from distributed import world
from models import load_model, segment_volume


def fingerprint(root):
    """SHA-256 of the slices and volumes that a run reads: another set would silently be another run."""
    sha = hashlib.sha256()
    for split, pattern in (("train_slices", data_prep.SLICE), ("val", data_prep.VOLUME)):
        for name in data_prep.read_list(root, split, pattern):
            path = data_prep.h5_path(root, name)
            with data_prep.readable(path):
                sha.update(name.encode() + path.read_bytes())
    return sha.hexdigest()


def read_val(root):
    """The volumes that choose the checkpoint, all with labels."""
    volumes = [data_prep.read_volume(root, name) for name in data_prep.read_list(root, "val")]
    data_prep.require(volumes, f"{root}/val.list", "empty, and the best checkpoint is chosen on val")
    for v in volumes:
        data_prep.require(v.label is not None, root, f"{v.name} of val.list holds no label")
    return volumes


def choose_cache(cache, device, need):
    """Where `need` bytes of slices wait: on the device, in memory, or on disk, read again for each batch."""
    if cache != "auto":
        return cache
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
    memory /= world()[1]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
    if need < free / 4:
        return "device"
    return "ram" if need < memory / 4 else "disk"


def ignore_signals(worker):
    """SIGTERM and Ctrl-C are the parent's to handle: they may go to the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Slices:
    """The training slices, cut or resized to one side, labelled first."""

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
        self.cache = choose_cache(cfg.cache, device, 6 * len(names) * self.side**2)        # of these 3 are answers
        if self.cache != "disk":
            self.images, self.labels = self.read(range(len(names)))
        if self.cache == "device":
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.stage, self.answers = None, None

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

    def begin(self, stage):
        """From now on batches are of this stage, and without answers."""
        self.stage, self.answers = stage, None

    def make_room(self, folder):
        """An empty place for the answers, (n, 3, S, S) uint8 of RV, MYO, LV, where --cache says."""
        shape = len(self.names), 3, self.side, self.side
        if self.cache == "disk":                                       # a file without a name: it goes with the run
            try:
                file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
                if hasattr(os, "posix_fallocate"):                        # a disk that is full says so now
                    os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
                self.answers = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))
            except OSError as error:
                raise data_prep.refusal(folder, error) from None
        else:
            place = self.device if self.cache == "device" else "cpu"
            self.answers = torch.zeros(shape, dtype=torch.uint8, device=place)

    def answer(self, nets, index):
        """Keep what networks say of the slices of a range; nets: as `ask` wants them."""
        part = slice(index.start, index.stop)
        images = self.read(index)[0] if self.cache == "disk" else self.images[part]
        answers = ask(nets, images.to(self.device).float(), self.cfg.views)
        self.answers[part] = answers.to(self.answers.device)

    def parts(self):
        """-> (first slice, slices, drawn a step) of each pool that the stage draws from."""
        cfg, n_labeled, n_all = self.cfg, self.n_labeled, len(self.names)
        if self.stage.number < 3:
            return [(0, n_labeled, cfg.sup_batch)]
        if n_labeled == n_all or cfg.labeled_batch == cfg.batch:
            return [(0, n_labeled, cfg.batch)]
        return [(0, n_labeled, cfg.labeled_batch), (n_labeled, n_all - n_labeled, cfg.batch - cfg.labeled_batch)]

    def indices(self, step):
        """The step's slices, labelled first, and how many of them are: passes over each pool, every pass in an order
        of its own."""
        drawn, parts, local = [], self.parts(), step - self.stage.start
        for start, pool, n in parts:
            passes = range(local * n // pool, (local * n + n - 1) // pool + 1)
            order = [np.random.default_rng((self.cfg.seed, start, p)).permutation(pool) for p in passes]
            first = local * n - passes[0] * pool
            drawn.append(start + np.concatenate(order)[first:first + n])
        return np.concatenate(drawn), parts[0][2]

    def __getstate__(self):                                  # for a reader, which needs no GPU and opens none
        return {**self.__dict__, "noise": None}

    def __getitem__(self, step):
        """-> images (B, 1, S, S), labels (L, 1, S, S) of its first L slices, answers (B, 3, S, S) or (), as they
        wait; or the error."""
        index, n_labeled = self.indices(step)
        if self.cache == "disk":
            try:
                images, labels = self.read(index)
            except DataError as error:                     # raised in a worker it would arrive with its traceback
                return error
            labels = labels[:n_labeled]
            index = torch.from_numpy(index)
        else:
            index = torch.from_numpy(index).to(self.images.device, non_blocking=True)
            images, labels = self.images[index], self.labels[index[:n_labeled]]
        return images, labels, () if self.answers is None else self.answers[index]

    def batches(self, start, stop):
        """batch(step) of the steps start to stop, read ahead where the slices wait on disk."""
        ahead = dict(num_workers=min(8, os.cpu_count() or 2), worker_init_fn=ignore_signals)
        pin = self.device.type == "cuda" and self.cache != "device"
        loader = DataLoader(self, batch_size=None, sampler=range(start, stop), pin_memory=pin,
                            **(ahead if self.cache == "disk" else {}))
        for step, raw in zip(range(start, stop), loader, strict=True):
            yield self.batch(step, raw)

    def batch(self, step, raw=None):
        """-> x (B, 1, S, S) float in 0..1, y (L, S, S) uint8 of its first L slices, t (B, C, S, S) the teacher's
        logits or None, and the step's random source."""
        raw = self[step] if raw is None else raw
        if isinstance(raw, DataError):
            raise raw
        images, labels, answers = raw
        cfg, n = self.cfg, len(images)
        rng = np.random.default_rng((cfg.seed, step))
        self.noise.manual_seed(int(rng.integers(2**62)))
        if cfg.view == "whole":
            grid = augment.turns_and_flips(n, cfg.size, rng, self.device)
        else:
            grid = augment.heart_window(n, cfg.size, self.side, rng, self.device)
        x = augment.warp(images.to(self.device, non_blocking=True).float(), grid)
        labels = labels.to(self.device, non_blocking=True).float()
        y = augment.warp(labels, grid[:len(labels)], "nearest", "zeros")[:, 0].to(torch.uint8)
        if not len(answers):
            return x, y, None, rng
        heart = augment.warp(answers.to(self.device, non_blocking=True).float(), grid, outside="zeros")
        background = 255 - heart.sum(1, keepdim=True)                                     # all that lies outside
        return x, y, torch.cat([background, heart], 1).clamp_min_(0.5).log_(), rng    # half of the least byte; no unit


def load_teacher(path, cfg):
    """-> (network, its inference settings), frozen. DataError where it is no teacher, or answers other questions."""
    net, checkpoint = load_model(path)
    config = checkpoint.get("config")
    trained = config.get("network") if isinstance(config, dict) else "teacher"               # its word is taken
    if checkpoint["better"] != "teacher" and trained != "teacher":
        raise DataError(f"--teacher-ckpt {path}: holds the student of its run, not a teacher; train one with "
                        "--network teacher --method sup")
    for key, wanted in (("in_channels", 1), ("num_classes", len(data_prep.CLASSES) + 1)):
        if net.architecture[key] != wanted:
            raise DataError(f"--teacher-ckpt {path}: {key} {net.architecture[key]}, the student's is {wanted}")
    inference = {key: checkpoint["inference"][key] for key in ("size", "view")}
    if inference["view"] != cfg.view:
        raise DataError(f"--teacher-ckpt {path}: looks at the {inference['view']}, the run at the {cfg.view} "
                        "(--view)")
    return net.requires_grad_(False), inference


@torch.no_grad()
def ask(nets, images, views):
    """What networks say of slices, each the one inference path, a mean over networks and turns of the slices.

    nets: [(network, its inference settings)]. images (n, 1, S, S) float. -> (n, 3, S, S) uint8, probabilities of RV,
    MYO and LV times 255; outside a network's window is background.
    """
    def turned(angle):
        linear = augment.put(augment.rotation(np.full(n, angle)), images.device)
        with torch.autocast(images.device.type, enabled=False):         # in bf16 it would be off by up to 0.7 pixels
            return F.affine_grid(F.pad(linear, (0, 1)), images.shape, align_corners=False)             # (n, S, S, 2)

    n, _, side, _ = images.shape
    total = torch.zeros(n, 3, side, side, device=images.device)
    for angle in np.radians(np.linspace(-30, 30, views) if views > 1 else np.zeros(1)):
        seen = augment.warp(images, turned(angle)) if angle else images
        volume = seen[:, 0].cpu().numpy()
        for net, inference in nets:
            probs = segment_volume(net, volume, **inference, return_probs=True)[1]                     # (n, C, S, S)
            heart = torch.from_numpy(probs[:, 1:]).to(images.device)
            total += augment.warp(heart, turned(-angle), outside="zeros") if angle else heart
    return (total / (views * len(nets)) * 255).round().to(torch.uint8)

"""train_actnet.py: what it draws, what it computes, what it leaves behind when killed, misused or out of numbers."""
import ast
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, files, no_room, one_line, python, read_csv
from torch import nn
from torch.distributed.distributed_c10d import BackendConfig
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import distributed
import evaluate
import models
import train_actnet
from kernels import dice_ce as dice_ce_file
from kernels import student_loss as student_loss_file
from kernels.dice_ce import dice_ce
from models import load_checkpoint, load_model
from slices import Slices, ask, choose_cache
from tests import bench_step
from train_actnet import COLUMNS, PRESETS, ActNet, Config, Stage, count_steps, main

CPU = torch.device("cpu")
SMALL = ["--cpu", "--student", "2", "4", "--teacher", "2", "8", "--size", "32", "--batch", "4", "--labeled-batch", "2",
         "--labeled", "2", "--iters", "4", "--val-every", "2", "--log-every", "1", "--precision", "fp32",
         "--save-minutes", "0"]


def heart(rng, shape):
    """A bright disc in a dark ring beside a bright disc, and noise: (Y, X) image in 0..1 and its labels."""
    y, x = np.mgrid[:shape[0], :shape[1]] - np.array(shape)[:, None, None] / 2 + rng.uniform(-2, 2, (2, 1, 1))
    left, right = np.hypot(y, x - 3), np.hypot(y, x + 9)
    label = np.select([left < 4, left < 7, right < 5], [3, 2, 1], 0)
    image = np.array([0.35, 0.8, 0.1, 0.9])[label] + rng.normal(0, 0.03, shape)
    return np.clip(image, 0, 1).astype(np.float32), label.astype(np.uint8)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder: 4 train, 1 val and 1 test patient, 3 slices of odd sizes a volume."""
    root, rng, slices = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    (root / "data" / "slices").mkdir(parents=True)
    patients = dict(train=["patient099", "patient038", "patient050", "patient100"], val=["patient028"],
                    test=["patient011"], official=[])
    for split, names in patients.items():
        volumes = [f"{name}_frame{frame}" for name in names for frame in ("01", "02")]
        (root / f"{split}.list").write_text("".join(v + "\n" for v in volumes))
        for volume in volumes:
            drawn = [heart(rng, (45, 52)) for _ in range(3)]
            files = {volume: map(np.stack, zip(*drawn, strict=True))}
            if split == "train":
                files = {f"slices/{volume}_slice_{i + 1}": pair for i, pair in enumerate(drawn)}
                slices += [Path(name).name for name in files]
            for name, pair in files.items():
                with h5py.File(root / "data" / f"{name}.h5", "w") as f:
                    f["image"], f["label"] = pair
                    f.attrs["spacing"] = (10.0, 1.5, 1.5)
    (root / "train_slices.list").write_text("".join(s + "\n" for s in slices))
    return root


def arguments(data, out, *more):
    return ["--data", str(data), "--out", str(out), *SMALL, *map(str, more)]


def read_log(out):
    return [{k: float(v) for k, v in row.items() if v} for row in read_csv(out / "log.csv")]


def run(data, out, *more):
    assert main(arguments(data, out, *more)) == 0
    return read_log(out)


def refused(capsys, options):
    """-> the last line of a run that cannot begin, or cannot go on."""
    capsys.readouterr()
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture
def saved(monkeypatch):
    """(file, content) of each checkpoint that a run saves."""
    kept = []

    def keep(path, content, previous=None):
        kept.append((path.name, deepcopy(content)))
        models.save_checkpoint(path, content, previous)
    monkeypatch.setattr(train_actnet, "save_checkpoint", keep)
    return kept


def config(data, **changes):
    """One stage, of co-teaching or of `sup`, unless --stages says otherwise."""
    small = dict(labeled=2, size=32, batch=4, labeled_batch=2, sup_batch=4, student=(2, 4), teacher=(2, 8))
    cfg = Config(data=str(data), **{**small, "stages": (0, 0, 1), **changes})
    return replace(cfg, stages=count_steps(cfg))


def pool(cfg, device=CPU):
    slices = Slices(cfg, device)
    slices.begin(train_actnet.list_stages(cfg)[-1])
    return slices


def last_stage(cfg, device=CPU):
    """-> the slices and the networks of a run's last stage, without its folder."""
    slices = pool(cfg, device)
    return slices, bench_step.begin(cfg, device, slices, slices.stage)


# ------------------------------------------------------------------------------------------------------------- data

def test_every_option_is_read():
    trees = [ast.parse((ROOT / file).read_text()) for file in ("train_actnet.py", "slices.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)
            and getattr(node.value, "id", getattr(node.value, "attr", "")) == "cfg"}
    names = {f.name for f in fields(Config)}
    assert names <= read, names - read
    assert all(preset.keys() <= names for preset in PRESETS.values())


def test_batches_pass_over_both_pools_evenly(data):
    slices = pool(config(data, batch=5))
    assert (slices.n_labeled, len(slices.names)) == (12, 24)
    assert slices.patients == ["patient099", "patient038"]
    drawn = [slices.indices(step) for step in range(24)]
    assert all(n == 2 and len(i) == 5 for i, n in drawn)
    labeled, unlabeled = np.concatenate([i[:2] for i, _ in drawn]), np.concatenate([i[2:] for i, _ in drawn])
    np.testing.assert_array_equal(np.bincount(labeled, minlength=24), [4] * 12 + [0] * 12)
    np.testing.assert_array_equal(np.bincount(unlabeled, minlength=24), [0] * 12 + [6] * 12)
    assert list(labeled[:12]) != list(labeled[12:24])                                    # each pass has its own order


def test_batch_larger_than_the_set(data):
    slices = pool(config(data, batch=64, labeled_batch=30))
    x, y, _, _ = slices.batch(0)
    assert (x.shape, y.shape) == ((64, 1, 32, 32), (30, 32, 32))
    assert np.bincount(slices.indices(0)[0], minlength=24).min() >= 2


def test_batches_depend_on_seed_and_step_alone(data):
    one, two = (pool(config(data)) for _ in range(2))
    for step in (5, 0):
        (x1, y1, _, r1), (x2, y2, _, r2) = one.batch(step), two.batch(step)
        torch.testing.assert_close(x1, x2, rtol=0, atol=0)
        assert torch.equal(y1, y2)
        assert torch.equal(augment.perturb(x1, r1, one.noise, 1.0), augment.perturb(x2, r2, two.noise, 1.0))
    assert not torch.equal(one.batch(1)[0], two.batch(0)[0])
    other = pool(config(data, seed=1))
    assert not torch.equal(other.batch(0)[0], one.batch(0)[0])


@pytest.mark.parametrize("view", ["heart", "whole"])
def test_labels_follow_the_image(data, view):
    """After the geometry every label still sits on its own brightness."""
    slices = pool(config(data, view=view, size={"heart": 32, "whole": 64}[view]))
    x, y, _, _ = slices.batch(3)
    for label, brightness in enumerate([0.35, 0.8, 0.1, 0.9]):
        assert abs(x[:2, 0][y == label].median() - brightness) < 0.05


@pytest.mark.parametrize(("view", "bent"), [("heart", True), ("whole", False)])
def test_hearts_are_stretched_and_bent(data, view, bent):
    """Images that hold their own coordinates show the geometry: an affine map, far from a similarity, and a rest."""
    slices = pool(config(data, view=view, size=64))
    ramp = (torch.arange(slices.side, dtype=torch.float64) + 0.5) * 1024 / slices.side              # exact in fp16
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    plane = torch.stack([torch.ones(64, 64), *torch.meshgrid(*[torch.arange(64.0)] * 2, indexing="ij")], -1).double()
    middle = plane[16:48, 16:48].reshape(-1, 3)                                # away from the replicated border
    rests, stretches = [], []
    for step in range(4):
        seen = []
        for coordinate in (rows, columns):
            slices.images[:] = coordinate
            seen.append(slices.batch(step)[0][:, 0, 16:48, 16:48].flatten(1).double() * slices.side / 1024)
        for place in torch.stack(seen, -1):                                    # (32 * 32, 2) of one slice, pixels
            fit = torch.linalg.lstsq(middle, place).solution
            rests.append(float((middle @ fit - place).square().sum(1).mean().sqrt()))
            large, small = torch.linalg.svdvals(fit[1:])
            stretches.append(float(large / small))
    assert (0.1 < np.median(rests) < 3 and 1.05 < np.median(stretches) < 1.6) if bent else \
        (max(rests) < 0.1 and max(stretches) < 1.01)


def test_labels_come_from_the_labeled_patients_in_any_order_of_the_list(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    names = (data / "train_slices.list").read_text().split()
    (tmp_path / "data" / "train_slices.list").write_text("".join(f"{n}\n" for n in names[:1] + names[:0:-1]))
    slices = pool(config(tmp_path / "data", labeled=1))
    assert slices.patients == ["patient099"]
    for step in range(6):
        index, n = slices.indices(step)
        assert [slices.names[i][:10] == "patient099" for i in index] == [True] * n + [False] * (len(index) - n)


def test_perturbation_is_its_parts_one_after_the_other():
    """Written out, with the same draws; and each slice has the strength that is its own."""
    x = torch.rand(6, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    strength = np.array([1.0, 1.0, 0.25, 0.25, 0.0, 1.0])
    seen = augment.perturb(x, np.random.default_rng(1), torch.Generator().manual_seed(2), strength)
    rng, noise = np.random.default_rng(1), torch.Generator().manual_seed(2)
    draws = torch.from_numpy(strength * rng.uniform(-1, 1, (5, 6))).float()[:, :, None, None, None]
    gamma, contrast, brightness, grain, blur = draws
    z = augment.standardize(x.clamp_min(1e-4) ** torch.exp(0.5 * gamma))
    nodes = torch.from_numpy(strength[:, None, None, None] * rng.normal(0, 0.3, (6, 1, 4, 4))).float()
    uneven = F.interpolate(nodes, (40, 40), mode="bicubic", align_corners=True)
    z = augment.standardize((z - z.amin((2, 3), keepdim=True)) * torch.exp(uneven))
    z = z + blur * (F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1) - z)
    z = z * torch.exp(0.3 * contrast) + 0.3 * brightness
    torch.testing.assert_close(seen, z + 0.2 * grain.abs() * torch.randn(x.shape, generator=noise), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[4:5], augment.standardize(x[4:5]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("along", [False, True])
def test_who_learns_sees_hard_pictures_and_who_answers_mild_ones(data, along):
    slices, act = last_stage(config(data, cutmix=0.0, consistency="mse", teacher_along=along, precision="fp32"))
    seen, far = {}, {}
    for name, net in act.nets.items():
        net.register_forward_pre_hook(lambda net, x, name=name: seen.setdefault(name, []).append(x[0]))
    for step in range(12):
        x, *rest = slices.batch(step)
        act.step(step, x, *rest)
        clean = augment.standardize(x)
        given = dict(student=(seen["student"][0], clean), coteacher=(seen["coteacher"][0], clean))
        if along:                                                # asked about the others, then taught by the labelled
            given["asked"], given["taught"] = zip(seen["teacher"], (clean[2:], clean[:2]), strict=True)
        for name, (picture, plain) in given.items():
            far.setdefault(name, []).append((picture - plain).abs().mean())
        seen.clear()
    far = {name: torch.stack(values).mean() for name, values in far.items()}
    assert far["student"] > 2.5 * far["coteacher"] > 0
    if along:
        assert far["taught"] > 2.5 * far["asked"] > 0


def test_cutmix_boxes():
    mask = augment.boxes(4, 32, 1.0, np.random.default_rng(0), CPU)
    assert mask.shape == (4, 1, 32, 32)
    share = mask.float().mean((1, 2, 3))
    assert ((share > 0.04) & (share < 0.3)).all()                                        # a quarter to half of the side
    assert not augment.boxes(4, 32, 0.0, np.random.default_rng(0), CPU).any()


@pytest.mark.parametrize("consistency", ["pseudo", "mse"])
def test_cutmix_spares_the_labeled_and_shows_the_student_another_slice(data, consistency):
    """What the student sees with CutMix and without: the labelled slices the same, a box of the others exchanged; the
    co-teacher answers about whole slices, with hard labels only about those without an annotation."""
    seen = {}
    for cutmix in (0.0, 1.0):
        slices, act = last_stage(config(data, method="mt", cutmix=cutmix, consistency=consistency))
        for name in ("student", "coteacher"):
            act.nets[name].register_forward_pre_hook(lambda net, x, key=(name, cutmix): seen.update({key: x[0]}))
        batch = slices.batch(0)
        act.step(0, *batch)
    labeled, plain, mixed = len(batch[1]), seen["student", 0.0], seen["student", 1.0]
    assert torch.equal(plain[:labeled], mixed[:labeled])
    other = plain[labeled:].roll(1, 0)
    kept, taken = mixed[labeled:] == plain[labeled:], mixed[labeled:] == other
    assert (kept | taken).all()
    assert 0.04 < (~kept).float().mean() < 0.3
    assert torch.equal(seen["coteacher", 0.0], seen["coteacher", 1.0])
    assert len(seen["coteacher", 1.0]) == len(plain) - labeled * (consistency == "pseudo")


@pytest.mark.parametrize("teacher", ["none", "along", "answers"])
def test_hard_labels_are_the_mean_of_those_who_answer(data, monkeypatch, teacher):
    """Of the co-teacher alone, or of co-teacher and the teacher's answers; a pixel below the confidence is ignored."""
    torch.manual_seed(0)                                               # whichever tests ran before
    cfg = config(data, method="mt" if teacher == "none" else "act", teacher_along=teacher == "along", cutmix=0.0,
                 confidence=0.4, precision="fp32")
    slices, act = last_stage(cfg)
    answers, targets = [], []
    act.nets["coteacher"].head.weight.data.mul_(30)                                         # surer than at the start
    act.nets["coteacher"].register_forward_hook(lambda net, x, y: answers.append(y[-2:]))     # the two without labels
    monkeypatch.setattr(train_actnet, "dice_ce", lambda logits, target, **form: (
        targets.append(target), dice_ce(logits, target, **form))[1])
    x, y, t, rng = slices.batch(0)
    act.step(0, x, y, t, rng)
    answers += [t[2:]] if teacher == "answers" else []
    assert len(answers) == (2 if teacher == "answers" else 1)
    probs = torch.stack([a.double().softmax(1) for a in answers]).mean(0)
    hard = probs.argmax(1).where(probs.amax(1) >= 0.4, -100)
    assert 0.02 < (hard == -100).float().mean() < 0.98
    assert (targets[0] == hard).float().mean() > 0.999                                # fp32 beside fp64 on the edge


def test_answers_follow_the_image(data):
    """Answers that are the annotation itself lie, after geometry and CutMix's roll, where the labels lie; outside of
    them is background."""
    cfg = config(data, labeled=2, batch=4, labeled_batch=4, size=32, method="kd")
    slices = pool(cfg)
    slices.make_room(None)
    for k in (1, 2, 3):
        slices.answers[:, k - 1] = 255 * (slices.labels[:, 0] == k)
    for step in range(3):
        _, y, t, _ = slices.batch(step)
        probs = t.softmax(1)
        torch.testing.assert_close(probs.sum(1), torch.ones_like(probs[:, 0]))
        assert (probs.argmax(1) == y).float().mean() > 0.97                      # nearest beside bilinear on the edges
        assert probs.amax(1).median() > 0.99


class Square(torch.nn.Module):
    """Says RV, with 0.9, where a slice is brighter than its mean: what turns with the image."""

    def __init__(self):
        super().__init__()
        self.architecture, self.scale = dict(num_classes=4), torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        p = torch.where(x > 0, 0.9, 0.1)
        return self.scale * torch.cat([1 - p, p, torch.full_like(p, 1e-6), torch.full_like(p, 1e-6)], 1).log()


def test_an_answer_is_the_mean_over_turns_and_networks():
    image = torch.zeros(2, 1, 64, 64)
    image[:, :, 24:34, 20:44] = 1
    inside = image[:, 0, 27:31, 24:40].bool()
    window = dict(size=48, view="heart")
    for views, nets in ((1, 1), (5, 1), (3, 2)):
        said = ask([(Square(), window)] * nets, image, views).float() / 255
        assert said.shape == (2, 3, 64, 64)
        assert (said[:, 0, 27:31, 24:40][inside] - 0.9).abs().max() < 0.02                 # turned there and back again
        assert (said[:, 0, 15:20, 26:38] - 0.1).abs().max() < 0.02
        with torch.autocast("cpu", torch.bfloat16):                              # turned by a grid in fp32 all the same
            assert torch.equal(ask([(Square(), window)] * nets, image, views).float() / 255, said)
        assert said[:, 0, :5, :5].max() == 0                                     # outside of the window, however turned
        assert said[:, 1:].max() == 0


# ------------------------------------------------------------------------------------------------------------- runs

@pytest.mark.parametrize(("method", "more", "present"), [
    ("sup", [], set()),
    ("mt", [], {"co"}),
    ("mt", ["--consistency", "mse"], {"co"}),
    ("kd", [], {"kd"}),
    ("kd", ["--distill", "mse", "--tau", 20, "--views", 1], {"kd"}),
    ("act", [], {"kd", "co"}),
    ("act", ["--rounds", 2, "--cache", "disk"], {"kd", "co"}),
    ("act", ["--teacher-along"], {"kd", "co", "teacher"}),
    ("act", ["--labeled", 4, "--consistency", "mse", "--view", "whole", "--teacher-along"], {"kd", "co", "teacher"}),
    ("act", ["--batch", 2, "--labeled-batch", 1, "--optimizer", "sgd", "--dice", "squared"], {"kd", "co"}),
    ("mt", ["--network", "teacher"], {"co"}),
])
def test_terms_of_each_method(data, tmp_path, method, more, present):
    stages = () if "--teacher-along" in more else ("--stages", 2, 3, 3)
    rows = run(data, tmp_path / "run", "--method", method, "--confidence", 0, "--iters", 8, *stages, *more)
    assert [row["step"] for row in rows] == list(range(1, 9))
    alone = {"sup": [2] * 8, "mt": [2] * 4 + [3] * 4}.get(method, [1] * 2 + [2] * 3 + [3] * 3)
    assert [row["stage"] for row in rows] == ([3] * 8 if "--teacher-along" in more else alone)
    last = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    for row in rows:
        if row != last[0]:                         # there co-teacher and student are equal: co may be 0
            assert {k for k in ("kd", "co", "teacher") if row[k] > 0} == (present if row in last else set())
        assert row["loss"] == pytest.approx(row["dice"] + row["ce"] + row["kd"] + row["co"], abs=1e-5)
    assert ("val_coteacher" in rows[-1]) == (method in ("mt", "act"))
    assert ("val_teacher" in rows[1]) == (rows[0]["stage"] == 1 or "--network" in more)
    net, checkpoint = load_model(tmp_path / "run" / "best.pt")
    assert net.architecture["base"] == (8 if "--network" in more else 4)
    files = {"config.json", "log.csv", "curves.png", "best.pt", "last.pt", "previous.pt", "summary.json"}
    files |= {"teacher.pt"} if rows[0]["stage"] == 1 or "--network" in more else set()
    files |= {"student.pt"} if "--network" not in more else set()
    files |= {"renewal-2.pt"} if "--rounds" in more else set()
    files |= {"start.pt"} if {2, 3} <= {row["stage"] for row in rows} else set()
    assert {p.name for p in (tmp_path / "run").iterdir()} == files
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["labeled_patients"][:2] == ["patient099", "patient038"]
    assert checkpoint["config"]["method"] == written["config"]["method"] == method


def test_stages_share_the_steps():
    for steps, changes in (
            ((20, 60, 20), {}), ((20, 60, 20), dict(method="kd")), ((0, 75, 25), dict(method="mt")),
            ((0, 100, 0), dict(method="sup")), ((0, 75, 25), dict(teacher_ckpt=("t.pt",))),
            ((50, 0, 50), dict(init="s.pt")), ((0, 0, 100), dict(init="s.pt", teacher_ckpt=("t.pt",))),
            ((0, 0, 100), dict(teacher_along=True)), ((0, 100, 0), dict(method="sup", init="s.pt", stages=(1, 0, 1))),
            ((3, 2, 2), dict(iters=7, stages=(1, 1, 1))), ((1, 1, 1), dict(iters=3, stages=(1, 100, 1)))):
        assert count_steps(Config(**{"iters": 100, "stages": (1, 3, 1), **changes})) == steps, changes
    with pytest.raises(train_actnet.DataError, match="--iters 2"):
        count_steps(Config(iters=2))


def test_the_best_of_a_stage_goes_on(data, tmp_path, monkeypatch, saved):
    """Co-teaching begins from the student's best on val, not its last, and asks the teacher's best."""
    scores = iter([0.1, 0.5, 0.3, 0.7, 0.6, 0.2] + [0.4] * 99)        # teacher, then student, at 2, 4, ... 12
    monkeypatch.setattr(evaluate, "validate",
                        lambda *_: dict(dice=[next(scores)] * 3, hd95_voxel=[1.0] * 3, entropy=0.1))
    seen, asked, begin = {}, [], ActNet.__init__

    def watch(self, cfg, device, stage, nets, noise):
        begin(self, cfg, device, stage, nets, noise)
        seen[stage.number] = deepcopy(nets[self.learner].state_dict())
    monkeypatch.setattr(ActNet, "__init__", watch)
    monkeypatch.setattr("slices.ask", lambda nets, images, views: (
        asked.append(nets[0][0].state_dict()), ask(nets, images, views))[1])
    run(data, tmp_path / "run", "--iters", 18, "--stages", 1, 1, 1)
    assert {(name, content["step"]) for name, content in saved if name != "last.pt"} == {
        ("teacher.pt", 2), ("teacher.pt", 4), ("best.pt", 8), ("student.pt", 8)}
    for name, state in (("teacher", asked[0]), ("best", seen[3])):
        kept = load_model(tmp_path / "run" / f"{name}.pt")[0].state_dict()
        assert all(torch.equal(state[key], value) for key, value in kept.items()), name
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["step"] == 8


def test_coteacher_is_the_moving_average_of_the_student(data, tmp_path, saved):
    run(data, tmp_path / "run", "--method", "mt", "--ema", 0.6, "--val-every", 1, "--stages", 0, 0, 1)
    seen = [content["networks"] for name, content in saved if name == "last.pt"]
    assert len(seen) == 4
    for step, (before, after) in enumerate(zip([None] + seen, seen, strict=False)):
        decay = min(0.6, step / (step + 1))
        for name, s in after["student"].items():
            c = after["coteacher"][name]
            if s.is_floating_point():
                expected = s if step == 0 else decay * before["coteacher"][name] + (1 - decay) * s
                torch.testing.assert_close(c, expected)
            else:
                assert torch.equal(c, s), name
    moved = [n for n, t in seen[-1]["student"].items() if not torch.equal(t, seen[-1]["coteacher"][n])]
    assert any("running_var" in n for n in moved)
    assert any("head.weight" in n for n in moved)


def test_several_teachers_answer_and_stay(data, tmp_path, monkeypatch):
    """--teacher-ckpt A B: copies in the run's folder, whose mean is learnt from; the run needs A and B no more."""
    for seed, shape in ((0, ["2", "8"]), (1, ["3", "4"])):
        run(data, tmp_path / f"t{seed}", "--method", "sup", "--network", "teacher", "--seed", seed, "--teacher", *shape)
    given = [str(tmp_path / f"t{seed}" / "best.pt") for seed in (0, 1)]
    before = [Path(path).read_bytes() for path in given]
    asked = []
    monkeypatch.setattr("slices.ask", lambda nets, *rest: (
        asked.append([net.architecture["depth"] for net, _ in nets]), ask(nets, *rest))[1])
    rows = run(data, tmp_path / "run", "--stages", 1, 3, 1, "--teacher-ckpt", *given)
    assert sorted(asked[0]) == [2, 3]
    assert [row["stage"] for row in rows] == [2, 2, 2, 3]
    assert rows[3]["kd"] > 0 == rows[3]["teacher"]
    assert [(tmp_path / "run" / f"{name}.pt").read_bytes() for name in ("teacher", "teacher-2")] == before
    for path in given:
        Path(path).unlink()
    assert main(["--resume", str(tmp_path / "run"), "--iters", "6"]) == 0
    assert len(asked[-1]) == 2
    again = train_actnet.Run(*train_actnet.resolve(dict(resume=str(tmp_path / "run"), iters=7)))
    assert again.answer_cost == again.cfg.views * sum(train_actnet.slice_cost(shape, 36) for shape in ((2, 8), (3, 4)))


def test_a_start_is_remembered(data, tmp_path):
    """--init of a run that stops in its teacher stage: co-teaching begins there after a resume too."""
    run(data, tmp_path / "first", "--method", "sup")
    init = tmp_path / "first" / "best.pt"
    options = ["--init", init, "--lr", 1e-12, "--stages", 1, 0, 1]
    run(data, tmp_path / "then", *options, "--minutes", 1e-9)
    assert load_checkpoint(tmp_path / "then" / "last.pt")["step"] == 1
    before = load_model(init)[0]
    init.unlink()
    assert main(["--resume", str(tmp_path / "then"), "--minutes", "0"]) == 0
    after = load_model(tmp_path / "then" / "best.pt", which="student")[0]
    torch.testing.assert_close(after.head.weight, before.head.weight)


@pytest.mark.parametrize(("options", "steps"), [
    (["--method", "sup"], (0, 30000, 0)), (["--method", "mt"], (0, 6000, 24000)),
    (["--method", "sup", "--network", "teacher"], (0, 30000, 0)), ([], (0, 0, 30000)),
    (["--teacher-ckpt", "t.pt"], (0, 6000, 24000))])
def test_the_papers_protocol_has_each_method(options, steps):
    cfg, _ = train_actnet.resolve(train_actnet.parse(["--preset", "paper", "--out", "absent", *options]))
    assert cfg.stages == steps
    assert cfg.teacher_along == (steps == (0, 0, 30000))
    assert cfg.view == "whole"


def test_the_labelled_share_follows_the_batch():
    def labeled(*options):
        return train_actnet.resolve(train_actnet.parse(["--out", "absent", *options]))[0].labeled_batch
    assert [labeled("--batch", "48"), labeled("--batch", "1"), labeled("--preset", "cpu", "--batch", "4")] == [24, 1, 1]
    assert labeled("--batch", "48", "--labeled-batch", "12") == 12


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_teacher_along_learns_in_every_layer(data, precision):
    """It first answers without gradients, then learns, inside one autocast: a cached cast would cut its gradients."""
    slices, act = last_stage(config(data, teacher_along=True, precision=precision))
    act.step(0, *slices.batch(0))
    for net in ("student", "teacher"):
        assert [n for n, p in act.nets[net].named_parameters() if not p.grad.any()] == []


def test_start_from_a_checkpoint(data, tmp_path, capsys):
    run(data, tmp_path / "first", "--method", "kd")
    best = tmp_path / "first" / "best.pt"
    run(data, tmp_path / "then", "--method", "mt", "--init", best, "--lr", 1e-12, "--iters", 1)
    before, after = (load_model(tmp_path / name / "best.pt", which="student")[0] for name in ("first", "then"))
    torch.testing.assert_close(after.head.weight, before.head.weight)
    for more, told in ((["--init", best, "--student", 2, 8], "--init"),
                       (["--teacher-ckpt", best], "holds the student of its run")):
        assert told in refused(capsys, arguments(data, tmp_path / "no", *more))
        assert not (tmp_path / "no").exists()
    best.unlink()                                              # a resumed run begins from its own last.pt
    first = json.loads((tmp_path / "then" / "config.json").read_text())["command"]
    assert main(["--resume", str(tmp_path / "then"), "--iters", "2", "--table", str(tmp_path / "table.csv")]) == 0
    assert load_checkpoint(tmp_path / "then" / "last.pt")["config"]["init"] == str(best)
    command = json.loads((tmp_path / "then" / "config.json").read_text())["command"]
    assert command.startswith(first + " && python ")
    assert read_csv(tmp_path / "table.csv")[0]["command"] == command


def test_more_steps_for_a_run_of_two_rounds(data, tmp_path):
    """The border of its rounds moves; what the second one asks was saved at the first border."""
    run(data, tmp_path / "run", "--rounds", 2, "--iters", 12, "--stages", 1, 1, 2)
    assert main(["--resume", str(tmp_path / "run"), "--iters", "15"]) == 0
    assert read_log(tmp_path / "run")[-1]["step"] == 15


def test_a_state_that_is_restored_is_let_go(data, tmp_path):
    run(data, tmp_path / "run", "--iters", 6)
    cfg, state = train_actnet.resolve(dict(resume=str(tmp_path / "run"), iters=9))
    train_actnet.Run(cfg, state)
    assert not state


def test_the_small_student_is_what_best_pt_says(data, tmp_path):
    """Of a run killed between its best and its last checkpoint that finds another best when it goes on elsewhere."""
    run(data, tmp_path / "run", "--iters", 6)
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    kept = last["best"]["student"]
    kept["better"] = "student" if kept["better"] == "coteacher" else "coteacher"
    torch.save(last, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    small, best = (load_checkpoint(tmp_path / "run" / name)["better"] for name in ("student.pt", "best.pt"))
    assert small == best
    load_model(tmp_path / "run" / "student.pt")


def test_a_finished_run_without_its_state_is_not_overwritten(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--iters", 6)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).unlink()
    before = files(tmp_path / "run")
    assert "holds a run already" in refused(capsys, arguments(data, tmp_path / "run", "--iters", 6))
    assert files(tmp_path / "run") == before


def test_finished_run_gives_its_scores_and_a_small_student(data, tmp_path):
    table = tmp_path / "table.csv"
    for seed in (0, 1):                                            # long enough that the last stage holds the best
        run(data, tmp_path / f"run{seed}", "--seed", seed, "--table", table, "--iters", 60, "--val-every", 20)
    rows, kinds = read_csv(table), []
    for seed in "01":
        best = load_checkpoint(tmp_path / f"run{seed}" / "best.pt")["networks"]
        kinds += [(name, "last", seed) for name in ("student", "coteacher")]
        kinds += [(name, "best", seed) for name in ("teacher", *best)]
    assert [(r["network"], r["when"], r["seed"]) for r in rows] == kinds
    rows = [r for r in rows if r["seed"] == "1"]
    summary = json.loads((tmp_path / "run1" / "summary.json").read_text())
    last = [float(rows[0][f"dice_{c}"]) for c in ("RV", "MYO", "LV")]
    np.testing.assert_allclose(last, summary["last"]["student"], atol=1e-4)
    assert np.mean(last) == pytest.approx(float(rows[0]["dice_mean"]), abs=1e-4)
    assert float(rows[0]["hd95_mean"]) > 0
    best, small = (load_model(tmp_path / "run1" / f"{name}.pt") for name in ("best", "student"))
    assert small[1]["better"] == best[1]["better"]
    for a, b in zip(best[0].state_dict().values(), small[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert (tmp_path / "run1" / "student.pt").stat().st_size < 0.5 * (tmp_path / "run1" / "best.pt").stat().st_size


def test_learns(data, tmp_path):
    rows = run(data, tmp_path / "run", "--method", "sup", "--iters", 150, "--val-every", 150, "--batch", 8,
               "--student", 3, 8)
    assert rows[-1]["val_student"] > 0.8
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


TERMS = [c for c in COLUMNS if c not in ("seconds", "slices_per_s")]


def test_the_same_run_from_device_memory_and_disk(data, tmp_path):
    """Wherever the slices wait: the same 20 losses, to the bit that the log shows."""
    logs = [run(data, tmp_path / cache, "--cache", cache, "--iters", 20, "--val-every", 20)
            for cache in ("device", "ram", "disk")]
    logs = [[{k: row[k] for k in TERMS if k in row} for row in log] for log in logs]
    assert len(logs[0]) == 20
    assert logs[0] == logs[1] == logs[2]


def test_what_fits_decides_where_the_slices_wait(monkeypatch):
    for cache, need, expected in (("auto", 2**20, "device"), ("auto", 2**50, "disk"), ("ram", 2**50, "ram")):
        assert choose_cache(cache, CPU, need) == expected
    monkeypatch.setattr("slices.world", lambda: (0, 2**30))                            # each wants its own
    assert choose_cache("auto", CPU, 2**20) == "disk"


def test_a_reader_takes_nothing_of_the_device(data):
    slices = pickle.loads(pickle.dumps(pool(config(data, cache="disk"))))
    assert slices.noise is None
    assert slices[0][2] == ()
    assert [part.shape for part in slices[0][:2]] == [(4, 1, 96, 96), (2, 1, 96, 96)]


def test_damaged_slice_read_ahead_is_one_line(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "copy")
    file = tmp_path / "copy/data/slices/patient099_frame01_slice_2.h5"
    options = "--cache", "disk", "--iters", 6
    file.write_bytes(b"")
    assert f"{file.name}: cannot be read" in refused(capsys, arguments(tmp_path / "copy", tmp_path / "one", *options))
    file.unlink()
    assert f"{file.name}: absent; prepare" in refused(capsys, arguments(tmp_path / "copy", tmp_path / "two", *options))


def test_a_disk_without_room_for_answers_is_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    error = refused(capsys, arguments(data, tmp_path / "run", "--method", "act", "--cache", "disk", "--iters", 6))
    assert f"{tmp_path / 'run'}: No space left on device; free some space" in error


def torchrun(processes, script, *arguments):
    done = python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, *arguments,
                  env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


WATCHED = """
import os
import numpy as np
import distributed
import train_actnet
told, real = [], train_actnet.student_loss

def watch(*args, expected_grads, **options):
    terms = real(*args, expected_grads=expected_grads, **options)
    for term, expected in zip(terms, expected_grads):
        if term.requires_grad:
            term.register_hook(lambda grad, expected=expected: told.append(grad.item() == np.float32(expected)))
    return terms

train_actnet.student_loss = watch
code = train_actnet.main()
os.write(1, f"gradients {len(told)} as expected {sum(told)}\\n".encode())              # whole, whoever else writes
distributed.leave(code)
"""


@pytest.mark.parametrize(("processes", "method"), [
    (2, ["act"]), (3, ["act"]), (2, ["act", "--consistency", "mse", "--distill", "mse", "--optimizer", "sgd"])])
def test_several_processes_equal_one(data, tmp_path, processes, method):
    """torchrun: the same batch over two or three processes; Dice and batch norm over all of it; the same losses, and
    gradients that reach the losses as they were told, to the bit, while the weights rise."""
    more = ["--iters", 20, "--val-every", 10, "--ramp", 1, "--confidence", 0, "--seed", 3, "--batch", 12,
            "--labeled-batch", 6, "--sup-batch", 6, "--method", *method]
    alone = run(data, tmp_path / "alone", *more)
    (tmp_path / "watched.py").write_text(WATCHED)
    said = torchrun(processes, tmp_path / "watched.py", *arguments(data, tmp_path / "run", *more))
    counts = re.findall(r"gradients (\d+) as expected (\d+)", said)
    assert len(counts) == processes
    assert all(n == right and int(n) > 40 for n, right in counts)
    rows = read_log(tmp_path / "run")
    assert len(rows) == 20
    for a, b in zip(alone, rows, strict=True):
        for term in train_actnet.TERMS:
            close = 2e-6 if a["step"] <= 5 else 1e-3                     # Adam divides rounding by rounding: it grows
            assert a[term] == pytest.approx(b[term], abs=close), (a["step"], term)
    assert alone[-1]["val_student"] == pytest.approx(rows[-1]["val_student"], abs=1e-3)
    assert (tmp_path / "run" / "summary.json").exists()


SUMS = """
import os
import torch
import distributed
distributed.start()
rank, size = distributed.world()
for dtype in (None, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    net = distributed.parallel(torch.nn.Linear(50, 7), torch.device("cpu"), dtype)
    x = torch.randn(size, 50)
    (net(x[rank]).sum() / 3).backward()
    exact, grad = x.sum(0) / 3, net.module.weight.grad[0]
    off = float((grad - exact).abs().max() / exact.abs().max())
    os.write(1, f"{dtype} off by {off:.1e}\\n".encode())                              # whole, whoever else writes
distributed.stop()
distributed.leave(0)
"""


def test_gradients_are_summed_in_bf16_under_bf16_alone(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS)
    off = re.findall(r"(\S+) off by (\S+)", torchrun(3, tmp_path / "sums.py"))
    assert len(off) == 9
    for dtype, error in off:
        low, high = (1e-4, 1e-2) if "bfloat16" in dtype else (0, 1e-6)
        assert low <= float(error) < high, (dtype, error)


@pytest.mark.parametrize(("device", "kind"), [("cuda", nn.SyncBatchNorm), ("cpu", distributed.GlobalBatchNorm)])
def test_batch_norm_of_several_processes(monkeypatch, device, kind):
    """torch's on GPUs, which refuses CPUs, ours there; weights, buffers and their names stay the same."""
    class Wrapped:
        def __init__(self, module, broadcast_buffers):
            assert not broadcast_buffers
            self.module = module

        def register_comm_hook(self, state, hook):
            self.hook = hook
    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapped)
    net = models.UNet(2, 4)
    before = net.state_dict(keep_vars=True)
    after = distributed.parallel(net, torch.device(device)).module
    kinds = [type(m) for m in after.modules() if "Norm" in type(m).__name__]
    assert kinds == [kind] * 6
    held = after.state_dict(keep_vars=True)
    assert list(held) == list(before)
    assert all(held[k] is before[k] for k in held)


@pytest.mark.parametrize("cuda", [True, False])
def test_what_is_not_on_a_gpu_goes_by_gloo(monkeypatch, cuda):
    """torch alone would take nccl for everything: objects on one GPU for all ranks, and nothing for a run on CPUs."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend) or 1 / 0)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(ZeroDivisionError):
        main(["--labeled", "7"])
    backends = BackendConfig(torch.distributed.Backend(asked[0])).get_device_backend_map()
    assert backends["cpu"] == "gloo"
    assert not cuda or backends["cuda"] == "nccl"


def test_a_stray_world_size_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--labeled", "7"]) == 2
    one_line(capsys.readouterr().err, "train_actnet.py", "RANK is not")


def test_torchrun_chooses_the_gpus(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train_actnet, "world", lambda: (0, 2))
    for name in ("init_process_group", "is_initialized", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, **k: True)
    assert "CUDA_VISIBLE_DEVICES" in refused(capsys, ["--labeled", "7", "--gpu", "0"])


def test_bench_times_every_part_of_every_stage(data, tmp_path):
    options = ["--data", str(data), *SMALL, "--steps", "3", "--csv", str(tmp_path / "results" / "step.csv")]
    bench_step.main(options)                                                      # --iters 4: fewer than are timed
    bench_step.main([*options, "--teacher-along"])
    rows = read_csv(tmp_path / "results" / "step.csv")
    assert [row["stage"] for row in rows] == ["1", "2", "3", "3"]
    shares = [{part: float(row[f"{part}_percent"]) for part in bench_step.PARTS} for row in rows]
    for row, share in zip(rows, shares, strict=True):
        assert sum(share.values()) == pytest.approx(100, abs=0.5)
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["slices_per_s"]) == pytest.approx(4000 / float(row["ms_p50"]), rel=1e-3)
    assert min(shares[3].values()) > 0                                      # not more: a busy machine stretches any
    assert shares[1]["teacher"] + shares[1]["coteacher"] < shares[1]["backward"] / 4
    assert float(rows[3]["gflop"]) > 2 * float(rows[2]["gflop"]) > 0
    cfg = config(data)
    assert bench_step.beside(cfg, CPU, Slices(cfg, CPU), rounds=1, steps=1) > 0              # the field's loop


def test_arithmetic_of_a_step(data):
    """Multiply-accumulates by hand: UNet[1, 4] on 32 x 32 is 9 (1 * 4 + 4 * 4) + 4 * 4 a pixel."""
    flop = 2 * (9 * (1 * 4 + 4 * 4) + 4 * 4) * 32 * 32
    cfg = config(data, student=(1, 4), teacher=(1, 4))                                # 4 slices, 2 of them with labels
    for number, passes in ((1, 3 * 4), (2, 3 * 4), (3, 3 * 4 + 2)):
        assert train_actnet.step_cost(cfg, Stage(number, 0, 1)) == passes * flop
    along = replace(cfg, teacher_along=True)
    assert train_actnet.step_cost(along, Stage(3, 0, 1)) == (3 * 4 + 2 + 3 * 2 + 2) * flop


class Count(TorchDispatchMode):
    """How many operators are issued, and kernels of ours launched."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid):                                              # stands in for a kernel
        def launch(*args, **kwargs):
            self.n += 1
        return launch


@pytest.mark.parametrize("kind", ["references", "kernels"])
def test_operators_of_a_step(data, monkeypatch, kind):
    """`act`'s third stage took 957 when its teacher trained along, counted so on a CPU: at most half. On a GPU the
    losses are kernels, and autocast adds a cast for each weight and gradient."""
    slices, actnet = last_stage(config(data, student=(4, 16), precision="fp32" if kind == "references" else "bf16"))
    actnet.step(0, *slices.batch(0))
    count = Count()
    for module in (dice_ce_file, student_loss_file) if kind == "kernels" else ():
        monkeypatch.setattr(module, "_use_triton", lambda *tensors: True)
        for name in ("_sums_kernel", "_finish_kernel", "_grad_kernel", "_student_kernel"):
            monkeypatch.setattr(module, name, count, raising=False)
    with count:
        actnet.step(1, *slices.batch(1))
    assert 300 < count.n <= 957 // 2


def test_a_step_of_co_teaching_costs_the_same_whatever_the_teacher(data):
    """Its answers are there: the operators of a step are those with a small teacher, and fewer than with one along."""
    counts = []
    for changes in (dict(teacher=(2, 4)), dict(teacher=(5, 16)), dict(teacher_along=True)):
        slices, actnet = last_stage(config(data, **changes))
        batch = slices.batch(0)
        actnet.step(0, *batch)
        with Count() as count:
            actnet.step(0, *batch)
        counts.append(count.n)
    small, large, along = counts
    assert small == large < 0.75 * along


def test_compiled_networks_train_alike(data, tmp_path, monkeypatch):
    """Through torch.compile's wrapper; inductor itself takes a minute and is torch's to test."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    logs = [run(data, tmp_path / str(len(option)), *option) for option in (("--compile",), ())]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert logs[0][-1]["val_student"] == logs[1][-1]["val_student"]


# ------------------------------------------------------------------------------------------------------------- fp16

def test_a_device_trains_in_what_it_computes_fast(monkeypatch):
    for pays, cuda, cpu in ((True, "bf16", "bf16"), (False, "fp16", "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, pays=pays: pays)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda pays=pays: pays)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        assert models.fast_precision(torch.device("cuda")) == cuda
        assert models.fast_precision(CPU) == cpu


def test_emulated_bf16_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "bf16_pays", lambda device: False)
    assert main(arguments(data, tmp_path / "run", "--precision", "bf16")) == 2
    one_line(capsys.readouterr().err, "--precision bf16")
    assert not (tmp_path / "run").exists()


def equal(a, b):
    """Two states, to the bit."""
    if isinstance(a, dict | list):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(equal(a[k], b[k]) for k in keys)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_in_fp16_is_resumed_to_the_bit(data, tmp_path, monkeypatch, optimizer):
    """With a scale that grows after two good steps; its state is saved."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    options = ["--precision", "fp16", "--iters", 6, "--stages", 0, 0, 1, "--method", "mt", "--optimizer", optimizer]
    rows = run(data, tmp_path / "whole", *options)
    assert all(np.isfinite(row["loss"]) for row in rows)
    run(data, tmp_path / "two", *options, "--minutes", 1e-9)
    first, last = (load_checkpoint(tmp_path / name / "last.pt") for name in ("two", "whole"))
    assert (first["step"], first["scaler"]["_growth_tracker"]) == (1, 1)
    assert last["scaler"]["scale"] == 256 * 2**3
    assert main(["--resume", str(tmp_path / "two"), "--minutes", "0"]) == 0
    resumed = load_checkpoint(tmp_path / "two" / "last.pt")
    for key in ("networks", "optimizer", "scaler"):
        assert equal(resumed[key], last[key]), key


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_where_another_precision_is_fast(data, tmp_path, monkeypatch, before, after):
    """--precision auto, from a GPU that has bf16 to one that has not, and back: the scale begins anew."""
    monkeypatch.setattr(models, "fast_precision", lambda device: before)
    run(data, tmp_path / "run", "--precision", "auto", "--method", "sup", "--minutes", 1e-9)
    monkeypatch.setattr(models, "fast_precision", lambda device: after)
    assert main(["--resume", str(tmp_path / "run"), "--minutes", "0"]) == 0
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last["step"], bool(last["scaler"])) == (4, after == "fp16")


def spoil(actnet, steps):
    """Makes a gradient of the learner infinite in its first steps."""
    count = iter(range(10**6))
    weight = next(actnet.nets[actnet.learner].parameters())
    weight.register_hook(lambda grad: grad * (float("inf") if next(count) < steps else 1.0))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_with_an_infinite_gradient_is_skipped(data, optimizer):
    """The very first one, when torch's fused SGD would leave its momentum as the memory was."""
    states = {}
    for name, infinite in (("skips", 1), ("plain", 0)):
        torch.manual_seed(0)
        slices, act = last_stage(config(data, method="mt", precision="fp16", optimizer=optimizer))
        spoil(act, infinite)
        net, before = act.nets["student"], deepcopy(act.nets["student"].state_dict())
        junk = [torch.full_like(p, 1e30) for p in net.parameters() for _ in range(20)]
        del junk
        terms = act.step(0, *slices.batch(0))
        assert torch.isfinite(terms).all()
        moved = [not torch.equal(p, before[k]) for k, p in net.named_parameters()]
        assert not any(moved) if infinite else all(moved)
        assert act.scaler.get_scale() == 65536 / (1 + infinite)
        states[name] = deepcopy(act.optimizer.state_dict()["state"])
        for step in (1, 2):
            assert torch.isfinite(act.step(step, *slices.batch(step))).all()
        assert all(p.isfinite().all() and p.abs().max() < 10 for p in net.parameters())
    for key, value in states["skips"][0].items():
        assert not value.any(), key
    assert any(states["plain"][0][key].any() for key in states["plain"][0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_gradient_is_guessed_under_a_loss_scale(data, monkeypatch, precision):
    told, real = [], train_actnet.student_loss
    monkeypatch.setattr(train_actnet, "student_loss", lambda *args, expected_grads, **options: (
        told.append(expected_grads), real(*args, expected_grads=expected_grads, **options))[1])
    slices, act = last_stage(config(data, precision=precision, lambda_kd=0.3))
    act.step(0, *slices.batch(0))
    assert told == [None if precision == "fp16" else (1.0, 1.0, 0.3, 1.0)]


def test_steps_that_are_skipped_without_end_stop_the_run(data, tmp_path, monkeypatch, capsys):
    begin = ActNet.__init__

    def watch(self, *args):
        begin(self, *args)
        spoil(self, 10**6)
    monkeypatch.setattr(ActNet, "__init__", watch)
    options = ["--precision", "fp16", "--iters", "40", "--method", "sup", "--log-every", "40", "--val-every", "40"]
    error = refused(capsys, arguments(data, tmp_path / "run", *options))
    assert "step 19: fp16: steps are skipped" in error
    assert "--precision fp32" in error


def test_checkpoints_keep_their_distance_and_stages_end_with_one(data, tmp_path, saved):
    """A checkpoint of the paper's teacher takes seconds: one a minute, but at a stage's end whatever the time."""
    rows = run(data, tmp_path / "run", "--iters", 18, "--stages", 1, 1, 1, "--save-minutes", 60)
    assert [row["step"] for row in rows if "val_student" in row or "val_teacher" in row] == list(range(2, 19, 2))
    assert [content["step"] for name, content in saved if name == "last.pt"] == [6, 12, 18]


def test_infinite_loss_stops_with_its_step_and_slices(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--stages", 1, 2, 1)
    last = tmp_path / "run" / "last.pt"
    checkpoint = load_checkpoint(last)
    next(iter(checkpoint["networks"]["student"].values()))[0] = float("nan")
    models.save_checkpoint(last, checkpoint)
    poisoned = last.read_bytes()
    slices = pool(config(data))
    slices.begin(Stage(3, 3, 6))
    names = [slices.names[i] for i in slices.indices(4)[0]]
    error = refused(capsys, ["--resume", str(tmp_path / "run"), "--iters", "9"])
    assert all(word in error for word in ("step 4:", "nan", *names))
    assert last.read_bytes() == poisoned                                                 # nothing written after it


def test_second_run_in_one_folder_is_told_who_holds_it(data, tmp_path, capsys):
    command = [sys.executable, ROOT / "train_actnet.py", *arguments(data, tmp_path / "run", "--iters", 100000)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run" / "last.pt").exists():
        time.sleep(0.01)
    assert str(process.pid) in refused(capsys, ["--resume", str(tmp_path / "run"), "--minutes", "1"])
    process.kill()
    process.wait()
    assert main(["--resume", str(tmp_path / "run"), "--minutes", "1e-9"]) == 0


def test_files_of_others_are_left_alone(data, tmp_path, monkeypatch, capsys):
    """--resume "" is the working directory."""
    names = [".movie.2019.part", ".movie.mkv.part", "movie.part", ".last.pt.4711.tmp"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", ""]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert sorted(os.listdir()) == names[:3]


@pytest.mark.parametrize(("options", "says"), [
    (["--gpu", "99"], "--gpu 99"),
    (["--labeled", "9"], "4 training patients"),
    (["--labeled", "0"], "--labeled 0"),
    (["--labeled-batch", "5"], "--labeled-batch 5"),
    (["--network", "teacher"], "teacher"),
    (["--iters", "0"], "--iters 0"),
    (["--stages", "0", "1", "1"], "--teacher-ckpt"),
    (["--rounds", "2", "--method", "kd"], "--rounds 2"),
    (["--rounds", "5", "--iters", "6"], "--rounds 5"),
    (["--stages", "1", "1", "1", "--preset", "paper"], "--stages"),
    (["--table", "."], "--table ."),
    (["--size", "0"], "--size 0"),
    (["--out", "file/run"], "file"),
])
def test_errors_are_one_line(data, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["--data", str(data), *(SMALL[1:] if "--gpu" in options else SMALL), *options]) == 2
    one_line(capsys.readouterr().err, says)
    assert os.listdir() == ["file"]


def test_a_run_folder_that_is_there_is_not_taken(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/act-2-seed0", "runs/act-2-seed0-2"):
        assert main(["--data", str(data), *SMALL, "--iters", "3"]) == 0
        assert Path(expected, "best.pt").exists()


def test_demo_from_nothing_to_a_table(tmp_path):
    """The whole chain as a newcomer starts it, cut to a few steps."""
    result = python(ROOT / "train_actnet.py", "--demo", "--iters", 3, "--cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("RV", "MYO", "LV", "Dice", "HD95"))
    assert list(tmp_path.glob("runs/demo-act-3-seed0/test/*.png"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_gpu_step_never_waits(data, precision):
    slices, act = last_stage(config(data, precision=precision), models.pick_device())
    act.step(0, *slices.batch(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = [act.step(step, *slices.batch(step)) for step in range(1, 11)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.stack(terms)).all()

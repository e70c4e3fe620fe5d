"""Break things: kills at every moment, full disks, hostile files, wrong options. Nothing lost, nothing silently wrong.

    python -m pytest tests/test_faults.py                   # a minute
    FAULTS=full python -m pytest tests/test_faults.py -s    # more kills and inputs, and what each of them did

Runs to be killed are children of a fork server that has torch imported: one starts in a tenth of a second.
"""
import contextlib
import ctypes
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
import torch._dynamo  # what an optimiser imports when the first one is made
from conftest import ROOT, Bomb, files, one_line, read_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_prep
import evaluate
import models
import phantom
import predict
import slices
import train_actnet
from data_prep import DataError
from models import UNet, load_checkpoint, load_last, save_checkpoint
from train_actnet import Config

FULL = os.environ.get("FAULTS") == "full"
MORE = 4 if FULL else 1
MAY_CHANGE = {"iters", "minutes", "save_minutes", "gpu", "cpu", "data", "table"}    # on --resume; out: the same
ZOOMS = (1.5, 1.5, 10.0)
SMALL = ["--cpu", "--student", "2", "4", "--teacher", "2", "4", "--size", "32", "--batch", "4", "--labeled-batch", "2",
         "--labeled", "1", "--val-every", "2", "--save-minutes", "0", "--log-every", "1", "--precision", "fp32"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


class Hang(BaseException):
    """No `except Exception` or `except OSError` of the code under test swallows it."""


@pytest.fixture(autouse=True)
def no_hang():
    def alarm(*_):
        raise Hang
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(600 if FULL else 100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def note(*words):
    if FULL:
        print(*words, flush=True)


# ------------------------------------------------------------------------------------------------- data and processes

@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Raw ACDC in small: two patients of train, one of val; frames of 3 slices of 40 x 44."""
    root, rng = tmp_path_factory.mktemp("faults") / "raw", np.random.default_rng(0)
    label = np.zeros((3, 40, 44), np.uint8)
    for k in (1, 2, 3):
        label[:, 12:28, 8 * k:8 * k + 8] = k
    for patient in ("patient099", "patient038", "patient028"):
        folder = root / "training" / patient
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text("ED: 1\nES: 7\nGroup: NOR\nHeight: 170.0\nNbFrame: 25\nWeight: 70.0\n")
        for frame in ("01", "07"):
            image = (100 * label + rng.integers(0, 99, label.shape)).astype(np.int16)
            phantom.write_nifti(folder / f"{patient}_frame{frame}.nii.gz", image, ZOOMS)
            phantom.write_nifti(folder / f"{patient}_frame{frame}_gt.nii.gz", label, ZOOMS)
    return root


@pytest.fixture(scope="session")
def data(raw):
    data_prep.convert(raw, raw.parent / "data", allow_missing=True, workers=1)
    return raw.parent / "data"


@pytest.fixture(scope="session")
def server():
    """The fork server; its children compute on one thread, so that two runs add in the same order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    with pytest.MonkeyPatch.context() as patch:                                     # read once, when the server starts
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        patch.setenv("OMP_NUM_THREADS", "1")
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


def work(module, argv, writer, fault, curves):
    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    if fault:
        fault()
    if not curves:                                                                   # a third of a second each
        evaluate.draw_curves = lambda log, png: None
    sys.exit(sys.modules[module].main([str(a) for a in argv]))


class Child:
    """main(argv) of a script in a process of its own; `fault()` is called in it first."""

    def __init__(self, server, argv, fault=None, curves=False, module="train_actnet"):
        self.reader, writer = server.Pipe(duplex=False)
        self.process = server.Process(target=work, args=(module, argv, writer, fault, curves))
        self.process.start()
        writer.close()

    def end(self, number=None):
        """-> (exit code, what it printed), after the signal `number` where one is given."""
        if number:
            os.kill(self.process.pid, number)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            raise Hang
        text = b"".join(iter(lambda: os.read(self.reader.fileno(), 1 << 16), b"")).decode()
        return self.process.exitcode, "\n".join(line for line in text.splitlines() if "%|" not in line and line)

    def succeed(self):
        """-> what it printed until its end."""
        code, text = self.end()
        assert code == 0, text
        return text


def die_at(n):
    """SIGKILL in place of the process's n-th fsync or rename."""
    calls = itertools.count(1)

    def counted(real, *args):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    os.fsync, os.replace = partial(counted, os.fsync), partial(counted, os.replace)


def slow_files():
    """A tenth of a second for each file that appears: a busy machine's kill still finds the work half done."""
    def late(real, *args):
        time.sleep(0.1)
        return real(*args)
    os.replace = partial(late, os.replace)
    multiprocessing.set_start_method("fork", force=True)           # a fork server gives workers without it


def full_disk(room):
    """No file grows beyond `room` bytes: the write that would fails, and what came before it is there."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def drop_root():
    """Root writes everywhere: give up all capabilities."""
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0


def arguments(data, out, *more):
    return ["--data", data, "--out", out, *SMALL, *more]


def fingerprint(run):
    """SHA-256 of all that a run computed: networks, optimiser, best.pt, and the log without its clocks."""
    sha = hashlib.sha256()

    def feed(x):
        if isinstance(x, torch.Tensor):
            sha.update(x.numpy().tobytes())
        elif isinstance(x, dict | list | tuple):
            for part in sorted(x.items(), key=str) if isinstance(x, dict) else x:
                feed(part)
        else:
            sha.update(repr(x).encode())

    for name in ("last.pt", "best.pt"):
        feed({k: v for k, v in load_checkpoint(run / name).items() if k not in ("seconds", "config")})
    feed([[v for k, v in row.items() if k not in ("seconds", "slices_per_s")] for row in read_csv(run / "log.csv")])
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------------- kills of a run

LONG = ("--iters", "60", "--val-every", "7", "--rounds", "2")


@pytest.fixture(scope="session")
def unbroken(server, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    Child(server, arguments(data, run, *LONG)).succeed()
    assert [int(row["step"]) for row in read_csv(run / "log.csv")] == list(range(1, 61))
    return fingerprint(run)


def go_on(server, data, run, *more):
    """A run's next process: resumed if it has a checkpoint, otherwise started."""
    there = any((run / name).exists() for name in ("last.pt", "previous.pt"))
    return Child(server, ["--resume", run] if there else arguments(data, run, *LONG), *more)


def kill_at_step(child, run, step, later):
    while child.process.is_alive():
        with contextlib.suppress(OSError):
            if (run / "log.csv").read_bytes().count(b"\n") > step:
                break
        time.sleep(0.0005)
    time.sleep(later)
    assert child.end(signal.SIGKILL)[0] == -signal.SIGKILL, "it ended before it was killed"


def test_a_run_killed_ten_times_equals_the_unbroken_one(server, data, unbroken, tmp_path):
    """SIGKILL at random steps and moments of a step, resumed each time: the same weights and log, bit for bit."""
    rng = random.Random(0)
    early = range(1, 51)                                          # so early that a busy machine's kill meets it alive
    chains = [sorted(rng.sample(early, 10))] + [[step] for step in rng.sample(early, 20 if FULL else 0)]
    for n, steps in enumerate(chains):
        run = tmp_path / str(n)
        for step in steps:
            kill_at_step(go_on(server, data, run), run, step, rng.uniform(0, 0.02))
        go_on(server, data, run).succeed()
        note(f"killed at {steps}: {fingerprint(run)}, unbroken {unbroken}")
        assert fingerprint(run) == unbroken
        assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_a_run_stopped_by_sigterm_at_any_moment_equals_the_unbroken_one(server, data, unbroken, tmp_path):
    """While it reads, trains or validates: saved, exit 0, one line; before the first step nothing is left."""
    rng, codes = random.Random(1), set()
    for n in range(10 if FULL else 2):
        run = tmp_path / str(n)
        child = go_on(server, data, run)
        began = run / (".lock", "last.pt", "log.csv")[min(n, 2)]             # it reads; has trained; anything after
        while child.process.is_alive() and not began.exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.5) if n > 1 else 0)
        code, text = child.end(signal.SIGTERM)
        codes.add(code)
        note(f"SIGTERM: exit {code}, {text.splitlines()[-1:]}")
        assert "Traceback" not in text
        *before, last = text.splitlines()                                   # the folder may have been opened already
        if (run / "last.pt").exists():
            assert code == 0
            assert re.fullmatch(r"stopped at step \d+ \(SIGTERM\); go on with: .* --resume .*", last)
        else:
            assert code == 130
            assert last.startswith("train_actnet.py: interrupted; not saved")
            assert all(line.startswith(f"{run}: act, ") for line in before)
        go_on(server, data, run).succeed()
        assert fingerprint(run) == unbroken
    assert codes == {0, 130}


def test_sigterm_to_the_whole_process_group(data, tmp_path):
    """As a scheduler sends it: to the readers of --cache disk too."""
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "train_actnet.py", *arguments(data, run, "--iters", 5000, "--cache", "disk")]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    while process.poll() is None and not (run / "last.pt").exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert re.match(r"stopped at step \d+ \(SIGTERM\)", text.splitlines()[-1])


def rise(n=0):
    """Each validation is better than the one before; SIGKILL after the n-th, whose networks best.pt holds already."""
    calls, real = itertools.count(1), train_actnet.Run.validate

    def validate(self, actnet):
        evaluate.validate = lambda *_: dict(dice=[self.done / 1000] * 3, hd95_voxel=[0.0] * 3, entropy=0.1)
        row = real(self, actnet)
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return row
    train_actnet.Run.validate = validate


def test_a_run_killed_between_its_best_and_its_last_equals_the_unbroken_one(server, data, tmp_path):
    """Validations at 7, 10, 14, ... 40, 42, 49, 56, 60; checkpoints at the stages' ends alone: 10, 40, 60."""
    seldom = [*LONG, "--save-minutes", 60]
    Child(server, arguments(data, tmp_path / "whole", *seldom), rise).succeed()
    for n in (4, 9) if not FULL else range(1, 11):
        run = tmp_path / str(n)
        first = Child(server, arguments(data, run, *seldom), partial(rise, n))
        assert first.end()[0] == -signal.SIGKILL
        again = ["--resume", run] if (run / "last.pt").exists() else arguments(data, run, *seldom)
        Child(server, again, rise).succeed()
        assert fingerprint(run) == fingerprint(tmp_path / "whole")


def die_asking(n):
    """SIGKILL, or with -n SIGTERM, in the n-th question to the teachers: sixteen slices each."""
    calls, real = itertools.count(1), slices.ask

    def counted(*args):
        if next(calls) == abs(n):
            os.kill(os.getpid(), signal.SIGKILL if n > 0 else signal.SIGTERM)
        return real(*args)
    slices.ask = counted


@pytest.mark.parametrize("n", [1, 2, -1, -2])
def test_a_run_stopped_while_answers_are_made_equals_the_unbroken_one(server, data, unbroken, tmp_path, n):
    """The first questions are the first round's, to the teacher; the second's are to teacher and co-teacher."""
    run = tmp_path / "run"
    code, text = go_on(server, data, run, partial(die_asking, n)).end()
    assert code == (0 if n < 0 else -signal.SIGKILL), text
    assert ("stopped at step" in text) == (n < 0)
    go_on(server, data, run).succeed()
    assert fingerprint(run) == unbroken


@pytest.fixture(scope="session")
def finished(server, data, tmp_path_factory):
    """A run of 4 steps: teacher 1, student 2, co-teaching 1; checkpoints of step 4 (last.pt) and 3 (previous.pt)."""
    run = tmp_path_factory.mktemp("finished") / "run"
    Child(server, arguments(data, run, "--iters", 4, "--stages", 1, 2, 1)).succeed()
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


SAMPLE = {False: (2, 6, 9), True: (5, 8, 9)}                                             # of 12 or more, a second each


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_at_every_fsync_and_rename(server, finished, tmp_path, damaged):
    """Between the renames of a save, between best.pt and last.pt, before the summary; with last.pt whole and not."""
    def go(name, fault=None):
        run = tmp_path / name
        if not run.exists():
            shutil.copytree(finished, run)
            if damaged:
                (run / "last.pt").write_bytes(b"damaged")
        return run, Child(server, ["--resume", run, "--iters", 8], fault, not damaged)

    def summary(run):
        return json.loads((run / "summary.json").read_text())["last"]

    whole, child = go("whole")
    assert ("Going on from previous.pt, step 3" in child.succeed()) == damaged
    killed = 0
    for n in itertools.count(1) if FULL else SAMPLE[damaged]:
        run, child = go(str(n), partial(die_at, n))
        code, text = child.end()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        killed += 1
        assert load_checkpoint(run / "previous.pt")["step"] >= 2 or load_last(run)["step"] >= 4
        (run / "summary.json").unlink(missing_ok=True)                         # the old one, before anything was done
        go(str(n))[1].succeed()
        assert fingerprint(run) == fingerprint(whole)
        assert summary(run) == summary(whole)
        assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}
    assert killed >= (12 if FULL else 3)
    note(f"killed at each of {killed} fsyncs and renames, last.pt {'damaged' if damaged else 'whole'} before")


def test_disk_full_at_a_random_byte(server, finished, tmp_path):
    """The write that fails leaves the checkpoints before it, one line, and a run that goes on when there is room."""
    rng, results = random.Random(2), []
    shutil.copytree(finished, tmp_path / "whole")
    Child(server, ["--resume", tmp_path / "whole", "--iters", 8]).succeed()
    largest = max(p.stat().st_size for p in finished.iterdir())
    rooms = [700, 3000, *(rng.randrange(1, largest) for _ in range(38 if FULL else 1))]
    for n, room in enumerate(rooms):
        run = tmp_path / str(n)
        shutil.copytree(finished, run)
        code, text = Child(server, ["--resume", run, "--iters", 8], partial(full_disk, room)).end()
        results.append(code)
        assert code == 2, text
        assert "Traceback" not in text
        one_line(text.splitlines()[-1], "train_actnet.py: ", run)
        assert load_last(run)["step"] >= 4
        assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
        Child(server, ["--resume", run, "--iters", 8]).succeed()
        assert fingerprint(run) == fingerprint(tmp_path / "whole")
    note(f"disk full at {len(rooms)} sizes from {min(rooms)} to {max(rooms)} bytes: exit codes {set(results)}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gives up Linux capabilities")
def test_read_only_run_folder(server, run):
    before = files(run)
    run.chmod(0o555)
    fault = drop_root if os.geteuid() == 0 else None
    code, text = Child(server, ["--resume", run, "--iters", 8], fault).end()
    assert code == 2
    one_line(text, run, "Permission denied")
    assert files(run) == before


# ------------------------------------------------------------------------------------------------- numbers

def main(*argv):
    return train_actnet.main([str(a) for a in argv])


def test_nothing_that_is_not_finite_enters_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    """The loss of step 4 is finite, its gradient is not: the checkpoint due after it is not written."""
    steps, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        steps.append(None)
        if len(steps) == poisoned:
            self.param_groups[0]["params"][0].data[0] = math.inf
        return result
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    poisoned = 4
    assert main(*arguments(data, tmp_path / "a", "--iters", 9)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 3: the student's .* patient099_frame\d\d_slice_\d ", error), error
    last = load_checkpoint(tmp_path / "a/last.pt")
    assert last["step"] == 2
    assert all(v.isfinite().all() for net in last["networks"].values() for v in net.values())

    steps.clear()
    poisoned = 5
    assert main(*arguments(data, tmp_path / "b", "--iters", 90, "--val-every", 90, "--log-every", 90)) == 2
    assert re.search(r"step 5: loss nan", capsys.readouterr().err.splitlines()[-1])
    assert len(steps) <= 5 + 20                                                          # found at most 20 steps late


def flags():
    """What --deterministic asks of torch, seen from inside the run."""
    def describe(*args):
        on = torch.are_deterministic_algorithms_enabled()
        print("flags", on, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), flush=True)
        return real(*args)
    real, train_actnet.describe_commit = train_actnet.describe_commit, describe
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_deterministic_sets_what_torch_needs(server, data, tmp_path):
    for more, expected in (["--deterministic"], "flags True False :4096:8"), ([], "flags False True None"):
        run = arguments(data, tmp_path / str(len(more)), "--iters", 3, *more)
        assert expected in Child(server, run, flags).succeed().splitlines()


# ------------------------------------------------------------------------------------------------- what is resumed


def changed(**changes):
    """last.pt with other content; a dotted key goes one level down."""
    def change(last):
        content = load_checkpoint(last)
        for key, value in changes.items():
            above, _, key = key.rpartition("__")
            (content[above] if above else content)[key] = value
        torch.save(content, last)
    return change


def without(key, part):
    def change(last):
        content = load_checkpoint(last)
        del content[key][part]
        torch.save(content, last)
    return change


def change_h5(path, change):
    with h5py.File(path, "r+") as h:
        change(h)


BAD_LAST = {
    "absent": (Path.unlink, ("no such",)),
    "empty": (lambda p: p.write_bytes(b""), ("last.pt",)),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), ("damaged",)),
    "random bytes": (lambda p: p.write_bytes(random.Random(0).randbytes(9999)), ("damaged",)),
    "folder": (lambda p: p.unlink() or p.mkdir(), ("last.pt",)),
    "named pipe": (lambda p: p.unlink() or os.mkfifo(p), ("last.pt", "not a file")),
    "pickle that executes": (lambda p: p.write_bytes(pickle.dumps(Bomb(p.with_name("executed")), 2)), ("damaged",)),
    "the same in torch's zip": (lambda p: torch.save({"x": Bomb(p.with_name("executed"))}, p), ("damaged",)),
    "later version": (changed(format="act-net 2"), ("act-net 2", "version")),
    "best.pt in its place": (lambda p: shutil.copy(p.with_name("best.pt"), p), ("not the state of a run", "optimizer")),
    "step of text": (changed(step="two"), ("step",)),
    "negative step": (changed(step=-1), ("step",)),
    "config of a later version": (changed(config__zzz=1), ("zzz", "version")),
    "config of an earlier version": (without("config", "seed"), ("seed", "version")),
    "config of other types": (changed(config__batch="many"), ("--batch", "many")),
    "config with NaN": (changed(config__lr=math.nan), ("--lr", "nan")),
    "no config": (changed(config=None), ("config",)),
    "other widths": (changed(config__student=(2, 5)), ("start.pt", "fit")),
    "a network less": (without("networks", "coteacher"), ("fit", "coteacher")),
    "no optimiser": (changed(optimizer={}), ("fit",)),
    "optimiser of nothing": (changed(optimizer__state={}), ("fit", "optimiser")),
}


@pytest.mark.parametrize("name", BAD_LAST)
def test_resume_refuses_in_one_line(run, capfd, name):
    damage, words = BAD_LAST[name]
    (run / "previous.pt").unlink()
    damage(run / "last.pt")
    before = files(run)
    assert main("--resume", run, "--iters", 8) == 2
    one_line(capfd.readouterr().err, "train_actnet.py: ", *words)
    assert files(run) == before                                             # nothing executed, nothing written


@pytest.mark.parametrize("f", [f for f in fields(Config) if f.name not in MAY_CHANGE], ids=lambda f: f.name)
def test_resume_refuses_a_changed_option_by_name(run, capsys, f):
    saved, option = load_checkpoint(run / "last.pt")["config"][f.name], "--" + f.name.replace("_", "-")
    if f.metadata["choices"]:
        other = [next(c for c in f.metadata["choices"] if c != saved)]
    elif isinstance(f.default, tuple):
        other = [3, 4, 5][:len(f.default)] or ["elsewhere"]
    elif isinstance(saved, str):
        other = ["elsewhere"]
    else:
        other = [] if isinstance(saved, bool) else [saved + 1]
    assert main("--resume", run, "--iters", 8, option, *other) == 2
    one_line(capsys.readouterr().err, f"{option} may not change")


def test_resume_needs_the_same_slices(run, raw, data, tmp_path, capsys):
    """Batches are functions of (seed, step) over the slices: other slices would silently be another run."""
    shutil.copytree(data, tmp_path / "same")
    shutil.copytree(data, tmp_path / "other")
    change_h5(tmp_path / "other/data/slices/patient099_frame01_slice_1.h5",
              lambda h: h["image"].__setitem__((0, 0), 0.5))
    assert main("--resume", run, "--iters", 8, "--data", tmp_path / "other") == 2
    one_line(capsys.readouterr().err, "--data", tmp_path / "other")
    assert main("--resume", run, "--iters", 5, "--data", tmp_path / "same") == 0


def test_a_resumed_run_takes_the_threads_that_it_began_with(run, capsys, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(models, "idle_cores", lambda: 0)
    saved = load_checkpoint(run / "last.pt")
    assert saved["threads"] == before
    torch.save(saved | {"threads": 3}, run / "last.pt")
    try:
        assert main("--resume", run, "--iters", 5) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert "CPU, 3 threads" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["", "nowhere", "file", "loop", "x" * 300])
def test_resume_of_no_run(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    os.symlink("loop", "loop")
    assert main("--resume", given) == 2
    one_line(capsys.readouterr().err, given, *["last.pt"] * (given in ("", "nowhere")))      # no new run is started
    assert sorted(os.listdir()) == ["file", "loop"]


def test_out_that_holds_only_the_previous_checkpoint_is_not_overwritten(run, data, capsys):
    (run / "last.pt").unlink()                                                         # killed between the renames
    before = files(run)
    assert main(*arguments(data, run, "--iters", 4)) == 2
    one_line(capsys.readouterr().err, "--resume")
    assert files(run) == before


TORN = {
    "absent": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "binary": lambda p: p.write_bytes(random.Random(0).randbytes(5000)),
    "half a header": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "rows with text": lambda p: p.write_bytes(p.read_bytes() + b"2,a" + b"," * 12 + b"\n"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_damaged_log_does_not_stop_the_run(run, name):
    TORN[name](run / "log.csv")
    assert main("--resume", run, "--iters", 6) == 0
    steps = [int(row["step"]) for row in read_csv(run / "log.csv")]
    assert steps == [*([1, 2, 3, 4] if "text" in name else []), 5, 6]


def test_names_with_spaces_and_unicode(data, tmp_path, capsys):
    """And the command that a stopped run prints is the one that goes on; what is done is done."""
    shutil.copytree(data, tmp_path / "données 心")
    run = tmp_path / "my run's ✓ 心"
    assert main(*arguments(tmp_path / "données 心", run, "--minutes", 1e-9, "--iters", 3)) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "stopped at step 1 (--minutes)" in said
    assert load_checkpoint(run / "last.pt")["step"] == 1
    command = shlex.split(said.split("go on with: ")[1])
    assert command[1:] == ["train_actnet.py", "--resume", str(run)]
    assert main(*command[2:], "--minutes", 0) == 0
    assert load_checkpoint(run / "last.pt")["step"] == 3
    capsys.readouterr()
    for more, words in ([], "--iters"), (["--iters", 2], "can only be made longer"):
        assert main("--resume", run, *more) == 2
        one_line(capsys.readouterr().err, words)


def teacher(path, **kinds):
    net = UNet(2, 4, **kinds)
    save_checkpoint(path, dict(networks={"student": net.state_dict()}, architecture=net.architecture, better="student",
                               inference=dict(size=16, view="heart")))


START = {
    "teacher that executes": (lambda d, t: torch.save({"x": Bomb(t / "executed")}, t / "t.pt"), ("t.pt", "damaged")),
    "teacher of 3 classes": (lambda d, t: teacher(t / "t.pt", num_classes=3), ("t.pt", "num_classes")),
    "teacher of 3 channels": (lambda d, t: teacher(t / "t.pt", in_channels=3), ("t.pt", "in_channels")),
    "no slices": (lambda d, t: (t / "data/train_slices.list").write_text(""), ("train_slices.list", "empty")),
    "no val": (lambda d, t: (t / "data/val.list").write_text(""), ("val.list", "empty")),
    "val without label": (lambda d, t: change_h5(t / "data/data/patient028_frame01.h5", lambda h: h.pop("label")),
                          ("patient028_frame01", "label")),
}


@pytest.mark.parametrize("name", START)
def test_a_run_that_cannot_start_leaves_nothing(data, tmp_path, capfd, name):
    damage, words = START[name]
    shutil.copytree(data, tmp_path / "data")
    damage(data, tmp_path)
    before = files(tmp_path)
    more = ["--teacher-ckpt", tmp_path / "t.pt"] if "teacher" in name else []
    assert main(*arguments(tmp_path / "data", tmp_path / "run", "--iters", 4, *more)) == 2
    one_line(capfd.readouterr().err, *words)
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_one_line(data, tmp_path, capfd):
    """310 GB of slices: refused by the allocator."""
    more = ["--size", 2048, "--batch", 65536, "--labeled-batch", 32768, "--method", "sup"]
    assert main(*arguments(data, tmp_path / "run", *more)) == 2
    one_line(capfd.readouterr().err.splitlines()[-1], "memory", "--batch")


@pytest.mark.parametrize(("error", "remedy"), [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "install gcc"),
    (subprocess.CalledProcessError(1, ["gcc", "driver.c"]), "python3-dev"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm"),
    (MemoryError(), "out of memory"),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), None)])
def test_what_the_machine_lacks_is_named(error, remedy, data, tmp_path, monkeypatch, capfd):
    """A fault of a kernel is no such thing, and is raised."""
    monkeypatch.setattr(train_actnet.ActNet, "step", lambda *args: (_ for _ in ()).throw(error))
    with contextlib.nullcontext() if remedy else pytest.raises(torch.AcceleratorError):
        assert main(*arguments(data, tmp_path / "run")) == 2
        one_line(capfd.readouterr().err.splitlines()[-1], "train_actnet.py: ", remedy)


def test_a_table_that_cannot_grow_is_named():
    with pytest.raises(DataError, match="/dev/full"):
        train_actnet.append_row(Path("/dev/full"), {"step": 1})


# ------------------------------------------------------------------------------------------------- preparation

def test_a_preparation_killed_at_random_moments(server, raw, data, tmp_path):
    """Run again after each kill: what was finished is not made again, and the end equals an unbroken preparation."""
    rng, halves = random.Random(3), []
    for n in range(20 if FULL else 4):
        out, there = tmp_path / str(n), rng.randrange(14)
        child = Child(server, [raw, out, "--allow-missing", "--workers", 2], slow_files, module="data_prep")
        while child.process.is_alive() and len(list(out.glob("data/**/*.h5"))) < there:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.06))
        child.end(signal.SIGKILL)
        done = {p: p.stat().st_mtime_ns for p in out.glob("data/**/patient*.h5")}
        halves.append(len(done))
        Child(server, [raw, out, "--allow-missing", "--workers", 1], module="data_prep").succeed()
        assert files(out) == files(data)                                                     # no .part, no .lock
        assert {p: p.stat().st_mtime_ns for p in done} == done
    note(f"preparation killed {len(halves)} times, with {halves} of 14 files there")
    assert sum(0 < n < 14 for n in halves) >= 2


FRAME = "patient028_frame01.nii.gz"
HOSTILE = {                                                 # the file, what becomes of it, words of the line
    "symlink loop": (FRAME, lambda p: p.unlink() or os.symlink(p.name, p), ("frame01", "absent")),
    "Info.cfg a loop": ("Info.cfg", lambda p: p.unlink() or os.symlink(p.name, p), ("Info.cfg",)),
    "named pipe": (FRAME, lambda p: p.unlink() or os.mkfifo(p), ("frame01", "is not a file")),
    "Info.cfg a pipe": ("Info.cfg", lambda p: p.unlink() or os.mkfifo(p), ("Info.cfg",)),
    "folder": (FRAME, lambda p: p.unlink() or p.mkdir(), ("frame01",)),
    "overflows float32": (FRAME, lambda p: phantom.write_nifti(p, np.arange(5280).reshape(3, 40, 44) * 1e300, ZOOMS),
                          ("frame01", "overflows")),
    "one frame for both": ("Info.cfg", lambda p: p.write_text("ED: 1\nES: 1\nGroup: NOR\n"),
                           ("Info.cfg", "both frame 1")),
    "NUL in the group": ("Info.cfg", lambda p: p.write_text("ED: 1\nES: 7\nGroup: N\0R\n"), ("Info.cfg", "Group")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_raw_files(raw, tmp_path, capfd, name):
    file, damage, words = HOSTILE[name]
    shutil.copytree(raw, tmp_path / "raw")
    damage(tmp_path / "raw/training/patient028" / file)
    assert refuses_or(lambda: data_prep.read_patient(tmp_path / "raw/training/patient028", True)) is None
    arguments = [str(tmp_path / "raw"), str(tmp_path / "out"), "--allow-missing", "--workers", "1"]
    assert data_prep.main(arguments) == 2
    one_line(capfd.readouterr().err, *words)
    assert not (tmp_path / "out").exists()


def test_a_chunk_larger_than_the_array_is_refused_before_it_is_read(tmp_path):
    """HDF5 reads whole chunks: 2 GB, deflated to 2 MB, for 32 numbers."""
    path = tmp_path / "data/patient028_frame01.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as h:
        space = dict(shape=(2, 4, 4), maxshape=(None,) * 3, chunks=(1024, 1024, 512), compression="gzip")
        chunk = h.create_dataset("image", dtype=np.float32, **space).id
        chunk.write_direct_chunk((0, 0, 0), bytes(2 << 20))
    with pytest.raises(DataError, match=r"in chunks of \(1024, 1024, 512\), above the limit"):
        data_prep.read_volume(tmp_path, "patient028_frame01")


def test_a_list_or_manifest_that_is_a_pipe_is_not_waited_for(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for name in ("val.list", "manifest.json"):
        (tmp_path / "data" / name).unlink()
        os.mkfifo(tmp_path / "data" / name)
    faults = data_prep.check(tmp_path / "data")
    assert [f.split(": ")[1].split(";")[0] for f in faults] == ["is not a file"] * 2


# ------------------------------------------------------------------------------------------------- fuzz

def fuzz(examples):
    return settings(max_examples=MORE * examples, derandomize=not FULL, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


def refuses_or(call):
    """-> the result, or None where it was refused in one line; a warning is a line too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except DataError as error:
            result = None
            one_line(str(error).encode().decode())
    assert not caught, caught[0]
    return result


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


TEXT = st.text(st.characters(), max_size=9)                                                     # lone surrogates too
NUMBERS = st.one_of(st.integers(0, 30), st.integers(), TEXT)


@fuzz(600)
@given(ed=NUMBERS, es=NUMBERS, group=TEXT, tail=st.binary(max_size=60), order=st.permutations(range(4)))
def test_fuzz_info(folder, ed, es, group, tail, order):
    lines = [f"{k}: {v}".encode("utf-8", "surrogatepass") for k, v in (("ED", ed), ("ES", es), ("Group", group))]
    (folder / "Info.cfg").write_bytes(b"\n".join([*lines, tail][i] for i in order))
    found = refuses_or(lambda: data_prep.read_info(folder))
    if found:
        assert 0 <= found["ED"] != found["ES"] <= 9999
        data_prep.h5_bytes(np.zeros((2, 2), np.float32), None, {"group": found["Group"]})


NAMES = st.one_of(TEXT, st.from_regex(data_prep.VOLUME, fullmatch=True),
                  st.from_regex(data_prep.SLICE, fullmatch=True), st.sampled_from(["../../x", "/etc/passwd"]))


@fuzz(600)
@given(split=st.sampled_from(["train", "val", "train_slices"]), blob=st.just(b"") | st.binary(max_size=9),
       names=st.lists(NAMES, max_size=6))
def test_fuzz_lists(folder, split, blob, names):
    for each in ("train", "val", "test", "train_slices"):
        (folder / f"{each}.list").write_text("")
    (folder / f"{split}.list").write_bytes("\n".join(names).encode("utf-8", "surrogatepass") + blob)
    pattern = data_prep.SLICE if split == "train_slices" else data_prep.VOLUME
    for name in refuses_or(lambda: data_prep.read_list(folder, split, pattern)) or ():
        assert data_prep.h5_path(folder, name).resolve().parent == (folder / "data").resolve()
    for fault in refuses_or(lambda: data_prep.check(folder)):
        assert "\n" not in fault
        fault.encode()


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | TEXT, max_leaves=9,
                    extend=lambda j: st.lists(j, max_size=3) | st.dictionaries(TEXT, j, max_size=3))


@fuzz(250)
@given(manifest=st.one_of(st.binary(max_size=40), JSON.map(lambda j: json.dumps(j).encode()),
                          st.dictionaries(TEXT, JSON, max_size=3).map(lambda j: json.dumps({"sha256": j}).encode()),
                          st.just(b"[" * 10**5)))
def test_fuzz_manifest(folder, data, manifest):
    for path in data.glob("*.list"):
        (folder / path.name).write_text("")
    (folder / "manifest.json").write_bytes(manifest)
    for fault in refuses_or(lambda: data_prep.check(folder)):
        assert "\n" not in fault
        fault.encode()
        assert "manifest.json" in fault
    (folder / "manifest.json").unlink()


# Where a NIfTI header holds its size, dim[0..4], datatype, bitpix, pixdim[0..3], vox_offset, slope, intercept, units,
# qform_code, magic and extension flag.
OFFSETS = st.sampled_from([0, 40, 42, 44, 46, 48, 70, 72, 76, 80, 84, 88, 108, 112, 116, 123, 252, 344, 348])
SHORTS = st.sampled_from([0, 1, -1, 2, 3, 4, 16, 64, 512, 1536, 1792, 32767, -32768]) | st.integers(-32768, 32767)


@fuzz(600)
@given(edits=st.lists(st.tuples(OFFSETS, SHORTS, st.sampled_from(["<i2", "<f4", ">i2"])), max_size=4),
       cut=st.none() | st.integers(0, 500), tail=st.binary(max_size=40))
def test_fuzz_nifti_headers(folder, edits, cut, tail):
    image = nib.Nifti1Image(np.arange(5 * 4 * 3, dtype=np.int16).reshape(5, 4, 3), None)
    content = bytearray(image.to_bytes())
    for at, value, kind in edits:
        packed = np.array(value, kind).tobytes()
        content[at:at + len(packed)] = packed
    path = folder / "patient028_frame01.nii.gz"
    path.write_bytes(gzip.compress(bytes(content[:cut]) + tail, 1))
    found = refuses_or(lambda: data_prep.load_nifti(path))
    if found:
        array, spacing, _ = found
        assert array.ndim in (3, 4)
        assert 0 < array.size <= 10**6
        assert np.isfinite(array).all()
        assert all(0 < s < math.inf for s in spacing)
    if found is not None and not edits and cut is None:
        assert np.array_equal(array.T.ravel(), range(60))                                # (X, Y, Z)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.integers(-2, 70),
                   st.lists(st.integers(-2, 9), max_size=3), st.tuples(st.integers(-1, 80), st.integers(-1, 80)))


@fuzz(150)
@given(field=st.sampled_from([f.name for f in fields(Config) if f.name != "out"]), value=VALUES)
def test_fuzz_config_of_a_checkpoint(folder, finished, field, value):
    """A config that passes meets data that are not there; every other one is refused by the field's name."""
    content = load_checkpoint(finished / "last.pt")
    content["config"].update({"data": str(folder / "absent"), field: value})
    torch.save(content, folder / "last.pt")
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")) as err:
        assert main("--resume", folder) == 2
    err.seek(0)
    text = err.read()
    one_line(text)
    if "absent" in text:
        default = getattr(Config(), field)
        assert type(tuple(value) if isinstance(value, list) else value) is type(default)
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(default, int | float) or value >= -1
    elif field != "data":
        assert "--" + field.replace("_", "-") in text




# ------------------------------------------------------------------------------------------------- command line

SCRIPTS = {"data_prep.py": data_prep.main, "phantom.py": phantom.main, "train_actnet.py": train_actnet.main,
           "evaluate.py": evaluate.main, "predict.py": predict.main}


def call(script, *argv):
    """-> the exit code; a script that argparse ends counts as one that returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        try:
            return SCRIPTS[script](list(argv))
        except SystemExit as end:
            return end.code or 0


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """A screen of 120 columns in an empty folder."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, "bench.py"])
def test_help_fits_a_screen_in_groups_and_shows_defaults(terminal, monkeypatch, capsys, script):
    if script == "bench.py":
        monkeypatch.syspath_prepend(ROOT / "kernels")
        monkeypatch.setitem(SCRIPTS, script, lambda argv: importlib.import_module("bench").main())
    assert call(script, "--help") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 54
    assert max(map(len, lines)) <= 120
    defaults = {"data_prep.py": ["data/ACDC", "one per core"], "predict.py": ["predictions", "on"],
                "evaluate.py": ["[test]", "the better one on val", "off; predict.py: on", "data/ACDC", "folder/SPLIT"],
                "phantom.py": ["data/phantom/raw", "20", "0", "one per core"],
                "train_actnet.py": [str(f.default) for f in fields(Config) if type(f.default) is float and f.default]
                + [f"[{f.default}]" for f in fields(Config) if f.metadata["choices"]], "bench.py": []}[script]
    assert not [d for d in defaults if d not in text]
    groups = re.findall(r"^[a-z' ]+:$", text, re.MULTILINE)
    assert len(groups) >= {"data_prep.py": 3, "train_actnet.py": 4}.get(script, 0)


def wrong_options():
    yield from (("data_prep.py", [], "RAW"), ("data_prep.py", ["--phantom", "out", "--seed", "1"], "phantom.py"),
                ("data_prep.py", ["a", "b", "c"], "c"), ("evaluate.py", [], ""))
    for script in SCRIPTS:
        yield script, ["x", "--magic"], "--magic"
    yield "data_prep.py", ["raw", "out", "--workers", "99"], "--workers"
    for option, value in (("--patients", "x"), ("--patients", "81"), ("--seed", "-1"), ("--workers", "99")):
        yield "phantom.py", ["out", option, value], option
    for option, value in (("--split", "train"), ("--which", "teacher"), ("--gpu", "x")):
        yield "evaluate.py", ["best.pt", option, value], option
    for option in ("--predict", "--onnx", "--time"):
        yield "evaluate.py", ["best.pt", option, "x"], "predict.py does this: python predict.py CKPT PATH..."
    for argv, word in (([], "CHECKPOINT"), (["x"], "PATH"), (["x", "y", "--time"], "one"), (["x", "--gpu", "z"], "z"),
                       (["x", "--time", "--entropy"], "--entropy"), (["x", "y", "--data", "z"], "--data"),
                       (["x", "--time", "--axes", "xyz"], "--axes")):
        yield "predict.py", argv, word
    for option in ("preset", "resume"):
        yield "train_actnet.py", [f"--{option}"], f"--{option}"
    yield "train_actnet.py", ["--cpu", "--gpu", "0"], "--gpu"
    yield "train_actnet.py", ["--bench"], "tests.bench_step"
    yield "train_actnet.py", ["--teacher-ckpt", "t.pt", "--method", "sup"], "--teacher-ckpt"
    yield "train_actnet.py", ["--student", "6", "4", "--size", "32"], "--size"
    for f in fields(Config):
        option = "--" + f.name.replace("_", "-")
        values = {bool: [], int: ["x", "", "1.5", "nan", "-7", str(10**30)], str: [],
                  float: ["x", "", "nan", "inf", "-inf", "-7", "1e400"],
                  tuple: [("4",), ("4", "x"), ("0", "4"), ("2", "0"), ("40", "4"), ("-1", "-1"), (str(10**9), "1")]}
        for value in values[type(f.default)] if f.default != () else []:                      # any name is a name
            value = (value,) if isinstance(value, str) else value
            yield "train_actnet.py", [option, *value] if len(value) > 1 else [f"{option}={value[0]}"], option
        if f.metadata["choices"]:
            yield "train_actnet.py", [option, "magic"], option


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_wrong_option_and_value_is_one_line_and_exit_2(terminal, capsys, script):
    tried = 0
    for _, argv, word in (w for w in wrong_options() if w[0] == script):
        assert call(script, *argv) == 2, argv
        error = capsys.readouterr().err
        one_line(error, script, word)
        assert os.listdir() == [], argv
        tried += 1
    assert tried > {"train_actnet.py": 150}.get(script, 3)
    note(f"{script}: {tried} wrong options and values")


PATHS = ["", "nowhere", "file", "loop", "x" * 300, "x/" * 3000, "pipe"]


@pytest.mark.parametrize("argv", [
    ["data_prep.py", None], ["data_prep.py", "--check", None], ["data_prep.py", "raw", None, "--allow-missing"],
    ["phantom.py", None],
    ["train_actnet.py", "--cpu", "--data", None], ["train_actnet.py", "--cpu", "--resume", None],
    ["train_actnet.py", "--cpu", "--data", "data", "--out", None, "--teacher-ckpt", "nowhere"],
    ["train_actnet.py", "--cpu", "--data", "data", "--teacher-ckpt", None, "--method", "kd"],
    ["evaluate.py", None],
], ids=lambda argv: " ".join(a or "PATH" for a in argv))  # fmt: skip
def test_every_wrong_path_is_one_line_and_exit_2(terminal, capfd, raw, data, argv):
    os.symlink(data, "data")
    os.symlink(raw, "raw")
    Path("file").write_text("")
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    before = sorted(os.listdir())
    right = ["", "nowhere"] if "raw" in argv else [""] if {"--check", "kd"} & set(argv) else []   # nothing wrong there
    right += ["nowhere"] if "phantom.py" in argv else []
    for path in (p for p in PATHS if p not in right):
        assert call(*(path if a is None else a for a in argv)) == 2, path
        one_line(capfd.readouterr().err, argv[0])
        assert sorted(os.listdir()) == before, path

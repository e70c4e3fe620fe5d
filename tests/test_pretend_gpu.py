"""Training and evaluation on a GPU that is not there: each tensor computes on the CPU and remembers where it would be.

An operator that mixes the two places, or asks a tensor of the GPU for its value, is found on any machine. What this
cannot see: kernels (tests/test_kernels.py), numerics, memory (pinned, too), streams.
"""
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch._dynamo  # it reads torch.Generator, which must still be the true one
from conftest import ROOT
from test_train import SMALL, config, data, last_stage  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import models
import train_actnet
from train_actnet import main

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Gpu(TorchFunctionMode):
    """device="cuda" becomes the CPU and a mark on the storage, .cpu() takes the mark off, x.device tells of it."""

    def __init__(self):
        super().__init__()
        self.marked, self.mixed, self.waits, self.operators = {}, set(), set(), Operators(self)

    def __enter__(self):
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operators.__exit__(*error)

    def holds(self, x):
        return x.untyped_storage().data_ptr() in self.marked

    def mark(self, x):
        if x.numel():                                              # kept, so that no other storage gets its address
            self.marked.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage())
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [torch.device(v) for v in (*args[1:], kwargs.get("device")) if isinstance(v, torch.device)
                 or (isinstance(v, str) and v.split(":")[0] in ("cuda", "cpu"))]
        here = isinstance(args[0], torch.Tensor) and self.holds(args[0]) if args else False
        if name == "__get__" and here and func(*args, **kwargs) == CPU:
            return GPU
        if here and name in ("tolist", "numpy"):                                # no operator; numpy() would be refused
            (self.waits if name == "tolist" else self.mixed).add(f"{name} at {line()}")
        if name == "cpu" or (name == "to" and given):
            to_gpu = name == "to" and given[0].type == "cuda"
            rest = [CPU if v == GPU else v for v in args[1:]]
            out = func(args[0], *rest, **{**kwargs, **({"device": CPU} if "device" in kwargs else {})})
            if to_gpu != here:
                out = out.clone()                                   # a new tensor at the other place
                self.marked.pop(out.untyped_storage().data_ptr(), None)
                if here:
                    self.waits.add(f"{name} at {line()}")
            return self.mark(out) if to_gpu else out
        if given and given[0].type == "cuda" and name != "_parse_to":
            return self.mark(func(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor) and x.numel()]
        places = [self.gpu.holds(x) for x in given]
        name = func.__name__.split(".")[0]
        out = func(*args, **(kwargs or {}))
        if any(places) and name == "copy_":
            if places == [False, True]:
                self.gpu.waits.add(f"{name} at {line()}")
        elif any(places):
            masked = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given[1:])
            if masked or name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2"):
                self.gpu.waits.add(f"{name} at {line()}")
            of_one_place = name in ("stack", "cat") or name.startswith(("_foreach", "_fused"))     # scalars as well
            if not all(p or (x.ndim == 0 and not of_one_place) for p, x in zip(places, given, strict=True)):
                self.gpu.mixed.add(f"{name} at {line()}")
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.gpu.mark(x)
        return out


def line():
    """Where the project's code is just now."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in (ROOT, ROOT / "kernels")]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "elsewhere"


@pytest.fixture
def gpu(monkeypatch):
    class Generator:
        def __new__(cls, device=None, true=torch.Generator):
            return true()

    for module in (models, train_actnet, evaluate):
        monkeypatch.setattr(module, "pick_device", lambda gpu=None, cpu=False, threads=None: GPU)
    monkeypatch.setattr(torch, "Generator", Generator)
    true_scaler = torch.amp.GradScaler                        # disables itself where torch finds no GPU
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: true_scaler("cpu", enabled=enabled))
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype                   # C++ knows the true place
    monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(
        lambda *args, **kwargs: {(GPU, dtype): v for (_, dtype), v in group(*args, **kwargs).items()}))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    return Gpu()


def test_mixing_and_waiting_are_seen(gpu):
    with gpu:
        x = torch.arange(3, device=GPU)
        assert [x.device, x.sum().device, x.to(CPU).device, x.cpu().to(GPU).device] == [GPU, GPU, CPU, GPU]
        assert [len(gpu.mixed), len(gpu.waits)] == [0, 2]
        assert float((x + torch.ones(3)).sum()) == sum(x.tolist()) + 3
        x.numpy()
        assert [len(gpu.mixed), len(gpu.waits)] == [2, 4]
        torch.stack([x.sum(), torch.tensor(1)])
        torch.zeros(3).copy_(x)
        assert len(x[x > 0]) == 2
    assert [len(gpu.mixed), len(gpu.waits)] == [3, 6]


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize("changes", [
    {}, {"cache": "ram"}, {"cache": "disk"}, {"method": "sup"}, {"method": "mt"}, {"method": "kd"},
    {"teacher_along": True}, {"method": "kd", "teacher_along": True},
    {"view": "whole", "optimizer": "sgd", "consistency": "mse", "distill": "mse", "dice": "squared"},
    {"precision": "fp16"}, {"precision": "fp16", "optimizer": "sgd"},
], ids=lambda changes: "-".join(map(str, changes.values())) or "act")
def test_a_step_stays_on_the_gpu_and_never_waits(data, gpu, changes):  # noqa: F811
    with gpu:
        slices, act = last_stage(config(data, **changes), GPU)
        assert all(gpu.holds(v) for net in act.nets.values() for v in net.state_dict().values())
        gpu.waits.clear()
        for step in range(2):
            assert gpu.holds(act.step(step, *slices.batch(step)))
    assert [gpu.mixed, gpu.waits] == [set(), set()]


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_runs_and_an_evaluation_mix_nothing(data, gpu, tmp_path):  # noqa: F811
    options = ["--data", str(data), *(o for o in SMALL if o != "--cpu")]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    best = str(first / "best.pt")
    with gpu:
        assert main([*options, "--out", str(first)]) == 0
        assert main(["--resume", str(first), "--iters", "6"]) == 0
        assert main([*options, "--out", str(third), "--method", "sup", "--network", "teacher"]) == 0
        teacher = str(third / "best.pt")
        assert main([*options, "--out", str(second), "--init", best, "--teacher-ckpt", teacher]) == 0
        assert evaluate.main([best, "--data", str(data), "--find-heart"]) == 0
    assert gpu.marked
    assert gpu.mixed == set()

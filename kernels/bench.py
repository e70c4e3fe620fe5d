"""
The losses of this folder, forward and backward, against plain torch, torch.compile and Liger's KL.

    python kernels/bench.py --csv results/bench.csv         # appends one row per measurement; 4 minutes on a GPU
    python kernels/bench.py                                 # without CUDA: the references against each other

What is timed: one call and its gradient for the student's logits, in a CUDA graph, so that Python's launches hide no
kernel ("launch" in the column `method`: capture failed or was not tried, and the launches are in the figure). Inputs
and gradients rotate through three L2 caches of 60 MB; rows with cache=hot repeat one set that fits, each gradient in
the last one's place. A figure: a rotation's time over its number of sets; p20, p50, p80 over 50 rotations. A row
without figures says in `method` why it has none. First come the rows of training (layout=training).
    gb_s     the bytes that our kernels move for this loss (see the docstrings), over p50: comparable between rows
    share    gb_s over the bandwidth of a device-to-device copy of 1 GB, measured in the same run (read + write counted)
    extra_mb peak memory beyond the inputs; gradient_mb what one gradient takes
Implementations: ours; eager, the reference; compile, the reference under torch.compile; parts, our three small losses
with their gradients added by autograd, beside student_loss; liger, its KL on the permuted copy, where installed.
"""

import argparse
import csv
import datetime
import itertools
import math
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from dice_ce import dice_ce, dice_ce_reference
from softmax_kl import softmax_kl, softmax_kl_reference, softmax_mse, softmax_mse_reference
from student_loss import student_loss, student_loss_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TRAINING = [(24, 4, 160, 160), (24, 4, 256, 256)]  # the default window, the paper's
SHAPES = [(24, 4, 256, 256), (32, 4, 128, 128), (8, 9, 512, 512), (1, 4, 216, 256)]  # ours; a crop; CT; one slice
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TAU = 4.0
WEIGHTS = (1.0, 1.0, 0.1, 0.1)  # of dice, ce, kd, co in the student's loss
L2 = 60e6


def liger_kl():
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean")

    def loss(s, t):
        rows = [x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float() / TAU for x in (s, t)]  # (N H W, C)
        return divergence(F.log_softmax(rows[0], 1), F.softmax(rows[1], 1)) * TAU**2

    return loss


def weighted(terms):
    return sum(w * x for w, x in zip(WEIGHTS, terms, strict=True))


def parts(s, y, t, c):
    kd = softmax_kl(s, t, TAU, expected_grad=WEIGHTS[2])
    co = softmax_mse(s, c, expected_grad=WEIGHTS[3])
    return weighted((*dice_ce(s[: len(y)], y), kd, co))


def parts_reference(s, y, t, c):
    return weighted(
        (*dice_ce_reference(s[: len(y)], y), softmax_kl_reference(s, t, TAU), softmax_mse_reference(s, c, 1.0))
    )


LOSSES = {  # name: (ours, reference, what its arguments are)
    "softmax_kl": (lambda s, t: softmax_kl(s, t, TAU), lambda s, t: softmax_kl_reference(s, t, TAU), "st"),
    "softmax_mse": (lambda s, t: softmax_mse(s, t, TAU), lambda s, t: softmax_mse_reference(s, t, TAU), "st"),
    "dice_ce": (lambda s, y: sum(dice_ce(s, y)), lambda s, y: sum(dice_ce_reference(s, y)), "sy"),
    "student_loss": (
        lambda s, y, t, c: weighted(student_loss(s, y, t, c, tau=TAU, expected_grads=WEIGHTS)),
        lambda s, y, t, c: weighted(student_loss_reference(s, y, t, c, tau=TAU)),
        "sytc",
    ),
}


def make_inputs(kind, shape, dtype, device, layout="contiguous"):
    """s is the leaf; uint8 labels; for student_loss the first half of the slices is labelled. layout: of all logits;
    "training": s channels_last, as convolutions leave it, t and c contiguous, as they leave the loop's roll and cat."""
    n, c, h, w = shape
    out = []
    for name in kind:
        if name == "y":
            labeled = n if kind == "sy" else max(n // 2, 1)
            out.append(torch.randint(0, c, (labeled, h, w), device=device, dtype=torch.uint8))
        else:
            last = layout == "channels_last" or (layout == "training" and name == "s")
            form = torch.channels_last if last else torch.contiguous_format
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=form)
            out.append(x.requires_grad_(name == "s"))
    return out


def moved(loss, shape, itemsize, guessed):
    """Bytes of our kernels, as the docstrings count them: u logits, l labels; one row per loss."""
    n, c, h, w = shape
    u, l, labeled = n * c * h * w * itemsize, n * h * w, max(n // 2, 1) / n  # noqa: E741
    if loss == "dice_ce":
        return 3 * u + 2 * l
    if loss == "student_loss":
        return labeled * u + (4 if guessed else 7) * u + 2 * labeled * l
    return (3 if guessed else 5) * u


class ByteCounter(TorchDispatchMode):
    """Bytes that torch's kernels read and write: every tensor in and out of an operator, views and expansions free."""

    total = kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(v) if isinstance(x, torch.Tensor)] for v in (args, out))
        known = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in made if x.untyped_storage().data_ptr() not in known]
        if made and "empty" not in func.__name__:
            if "new_" in func.__name__ or "_like" in func.__name__:
                given = []  # only their shape
            # An expanded scalar is one element in memory, whatever its shape says.
            self.total += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
            self.kernels += 1
        return out


def count_bytes(fn, args):
    """(bytes, kernels) of one forward and backward in eager mode."""
    with ByteCounter() as counter:
        torch.autograd.grad(fn(*args), args[0])
    return counter.total, counter.kernels


# ---- measuring -------------------------------------------------------------------------------------------------------


def step(fn, args):
    return torch.autograd.grad(fn(*args), args[0])[0]


def quantiles(seconds):
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[1] * 1e3, statistics.median(seconds) * 1e3, cuts[7] * 1e3


def time_cuda(fn, sets, hot=False, capture=True, repeats=50):
    """((p20, p50, p80) in ms per set, how)."""

    def rotate():  # all gradients alive, so that they rotate too; hot: none, so that each lies where the last one lay
        return deque((step(fn, args) for args in sets), maxlen=0 if hot else None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for args in sets[:3]:
            step(fn, args)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    replay, method, home = rotate, "launch", torch.cuda.current_stream()
    try:
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # its own: a failed capture leaves it broken
                kept = rotate()  # noqa: F841
            replay, method = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.set_stream(home)  # torch leaves the broken one current where the capture's end fails
        torch.cuda.synchronize()
    seconds = []
    for i in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        if i >= 5:
            seconds.append(start.elapsed_time(end) / 1e3 / len(sets))
    return quantiles(seconds), method


def time_cpu(fn, sets, repeats=4):
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        step(fn, sets[i % len(sets)])
        seconds.append(time.perf_counter() - began)
    return quantiles(seconds[1:]), "launch"


def peak_extra(fn, args):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(fn, args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth():
    source = torch.empty(2**28, device="cuda")  # 1 GB: no cache holds it
    target = torch.empty_like(source)
    seconds = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def plan(cuda):
    """(loss, implementation, shape, dtype, layout, hot): training, layouts, the large shape in full, others in bf16."""
    if not cuda:
        for loss in LOSSES:
            yield from ((loss, "eager", SHAPES[1], d, "contiguous", False) for d in ("fp32", "bf16"))
        yield from (("student_loss", "parts", SHAPES[1], d, "contiguous", False) for d in ("fp32", "bf16"))
        return
    names = {loss: ["ours", "eager", "compile"] for loss in LOSSES}
    names["softmax_kl"].append("liger")
    names["student_loss"].append("parts")
    for shape, loss in itertools.product(TRAINING, ("student_loss", "dice_ce")):
        yield from ((loss, i, shape, "bf16", "training", False) for i in names[loss])
    for loss in LOSSES:
        yield from ((loss, i, SHAPES[0], "bf16", "channels_last", False) for i in ("ours", "eager"))
        yield loss, "ours", SHAPES[1], "bf16", "contiguous", True
    for shape in SHAPES:
        for dtype, loss in itertools.product(DTYPES if shape == SHAPES[0] else ("bf16",), LOSSES):
            yield from ((loss, i, shape, dtype, "contiguous", False) for i in names[loss])


def implementation(loss, name, cuda):
    ours, reference, _ = LOSSES[loss]
    if name == "compile":
        torch._dynamo.reset()  # or eight shapes exhaust the recompile limit
        return torch.compile(reference, dynamic=False)
    if name == "liger":
        return liger_kl()
    return {"ours": ours, "eager": reference, "parts": parts if cuda else parts_reference}[name]


def environment(cuda):
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()} {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"), "commit": commit or "unknown",
        "device": device, "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", ""),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--minutes", type=float, help="start no further measurement after this time [4; 0.7 on a CPU]")
    args = parser.parse_args()
    cuda, began = torch.cuda.is_available(), time.perf_counter()
    minutes = (4 if cuda else 0.7) if args.minutes is None else args.minutes
    header, copy = environment(cuda), copy_bandwidth() if cuda else math.nan
    print(", ".join(f"{k} {v}" for k, v in header.items()))
    print(f"device-to-device copy {copy:.0f} GB/s" if cuda else "No CUDA: plain torch on a CPU. NOT a GPU figure.")
    for loss, (_, reference, kind) in LOSSES.items():
        inputs = make_inputs(kind, (2, 4, 128, 128), torch.float32, "cpu")
        eager, kernels = count_bytes(reference, inputs)
        u = inputs[0].nbytes
        ours = [moved(loss, inputs[0].shape, 4, guessed) / u for guessed in (True, False)]
        print(f"{loss:12} fp32, in logits tensors: ours {ours[0]:.2f} ({ours[1]:.2f} without a guess), "
              f"eager {eager / u:.1f} in {kernels} kernels")  # fmt: skip

    failed = 0
    emulated = cuda and not torch.cuda.is_bf16_supported(including_emulation=False)  # training takes fp16 there
    for loss, name, shape, dtype, layout, hot in plan(cuda):
        if emulated and dtype == "bf16" and shape == SHAPES[0] and layout == "contiguous":
            continue  # is measured as fp16
        dtype = "fp16" if emulated and dtype == "bf16" else dtype
        if time.perf_counter() - began > 60 * minutes:
            print(f"stopped after {minutes:g} minutes: the rest is not measured")
            break
        bytes_moved = moved(loss, shape, DTYPES[dtype].itemsize, dtype != "fp16")
        count = 1 if hot or not cuda else max(math.ceil(3 * L2 / bytes_moved), 2)
        where = "cuda" if cuda else "cpu"
        sets = [make_inputs(LOSSES[loss][2], shape, DTYPES[dtype], where, layout) for _ in range(count)]
        if hot:
            sets = sets * 16
        row = {
            **header, "loss": loss, "implementation": name, "shape": "x".join(map(str, shape)), "dtype": dtype,
            "layout": layout, "cache": "hot" if hot else "cold", "method": "", "p20_ms": "", "p50_ms": "", "p80_ms": "",
            "extra_mb": "", "gradient_mb": f"{sets[0][0].nbytes / 1e6:.1f}", "bytes_mb": f"{bytes_moved / 1e6:.1f}",
            "gb_s": "", "copy_gb_s": f"{copy:.0f}" if cuda else "", "share": "",
        }  # fmt: skip
        try:  # one that is not installed, does not compile or wants too much memory: the others go on
            fn = implementation(loss, name, cuda)
            # Liger's backward waits for the device, which no capture can hold.
            timed = time_cuda(fn, sets, hot, capture=name != "liger") if cuda else time_cpu(fn, sets)
            (p20, p50, p80), row["method"] = timed
            gb_s = bytes_moved / p50 / 1e6
            row |= {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}", "gb_s": f"{gb_s:.1f}"}
            if cuda:
                row |= {"extra_mb": f"{peak_extra(fn, sets[0]) / 1e6:.1f}", "share": f"{gb_s / copy:.3f}"}
        except Exception as error:
            reason = f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
            row["method"] = ("not installed: " if isinstance(error, ImportError) else "failed: ") + reason
            failed += name not in ("compile", "liger")  # others' limits on this card are a result, ours are a fault
        columns = {"loss": 12, "implementation": 8, "shape": 14, "dtype": 5, "layout": 13, "cache": 4, "p20_ms": 9,
                   "p50_ms": 9, "p80_ms": 9, "extra_mb": 8, "gb_s": 8, "share": 6}  # fmt: skip
        line = " ".join(f"{row[k]:>{width}}" for k, width in columns.items())
        print(line if row["p50_ms"] else f"{line}  {row['method']}", flush=True)
        if args.csv:
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            with args.csv.open("a", newline="") as f:
                writer = csv.DictWriter(f, row, lineterminator="\n")
                if f.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        del sets
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

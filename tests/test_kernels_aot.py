"""
Every Triton kernel compiled ahead of time for sm_80 and sm_90, on any Linux machine: no spill, 16-byte loads,
no fused multiply-add; with the tensors of training first.

    pytest tests/test_kernels_aot.py
    python tests/test_kernels_aot.py            # the whole resource table: training, then classes 2..16
"""

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPE_NAMES = {torch.uint8: "u8", torch.int64: "i64", **{v: k for k, v in DTYPES.items()}}


# ---- the compiler's side: runs in a process of its own, whose Triton does not interpret ------------------------------


class Recorder:
    """Stands where a kernel stood and keeps what the launcher passes; the dispatch takes it for an interpreted one."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def record(loss, dtype, classes, shape=(2, 256, 256), layout="contiguous", teacher=None, target="uint8"):
    """The launches of one forward and backward of a public function: [(kernel, args, kwargs)]. layout: of all logits;
    "training": the student's channels_last, as convolutions leave them, the others contiguous. teacher: its dtype."""
    name = {"kl": "softmax_kl", "mse": "softmax_kl"}.get(loss, loss.split("-")[0])
    spec = importlib.util.spec_from_file_location(name, KERNELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []
    for attribute in [a for a in vars(module) if a.endswith("_kernel")]:
        setattr(module, attribute, Recorder(getattr(module, attribute), calls))
    n, h, w = shape
    s, t, c = (torch.zeros(n, classes, h, w, dtype=d) for d in (dtype, DTYPES.get(teacher, dtype), dtype))
    if layout != "contiguous":
        s = s.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        t, c = (x.to(memory_format=torch.channels_last) for x in (t, c))
    s.requires_grad_()
    y = torch.zeros(n, h, w, dtype=getattr(torch, target))
    if loss in ("kl", "mse"):
        total = (module.softmax_kl if loss == "kl" else module.softmax_mse)(s, t, 2.0)
    elif loss == "dice_ce":
        total = sum(module.dice_ce(s, y))
    else:
        total = sum(module.student_loss(s, y[: n // 2], t, c, tau=2.0, distill=loss.split("-")[1]))
    total.backward()
    assert s.grad.stride() == s.stride()
    return calls


def compile_call(kernel, args, kwargs, arch):
    """What a launch with these arguments compiles: Triton's own specialisation of integers, pointers and None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: kwargs.pop(k) for k in ("num_warps", "enable_fp_fusion")}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        v = values[name]
        if name in kwargs or v is None or (isinstance(v, int) and v == 1):
            signature[name], constants[name] = "constexpr", v
        elif isinstance(v, float):
            signature[name] = "fp32"
        else:
            is_tensor = isinstance(v, torch.Tensor)
            signature[name] = "*" + TYPE_NAMES[v.dtype] if is_tensor else "i32" if abs(v) < 2**31 else "i64"
            if (v.data_ptr() if is_tensor else v) % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled):
    """Registers and stack from the cubin, shared bytes, and the widths of all global loads and stores from the PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    row = {"registers": usage["REG"], "spill": usage["STACK"] + usage["LOCAL"], "shared": compiled.metadata.shared}
    for key, op in (("loads", "ld"), ("stores", "st")):
        found = re.findall(rf"\b{op}\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", compiled.asm["ptx"])
        row[key] = dict(sorted(Counter(int(v or 1) * int(bits) // 8 for v, bits in found).items()))
    row["fused"] = compiled.asm["ptx"].count("fma.rn.f32")  # those inside libdevice's log are fma.rn.ftz.f32
    row["moves"] = compiled.asm["ttgir"].count("ttg.convert_layout")
    return row


def compile_cases(cases):
    """[(loss, dtype, classes, arch, record's options)] -> one row of resources per launch."""
    rows = []
    for loss, dtype, classes, arch, options in cases:
        for kernel, args, kwargs in record(loss, DTYPES[dtype], classes, **options):
            mode = "".join(f" {k.lower()}" for k in ("LOSS", "GRAD", "MSE") if kwargs.get(k))
            row = {"loss": loss, "kernel": kernel.__name__ + mode, "dtype": dtype, "classes": classes, "arch": arch}
            rows.append(row | {"options": options} | resources(compile_call(kernel, args, kwargs, arch)))
    return rows


def table(rows):
    for r in rows:
        head = f"{r['loss']:12} {r['kernel']:30} {r['dtype']} C={r['classes']:<2} sm_{r['arch']}"
        loads, stores = (" ".join(f"{n}x{b}B" for b, n in r[k].items()) for k in ("loads", "stores"))
        used = f"{r['registers']:4} reg {r['spill']} spill {r['moves']} moves {r['shared']:5} B shared"
        yield f"{head} {used}  ld {loads}  st {stores}  {' '.join(map(str, r['options'].values()))}"


# ---- the tests -------------------------------------------------------------------------------------------------------

LOSSES = ("kl", "mse", "dice_ce", "student_loss-kl", "student_loss-mse")
ODD = {"shape": [2, 17, 13]}  # lists: as JSON gives them back
LAST = {"layout": "channels_last"}
TRAINING = [{"shape": [24, side, side], "layout": "training", "teacher": teacher}
            for side, teacher in itertools.product((160, 256), ("bf16", "fp32"))]  # fmt: skip
CASES = [(loss, dtype, 4, 90, {}) for dtype, loss in itertools.product(DTYPES, LOSSES)]
CASES += [(loss, dtype, 4, 80, {}) for dtype, loss in itertools.product(DTYPES, ("kl", "dice_ce", "student_loss-mse"))]
CASES += [("student_loss-kl", "bf16", 8, 80, {}), ("mse", "fp32", 16, 90, {})]
CASES += [("kl", "fp32", 4, 90, ODD), ("dice_ce", "fp32", 4, 90, ODD)]
CASES += [(loss, "bf16", 4, 90, options) for options in TRAINING for loss in ("student_loss-kl", "student_loss-mse")]
CASES += [("student_loss-mse", "bf16", 4, 80, TRAINING[0]), ("student_loss-mse", "fp16", 4, 80, LAST)]
CASES += [(loss, "bf16", 4, 90, LAST) for loss in ("kl", "dice_ce", "student_loss-kl")]
CASES += [("dice_ce", "bf16", 4, 90, LAST | {"target": "int64"})]


def spawn(cases, folder):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, __file__, json.dumps(cases)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    if not sys.platform.startswith("linux") or importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    halves = [case for case in CASES if "student" in case[0]], [case for case in CASES if "student" not in case[0]]
    workers = [spawn(cases, tmp_path_factory.mktemp("triton")) for cases in halves]
    results = [(w, *w.communicate()) for w in workers]
    for worker, _, err in results:
        assert worker.returncode == 0, err[-3000:]
    return [row for _, out, _ in results for row in json.loads(out)]


def select(rows, **wanted):
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def test_every_launch_is_there(rows):
    kernels = {r["kernel"].split()[0] for r in rows}
    assert kernels == {"_distance_kernel", "_sums_kernel", "_finish_kernel", "_grad_kernel", "_student_kernel"}
    for r in select(rows, loss="kl", arch=90, dtype="bf16"):
        assert r["kernel"] in ("_distance_kernel loss grad", "_distance_kernel grad")
    assert {r["kernel"] for r in select(rows, loss="kl", dtype="fp16")} == {
        "_distance_kernel loss", "_distance_kernel grad"
    }  # fmt: skip


def test_nothing_spills(rows):
    assert len(rows) > 70
    assert [r for r in rows if r["spill"]] == []
    assert max(r["registers"] for r in rows) <= 220  # of 255


def test_nothing_is_fused(rows):
    """With fusion `pc - qc` in softmax_kl is one fma, which rounds one of two equal products and not the other."""
    assert [r for r in rows if r["fused"]] == []


@pytest.mark.parametrize("name", ["softmax_kl", "dice_ce", "student_loss"])
def test_every_launch_forbids_fusion(name):
    """In the source: a launch that no case above records would go unseen."""
    calls = [c for c in ast.walk(ast.parse((KERNELS / f"{name}.py").read_text())) if isinstance(c, ast.Call)]
    launches = [c for c in calls if isinstance(c.func, ast.Subscript) and ast.unparse(c.func.value).endswith("_kernel")]
    assert len(launches) == {"softmax_kl": 1, "dice_ce": 3, "student_loss": 3}[name]
    for c in launches:
        assert {k.arg: ast.unparse(k.value) for k in c.keywords}.get("enable_fp_fusion") == "False", ast.unparse(c)


def test_layouts_agree(rows):
    """No exchange between threads but the final reductions: they take 4 bytes of shared memory per warp and number."""
    even = [r for r in rows if r["options"] != ODD and (r["loss"], r["options"]) != ("kl", LAST)]
    # Labels of 8 bytes beside words: triton 3.6 gives a thread two pixels, not four, and exchanges one small sum.
    even = [r for r in even if "target" not in r["options"]]
    assert len(even) > 100
    assert [r for r in even if r["moves"]] == []
    assert max(r["shared"] for r in even) <= 64


@pytest.mark.parametrize("loss", LOSSES)
def test_loads_and_stores_are_16_bytes_wide(rows, loss):
    """All logits, in and out; what is narrower are labels of one byte, coefficients and incoming gradients. The second
    pass of student_loss takes 4 pixels per thread in every type, so 8 bytes of a half type."""
    wide = [r for r in select(rows, loss=loss, classes=4, options={}) if r["kernel"] != "_finish_kernel"]
    assert wide
    for r in wide:
        tensors = {"kl": 2, "mse": 2, "dice_ce": 1}.get(loss, 1 if r["kernel"] == "_sums_kernel" else 3)
        width = "8" if "_student_kernel" in r["kernel"] and r["dtype"] != "fp32" else "16"
        assert r["loads"].get(width, 0) == 4 * tensors, r
        if "grad" in r["kernel"]:
            assert r["stores"][width] == 4, r


@pytest.mark.parametrize("loss", ["student_loss-kl", "student_loss-mse", "dice_ce"])
def test_channels_last_is_read_and_written_in_words(rows, loss):
    """Four half-type classes of a pixel are 8 bytes: a thread takes two pixels at once, four in the first pass, whose
    sums want more in flight. What is narrower: labels, coefficients, and logits that lie otherwise, two pixels each."""
    given = [r for r in select(rows, loss=loss) if "layout" in r["options"] and r["kernel"] != "_finish_kernel"]
    assert len(given) >= {"student_loss-kl": 15, "student_loss-mse": 18, "dice_ce": 4}[loss]
    for r in given:
        first, others = "_sums" in r["kernel"], r["options"]["layout"] == "channels_last" and "student" in r["kernel"]
        labels = 2 if r["options"].get("target") == "int64" and first else 1 if "target" in r["options"] else 0
        assert r["loads"]["16"] == (2 if first else 3 if others else 1) + labels, r
        assert r["loads"].get("2", 0) <= 1, r  # two labels of one byte
        assert r["stores"].get("16", 0) == ("grad" in r["kernel"]), r
        assert r["stores"].get("2", 0) == 0, r
        assert r["registers"] <= 88, r
        if r["options"].get("teacher") == "fp32" and not first:
            assert r["loads"]["8"] == 4, r


def test_what_divisibility_buys(rows):
    """H*W = 17*13, or channels_last in softmax_kl: Triton compiles the same kernel once more, element by element. Same
    bytes of memory, more instructions: four fp32 loads where there was one."""
    odd = [r for r in select(rows, options=ODD) if r["kernel"] != "_finish_kernel"]
    last = select(rows, options=LAST, loss="kl")
    assert (len(odd), len(last)) == (4, 2)
    for r in odd:
        assert "16" not in r["loads"], r
        assert r["loads"]["4"] >= 16, r
    for r in last:
        assert "16" not in r["loads"], r
        assert r["loads"]["2"] >= 16, r


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compile_cases(json.loads(sys.argv[1]))))
    else:
        for case in itertools.product(("student_loss-kl", "student_loss-mse"), ("bf16",), (4,), (80, 90), TRAINING):
            print(*table(compile_cases([case])), sep="\n", flush=True)
        for arch, classes in ((80, 4), (90, 4), *((90, c) for c in (2, 3, 5, 6, 8, 9, 12, 16))):
            for case in itertools.product(LOSSES, DTYPES, (classes,), (arch,), ({},)):
                print(*table(compile_cases([case])), sep="\n", flush=True)

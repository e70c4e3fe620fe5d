"""Values and gradients of the Triton kernels against the plain-torch references in fp64, on the same rounded inputs.

    pytest tests/test_kernels.py                # kernels in Triton's interpreter, in a process of their own
    pytest tests/test_kernels.py -m gpu         # the same checks on a CUDA device

A check is a function that takes the device last and asserts; `run` executes it where the kernels are.
"""

import ast
import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

KERNELS = ROOT / "kernels"
FILES = {"kl": "softmax_kl", "mse": "softmax_kl", "dice_ce": "dice_ce", "student": "student_loss"}
NAMES = {"kl": "softmax_kl", "mse": "softmax_mse", "dice_ce": "dice_ce", "student": "student_loss"}
LOSSES = tuple(FILES)
EMULATED = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
HALVES = (torch.float16,) if EMULATED else (torch.float16, torch.bfloat16)


def load(name):
    return importlib.import_module(f"kernels.{name}")


@pytest.fixture(scope="session")
def interpreter():
    """A process whose Triton interprets: that is decided when Triton is imported, so it cannot be this one."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts it with this environment
        yield pool


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return lambda check, *args: check(*args, "cuda")
    pool = request.getfixturevalue("interpreter")
    return lambda check, *args: pool.submit(check, *args, "cpu").result()


# ---- inputs, calls, comparison ------------------------------------------------------------------------------------

def lay(x, layout):
    """The same values in another layout; none of the strided ones is contiguous."""
    n, *_, h, w = x.shape
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layout == "batch slice":
        out = x.new_empty(2 * n, *x.shape[1:])[::2]
    elif layout == "crop":
        out = x.new_empty(*x.shape[:-2], h + 3, w + 2)[..., 1:-2, 1:-1]
    elif layout == "transposed":
        out = x.new_empty(*x.shape[:-2], w, h).transpose(-1, -2)
    else:
        return x
    return out.copy_(x)


def inputs(loss, shape, dtype=torch.float32, device="cpu", layout="contiguous", scale=2.0, seed=0, ignore=None, t=None,
           target_dtype=torch.int64):  # fmt: skip
    """(student, teacher), (logits, target) or (student, target, teacher, coteacher); the student's is the first."""
    rng = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    logits = [torch.randn(shape, generator=rng).mul(scale).to(d) for d in (dtype, t or dtype, dtype)]
    y = torch.randint(0, c, (n, h, w), generator=rng)
    if ignore is not None:
        y[torch.rand(y.shape, generator=rng) < 0.3] = ignore
    if layout == "training":  # as convolutions leave the student's, as roll and cat leave the others'
        logits[0], layout = lay(logits[0], "channels_last"), "contiguous"
    y, *logits = (lay(x.to(device), layout) for x in (y.to(target_dtype), *logits))
    if loss in ("kl", "mse"):
        return logits[:2]
    return [logits[0], y] if loss == "dice_ce" else [logits[0], y[: max(n // 2, 1)], *logits[1:]]


def call(loss, tensors, kwargs, reference=False):
    if reference:
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("expected")}
    out = getattr(load(FILES[loss]), NAMES[loss] + ("_reference" if reference else ""))(*tensors, **kwargs)
    return out if isinstance(out, tuple) else (out,)


def values_and_grad(loss, tensors, kwargs, ups, reference=False):
    leaf = tensors[0].detach().requires_grad_()
    out = call(loss, [leaf, *tensors[1:]], kwargs, reference)
    # Summed as a training loop does; autograd.grad with grad_outputs would hide how the gradient arrives.
    (grad,) = torch.autograd.grad(sum(u * v for u, v in zip(ups, out, strict=True)), leaf)
    return [v.item() for v in out], grad


def as_double(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def fine(device):
    """What two orders of one fp32 computation may differ by. The interpreter's exp is numpy's. A GPU's is ex2.approx,
    right to 2^-22 = 2.4e-7, of an argument rounded once more, and its division is right to 2 units in the last place,
    2.4e-7: some 6e-7 of a probability, and a difference of two is smaller than they are and keeps both errors."""
    return 1e-6 if device == "cpu" else 4e-6


def check_agreement(loss, case, kwargs, ups, device):
    """fp32: 1e-5 of the largest reference value, in fp64: sixteen times what a GPU errs by in a probability
    (see `fine`), since tau = 0.5 doubles exponents. Half types: twice eager's error. Returns both relative errors."""
    tensors = inputs(loss, device=device, **case)
    before = [x.clone() for x in tensors]
    ours, grad = values_and_grad(loss, tensors, kwargs, ups)
    assert all(torch.equal(x, b) for x, b in zip(tensors, before, strict=True)), "an input was written to"
    assert grad.shape == tensors[0].shape
    assert grad.stride() == torch.empty_like(tensors[0]).stride(), "the gradient lies otherwise than the logits"
    assert grad.dtype == tensors[0].dtype
    exact, exact_grad = values_and_grad(loss, as_double(tensors), kwargs, ups, reference=True)
    value_error = 0.0
    for v, e in zip(ours, exact, strict=True):
        assert math.isfinite(v), ours
        assert abs(v - e) <= 1e-5 * abs(e) + 1e-9, (loss, ours, exact)
        value_error = max(value_error, abs(v - e) / max(abs(e), 1e-4))
    largest = exact_grad.abs().max().item()
    assert largest > 0, "nothing to compare"
    error = (grad.double() - exact_grad).abs().max().item()
    if grad.dtype == torch.float32:
        # Below 1e-5 of the whole lies what fp32 resolves of a difference of probabilities.
        pixels = grad.numel() // grad.shape[1]
        limit = 1e-5 * largest + 2e-7 * max(map(abs, ups)) * kwargs.get("tau", 1.0) / pixels
    else:
        _, eager = values_and_grad(loss, tensors, kwargs, ups, reference=True)
        smallest = 6e-8 if grad.dtype == torch.float16 else 1e-12
        limit = 2 * (eager.double() - exact_grad).abs().max().item() + smallest
        if grad.dtype == torch.bfloat16 and device == "cpu":  # the interpreter truncates where the GPU rounds
            limit = 2**-7 * largest
    assert error <= limit, (loss, case, kwargs, ups, error, limit, largest)
    return value_error, error / largest


def ups_of(loss):
    return {"kl": (1.7,), "mse": (-0.6,), "dice_ce": (1.3, -0.4), "student": (1.3, -0.4, 0.7, 2.1)}[loss]


def options(loss):
    """Every option that changes a formula."""
    if loss in ("kl", "mse"):
        return [{"tau": 0.5}, {"tau": 1.0}, {"tau": 20.0}]
    forms = [{"squared": s, "include_background": b} for s, b in itertools.product((True, False), repeat=2)]
    if loss == "student":
        for form, tau, distill in zip(forms, (1.0, 2.0, 20.0, 0.5), ("kl", "mse", "mse", "kl"), strict=True):
            form |= {"tau": tau, "distill": distill}
    return forms


# ---- against fp64 -------------------------------------------------------------------------------------------------

CASES = [{"shape": shape} for shape in ((1, 2, 1, 1), (3, 3, 1, 7), (2, 5, 7, 1), (2, 4, 40, 32), (1, 16, 5, 3))]
CASES += [{"shape": (3, 4, 11, 6), "layout": layout, "dtype": torch.float16}
          for layout in ("channels_last", "training", "batch slice", "crop", "transposed")]  # fmt: skip
CASES += [{"shape": (2, 4, 6, 5), "scale": 1e4}]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_options(run, loss, dtype):
    for kwargs in options(loss)[: 1 if dtype == torch.bfloat16 else 4]:
        run(check_agreement, loss, {"shape": (2, 4, 17, 13), "dtype": dtype, "ignore": -100}, kwargs, ups_of(loss))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_layouts_and_huge_logits(run, loss, case):
    run(check_agreement, loss, case, {}, ups_of(loss))


def check_many_blocks(device):
    """Programs of the first pass that take several blocks each, and an uneven last round."""
    for loss in ("dice_ce", "student"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load(FILES[loss]), "PROGRAMS", 2)
            check_agreement(loss, {"shape": (2, 4, 37, 34), "ignore": -100}, {}, ups_of(loss), device)


def check_words(device):
    """channels_last of four half-type classes, read in words of a pixel: to the bit what NCHW gives where the gradient
    is local, whoever of the three lies so; not where a word would start off its 8 bytes."""
    module = load("student_loss")
    for dtype, distill in itertools.product(HALVES, ("kl", "mse")):
        s, y, t, c = inputs("student", (3, 4, 11, 6), dtype, device, scale=5.0)
        s[0, 0, 0, 0], s[0, 3, 0, 1] = -0.0, -3e4  # the sign of each half of a word
        kwargs, ups = {"tau": 3.0, "distill": distill}, (0.0, 0.0, 0.7, 2.1)
        values, grad = values_and_grad("student", [s, y, t, c], kwargs, ups)
        shifted = s.new_empty(s.numel() + 1)[1:].view(3, 11, 6, 4).permute(0, 3, 1, 2).copy_(s)
        gapped = s.new_empty(3, 12, 6, 4)[:, :11].permute(0, 3, 1, 2).copy_(s)
        last, *others = (lay(x, "channels_last") for x in (s, t, c))
        for student, rest, words in ((last, [t, c], True), (s, others, False), (last, others, True),
                                     (gapped, [t, others[1]], True), (shifted, [t, c], False)):  # fmt: skip
            assert module._words(student) == words
            got, got_grad = values_and_grad("student", [student, y, *rest], kwargs, ups)
            assert got == pytest.approx(values, rel=fine(device))  # blocks of another size: another order of the sums
            assert torch.equal(got_grad, grad), (dtype, distill, words)
            assert got_grad.is_contiguous(memory_format=torch.channels_last) == (student is not s)
            assert module._words(got_grad) == (student is not s)


@pytest.mark.parametrize("loss", ["kl", "mse", "student"])
def test_mixed_dtypes(run, loss):
    case = {"shape": (2, 4, 9, 7), "dtype": torch.float16, "t": torch.float32}
    run(check_agreement, loss, case, {"tau": 4.0}, ups_of(loss))


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_types(run, target_dtype):
    for ignore in (1, 255 if target_dtype == torch.uint8 else -1):  # a class, and no class
        case = {"shape": (2, 4, 9, 7), "target_dtype": target_dtype, "ignore": ignore}
        run(check_agreement, "dice_ce", case, {"ignore_index": ignore}, (1.0, 1.0))


cases = st.fixed_dictionaries({
    "shape": st.tuples(st.integers(1, 2), st.sampled_from([2, 3, 4, 5, 7, 11]), *[st.integers(1, 23)] * 2),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "layout": st.sampled_from(["contiguous", "channels_last", "batch slice", "crop", "transposed"]),
    "scale": st.sampled_from([0.3, 2.0, 30.0]), "seed": st.integers(0, 1000),
    "ignore": st.sampled_from([None, -100])})  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), loss=st.sampled_from(LOSSES), case=cases)
def test_anything(run, data, loss, case):
    kwargs = {}
    if loss != "dice_ce":
        kwargs["tau"] = data.draw(st.floats(0.5, 20), label="tau")
    if loss in ("dice_ce", "student"):
        kwargs |= {"squared": data.draw(st.booleans()), "include_background": data.draw(st.booleans())}
        kwargs["smooth"] = data.draw(st.sampled_from([1e-5, 1.0]), label="smooth")
    if loss == "student":
        kwargs["distill"] = data.draw(st.sampled_from(["kl", "mse"]), label="distill")
    up = st.floats(0.01, 1000).flatmap(lambda x: st.sampled_from([x, -x]))
    ups = data.draw(st.tuples(*[up] * len(ups_of(loss))), label="incoming gradients")
    run(check_agreement, loss, case, kwargs, ups)


# ---- corners -------------------------------------------------------------------------------------------------------

def check_identical(device):
    for loss, tau, dtype in itertools.product(("kl", "mse"), (0.5, 20.0), (torch.float32, torch.float16)):
        s, _ = inputs(loss, (2, 5, 6, 7), dtype, device)
        value, grad = values_and_grad(loss, [s, s.clone()], {"tau": tau}, (1000.0,))
        assert value == [0.0], (loss, value)
        assert not grad.any(), loss


def check_ignored(device):
    for smooth, ignore in itertools.product((0.0, 1e-5), (255, 2)):
        s, _, t, c = inputs("student", (2, 4, 6, 7), device=device)
        y = torch.full((2, 6, 7), ignore, dtype=torch.uint8, device=device)
        kwargs = {"smooth": smooth, "ignore_index": ignore}
        for reference in (False, True):
            values, grad = values_and_grad("dice_ce", [s, y], kwargs, (3.0, 5.0), reference)
            assert values == [0.0, 0.0], values
            assert not grad.any()
        values, grad = values_and_grad("student", [s, y[:1], t, c], kwargs, (3.0, 5.0, 0.0, 0.0))
        assert values[:2] == [0.0, 0.0]
        assert not grad.any()


def check_absent(device):
    """Class 3 in neither prediction nor label, smooth = 0: it scores 1 and leaves the others' gradients alone."""
    z = inputs("dice_ce", (2, 4, 6, 7), device=device)[0]
    z[:, 3] = -1e4
    y = torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(0)).to(device)
    four, grad4 = values_and_grad("dice_ce", [z, y], {"smooth": 0.0}, (4.0, 1.0))
    three, grad3 = values_and_grad("dice_ce", [z[:, :3], y], {"smooth": 0.0}, (3.0, 1.0), reference=True)
    assert abs(four[0] * 4 - three[0] * 3) < 1e-5, (four, three)
    assert abs(four[1] - three[1]) < 1e-6
    assert not grad4[:, 3].any()
    assert (grad4[:, :3] - grad3).abs().max() < 1e-5 * grad3.abs().max()


def check_unknown_label(device):
    z, y = inputs("dice_ce", (2, 4, 6, 7), device=device)
    y[1, 2, 3] = 4
    assert math.isnan(call("dice_ce", [z, y], {})[1].item())
    assert math.isnan(call("student", [z, y, z, z], {})[1].item())
    if device == "cpu":
        with pytest.raises(IndexError):
            call("dice_ce", [z, y], {}, reference=True)


def check_nan(device):
    for loss in LOSSES:
        tensors = inputs(loss, (2, 4, 6, 7), device=device)
        tensors[0][0, 1, 2, 3] = math.nan
        assert all(math.isnan(v.item()) for v in call(loss, tensors, {})), loss


def check_small_and_scaled(loss, device):
    """Gradients near 1e-7, which fp16 cannot hold before a loss scale of 65536 is multiplied in."""
    tensors = inputs(loss, (4, 4, 32, 32), torch.float16, device)
    for i in range(1, len(tensors)):
        if tensors[i].is_floating_point():  # close to the student: small differences
            tensors[i] = tensors[0] + 0.02 * tensors[i]
    ups = (65536.0,) * len(ups_of(loss))
    _, exact = values_and_grad(loss, as_double(tensors), {}, ups, reference=True)
    if loss in ("kl", "mse"):
        assert (exact / 65536).abs().median() < 5e-7
    _, grad = values_and_grad(loss, tensors, {}, ups)
    assert (grad.double() - exact).abs().max() < 1e-3 * exact.abs().max()
    far = exact.abs() > 1e-3 * exact.abs().max()
    assert ((grad.double() - exact).abs()[far] < 0.02 * exact.abs()[far]).all()


def check_offsets(device):
    """Two steps of 1.6e9 elements along every axis in turn: a stride fits into 32 bits, the offset does not. Rows that
    follow each other and rows with a gap; the memory is reserved and hardly touched."""
    far = 2**30 + 2**29 + 24
    try:
        store = torch.empty(2 * far + 4096, dtype=torch.float16, device=device)
        label_store = torch.empty(2 * far + 4096, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return f"cannot reserve 10 GB: {error}"
    for axis, flat in itertools.product(range(4), (True, False)):
        shape = [3 if i == axis else k for i, k in enumerate((1, 3, 1 if flat and axis == 3 else 2, 5))]
        strides = [far if i == axis else k for i, k in enumerate((48, 16, 5 if flat else 6, 1))]
        s, y, t, c = inputs("student", shape, torch.float16, device)
        y = torch.as_strided(y, (shape[0], *shape[2:]), (0, *y.stride()[1:])).clone()
        far_s = torch.as_strided(store, shape, strides).copy_(s)
        far_y = torch.as_strided(label_store, y.shape, (strides[0], *strides[2:])).copy_(y)
        for loss, near, there in (("kl", [s, t], [far_s, t]), ("dice_ce", [s, y], [far_s, far_y]),
                                  ("student", [s, y, t, c], [far_s, far_y, t, c])):  # fmt: skip
            expected, expected_grad = values_and_grad(loss, near, {}, ups_of(loss))
            got, grad = values_and_grad(loss, there, {}, ups_of(loss))
            assert got == expected, (axis, flat, loss, got, expected)
            assert torch.equal(grad, expected_grad), (axis, flat, loss)
    return None


def test_more_than_2_31_elements(run):
    reason = run(check_offsets)
    if reason:
        pytest.skip(reason)


# ---- autograd ------------------------------------------------------------------------------------------------------

def check_autograd(loss, device):
    tensors = inputs(loss, (2, 4, 17, 13), device=device)
    leaf = tensors[0].detach().requires_grad_()
    ups = ups_of(loss)
    teachers = [x.requires_grad_() for x in tensors[1:] if x.is_floating_point()]

    def total(scale=1.0, **kwargs):
        return sum(scale * u * v for u, v in zip(ups, call(loss, [leaf, *tensors[1:]], kwargs), strict=True))

    first, again = total(), total()
    assert torch.equal(first, again), "two runs differ"
    (g1,) = torch.autograd.grad(first, leaf, retain_graph=True)
    kept = g1.clone()
    (g2,) = torch.autograd.grad(first, leaf, torch.full_like(first, -3.0), retain_graph=True)
    assert torch.equal(g1, kept), "a later backward wrote into an earlier gradient"
    assert (g2 + 3 * g1).abs().max() <= 1e-6 * g2.abs().max()
    (g3,) = torch.autograd.grad(first, leaf)
    (g4,) = torch.autograd.grad(again, leaf)
    assert torch.equal(g1, g3), "a third backward differs from the first"
    assert torch.equal(g1, g4), "two runs differ"

    (total() + total(2.0)).backward()  # the same logits twice in one graph
    assert (leaf.grad - 3 * g1).abs().max() <= 1e-6 * leaf.grad.abs().max()
    assert all(t.grad is None for t in teachers), "a teacher got a gradient"

    with torch.no_grad():
        assert not total().requires_grad
        assert torch.equal(total(), first)
    (g5,) = torch.autograd.grad(total().square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g5.sum().backward()
    if loss != "dice_ce":
        name = "expected_grads" if loss == "student" else "expected_grad"
        ups32 = torch.tensor(ups).tolist()
        for guess in (ups32 if loss == "student" else ups32[0], None, (9.0,) * 4 if loss == "student" else 9.0):
            (g6,) = torch.autograd.grad(total(**{name: guess}), leaf)
            assert (g1 - g6).abs().max() <= 1e-6 * g1.abs().max(), f"a guess of {guess} changes the gradient"


def check_guess(loss, device):
    """Spoil a teacher between forward and backward: after a right guess nothing reads it, after a wrong one all do."""
    name, right, wrong = "expected_grad", 2.0, 1.0
    if loss == "student":
        name, right, wrong = "expected_grads", (2.0, 2.0, 2.0, 2.0), (2.0, 2.0, 2.0, 1.0)
    found = []
    for guess, spoil in ((right, False), (right, True), (wrong, True), (None, True)):
        tensors = inputs(loss, (2, 4, 6, 7), device=device)
        with torch.inference_mode():
            teachers = [x * 1 for x in tensors if x.is_floating_point()][1:]  # tensors that autograd refuses to save
        tensors[-len(teachers) :] = teachers
        leaf = tensors[0].detach().requires_grad_()
        out = call(loss, [leaf, *tensors[1:]], {name: guess})
        if spoil:
            with torch.inference_mode():
                for x in teachers:
                    x.neg_()
        found.append(torch.autograd.grad(sum(2 * v for v in out), leaf)[0])
    assert torch.equal(found[0], found[1]), "a right guess was computed anew"
    assert not torch.equal(found[0], found[2]), "a wrong guess was kept"
    assert torch.equal(found[2], found[3])


@pytest.mark.parametrize("loss", ["kl", "mse", "student"])
def test_right_guess_costs_nothing_and_a_wrong_one_is_corrected(run, loss):
    run(check_guess, loss)


def check_missing_teachers(device):
    s, y, t, c = inputs("student", (3, 4, 6, 7), device=device)
    ups = ups_of("student")
    for rest in ((y, None, c), (y, t, None), (y, None, None), (y[:0], t, c), (y.expand(3, 6, 7), t, c)):
        ours, grad = values_and_grad("student", [s, *rest], {}, ups)
        exact, exact_grad = values_and_grad("student", [s, *rest], {}, ups, reference=True)
        assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(ours, exact, strict=True)), (ours, exact)
        assert (grad - exact_grad).abs().max() <= 1e-5 * exact_grad.abs().max()


def check_composition(device):
    """student_loss is dice_ce on the labelled slices, softmax_kl against the teacher, softmax_mse against the other."""
    s, y, t, c = inputs("student", (4, 4, 9, 7), device=device, ignore=-100)
    ups = ups_of("student")
    whole, grad = values_and_grad("student", [s, y, t, c], {"tau": 3.0}, ups)
    leaf = s.detach().requires_grad_()
    kd = call("kl", [leaf, t], {"tau": 3.0})
    parts = (*call("dice_ce", [leaf[: len(y)], y], {}), *kd, *call("mse", [leaf, c], {}))
    (parts_grad,) = torch.autograd.grad(sum(u * v for u, v in zip(ups, parts, strict=True)), leaf)
    assert all(abs(a - b.item()) <= fine(device) * abs(a) for a, b in zip(whole, parts, strict=True))
    assert (grad - parts_grad).abs().max() <= fine(device) * grad.abs().max()


def check_compile_and_autocast(device):
    """The networks compiled, the loss a graph break; logits in a half type from autocast, the loss computed in fp32."""
    torch.manual_seed(0)
    net = nn.Conv2d(1, 4, 3, padding=1).to(device)
    x = torch.randn(2, 1, 9, 8, device=device)
    _, y, t, c = inputs("student", (2, 4, 9, 8), device=device)
    whole, kl, segmentation = load("student_loss").student_loss, load("softmax_kl").softmax_kl, load("dice_ce").dice_ce

    def step(x):
        with torch.autocast(device, HALVES[-1]):
            s = net(x)
            return (s, *whole(s, y, t, c, tau=2.0), kl(s, t), *segmentation(s[: len(y)], y))

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        plain = step(x)
        assert plain[0].dtype == HALVES[-1]
        assert all(v.dtype == torch.float32 for v in plain[1:])
        sum(plain[1:]).backward()
        grad = net.weight.grad.clone()
        net.weight.grad = None
        compiled = torch.compile(step, backend="eager")(x)
        sum(compiled[1:]).backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    assert torch.equal(grad, net.weight.grad)


# ---- golden values, peers, references ------------------------------------------------------------------------------

def check_golden(reference, device):
    def close(loss, tensors, kwargs, ups, values, grad):
        tensors = [x.to(device) for x in tensors]
        got, got_grad = values_and_grad(loss, tensors, kwargs, ups, reference)
        near = functools.partial(pytest.approx, rel=fine(device), abs=fine(device) / 10)
        assert got == near(values), (loss, kwargs, got, values)
        assert got_grad.flatten().tolist() == near(grad), (loss, kwargs, got_grad, grad)

    # One pixel, p = (1/2, 1/2), q = (3/4, 1/4): KL = 3/4 ln 3/2 + 1/4 ln 1/2, dKL = p - q, MSE = 1/16 + 1/16.
    s, t = torch.zeros(1, 2, 1, 1), torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close("kl", [s, t], {}, (1.0,), [kl], [-0.25, 0.25])
    close("kl", [s, 2 * t], {"tau": 2.0}, (3.0,), [4 * kl], [-1.5, 1.5])  # tau^2 KL, tau e
    close("mse", [s, t], {}, (1.0,), [0.125], [-0.25, 0.25])  # 2 p e, as sum e p = 0
    close("mse", [s, 2 * t], {"tau": 2.0}, (1.0,), [0.125], [-0.125, 0.125])  # the same over tau

    # Two pixels, p = 1/2 throughout, labels 0 and 1: I = 1/2, sum p^2 = 1/2, sum p = sum y = 1 for both classes.
    z, y, ce = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]), math.log(2)
    # squared: R = 1/(1/2 + 1) = 2/3. a = 1/2 (R - 2 y)/1.5 = (-4/9, 2/9) at pixel 0, p (a - sum a p) = (-1/6, 1/6).
    close("dice_ce", [z, y], {"smooth": 0.0}, (1.0, 0.0), [1 / 3, ce], [-1 / 6, 1 / 6, 1 / 6, -1 / 6])
    # linear: R = 1/2. a = 1/2 (1/2 - 2 y)/2 = (-3/8, 1/8), p (a - sum a p) = (-1/8, 1/8). With smooth = 1, R = 2/3.
    linear = {"smooth": 0.0, "squared": False}
    close("dice_ce", [z, y], linear, (1.0, 0.0), [0.5, ce], [-0.125, 0.125, 0.125, -0.125])
    close("dice_ce", [z, y], linear | {"smooth": 1.0}, (0.0, 1.0), [1 / 3, ce], [-0.25, 0.25, 0.25, -0.25])
    # Pixel 1 ignored: class 0 has R = 1/(1/4 + 1) = 4/5, class 1 has I = 0 and R = 0; cross-entropy over one pixel.
    ignored = torch.tensor([[[0, -100]]])
    close("dice_ce", [z, ignored], {"smooth": 0.0}, (0.0, 1.0), [0.6, ce], [-0.5, 0.0, 0.5, 0.0])
    foreground = {"smooth": 0.0, "include_background": False}
    close("dice_ce", [z, ignored], foreground, (0.0, 1.0), [1.0, ce], [-0.5, 0, 0.5, 0])
    # All four at once: the terms above on their slice, halved where a second slice without a difference joins the mean.
    s, t = torch.zeros(2, 2, 1, 2), torch.cat([t.expand(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)])
    grad = [-1 / 6 - 0.125, 1 / 6 - 0.125, 1 / 6 + 0.125, -1 / 6 + 0.125, 0, 0, 0, 0]
    close("student", [s, y, t, t], {"smooth": 0.0}, (1.0, 0.0, 1.0, 1.0), [1 / 3, ce, kl / 2, 0.0625], grad)


@pytest.mark.parametrize("reference", [False, True])
def test_golden_values(run, reference):
    run(check_golden, reference)


def check_peers(device):
    s, t = inputs("kl", (3, 4, 9, 7), device=device)
    peer = F.kl_div(F.log_softmax(s / 3, 1), F.softmax(t / 3, 1), reduction="sum") * 9 / (3 * 9 * 7)
    assert call("kl", [s, t], {"tau": 3.0})[0].item() == pytest.approx(peer.item(), rel=1e-5)
    z, y = inputs("dice_ce", (3, 4, 9, 7), device=device, ignore=-100)
    assert call("dice_ce", [z, y], {})[1].item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)


@pytest.mark.parametrize("check", [
    check_many_blocks, check_words, check_identical, check_ignored, check_absent, check_unknown_label, check_nan,
    check_missing_teachers, check_composition, check_compile_and_autocast, check_peers,
], ids=lambda check: check.__name__)  # fmt: skip
def test_that(run, check):
    run(check)


@pytest.mark.parametrize("check", [check_small_and_scaled, check_autograd], ids=lambda check: check.__name__)
@pytest.mark.parametrize("loss", LOSSES)
def test_that_each_loss(run, loss, check):
    run(check, loss)


def monai_dice_ce(z, y, squared, background, smooth):
    """DiceCELoss(softmax=True, to_onehot_y=True, batch=True, ...), from monai/losses/dice.py of MONAI 1.6.1:
    f = 1 - (2 intersection + smooth_nr) / (denominator + smooth_dr), mean over classes; CrossEntropyLoss, mean."""
    p, onehot = z.softmax(1), F.one_hot(y, z.shape[1]).permute(0, 3, 1, 2).to(z.dtype)
    if not background:
        p, onehot = p[:, 1:], onehot[:, 1:]
    axes = (0, 2, 3)
    intersection = (onehot * p).sum(axes)
    ground, pred = (onehot.square(), p.square()) if squared else (onehot, p)
    denominator = ground.sum(axes) + pred.sum(axes)
    return (1 - (2 * intersection + smooth) / (denominator + smooth)).mean(), F.cross_entropy(z, y)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_monai(squared, background):
    z, y = inputs("dice_ce", (3, 4, 9, 7), torch.float64)
    kwargs = {"squared": squared, "include_background": background, "smooth": 1e-3}
    ours = call("dice_ce", [z, y], kwargs, reference=True)
    peer = monai_dice_ce(z, y, squared, background, 1e-3)
    assert [v.item() for v in ours] == pytest.approx([v.item() for v in peer], rel=1e-12)
    if importlib.util.find_spec("monai"):
        from monai.losses import DiceCELoss

        loss = DiceCELoss(include_background=background, to_onehot_y=True, softmax=True, squared_pred=squared,
                          batch=True, smooth_nr=1e-3, smooth_dr=1e-3)  # fmt: skip
        assert loss(z, y.unsqueeze(1)).item() == pytest.approx(sum(peer).item(), rel=1e-12)


def test_references_without_triton_compile_whole():
    """fp64 and, in a process that does not interpret, CPU tensors take the reference; torch.compile sees one graph."""
    for loss in LOSSES:
        tensors = inputs(loss, (2, 4, 6, 7), torch.float64)
        expected = call(loss, tensors, {}, reference=True)
        compiled = torch.compile(getattr(load(FILES[loss]), NAMES[loss]), backend="eager", fullgraph=True)
        got = compiled(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(got if isinstance(got, tuple) else (got,), expected, strict=True))
        assert expected[0].dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batch_and_bad_input(loss):
    fn = getattr(load(FILES[loss]), NAMES[loss])
    tensors = inputs(loss, (2, 4, 6, 7))
    empty = [x[:0] for x in tensors]
    empty[0].requires_grad_()
    out = fn(*empty)
    out = out if isinstance(out, tuple) else (out,)
    assert [v.item() for v in out] == [0.0] * len(out)
    sum(out).backward()
    first, second, *rest = tensors
    wrong = [[first[0], second, *rest], [first[:, :1], second, *rest], [first, second[..., :-1], *rest]]
    wrong.append([first.long(), second, *rest])
    if loss in ("dice_ce", "student"):
        wrong.append([first, second.float(), *rest])
        with pytest.raises(ValueError, match="smooth"):
            fn(*tensors, smooth=-1.0)
    if loss != "dice_ce":
        with pytest.raises(ValueError, match="tau"):
            fn(*tensors, tau=0.0)
    for args in wrong:
        with pytest.raises(ValueError, match=r"want|must"):
            fn(*args)


COPY = """
import sys, warnings
import torch
{before}
import {name} as module
assert "torch._dynamo" not in sys.modules and not torch.cuda.is_initialized()
s, t, y = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
out = {call}
(sum(out) if isinstance(out, tuple) else out).backward()
assert s.grad.abs().max() > 0
print("ok")
"""


def test_each_file_runs_alone(tmp_path):
    calls = {"softmax_kl": "module.softmax_kl(s, t)", "dice_ce": "module.dice_ce(s, y)",
             "student_loss": "module.student_loss(s, y, t, t)"}  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    for name, code in calls.items():
        (tmp_path / name).mkdir()
        shutil.copy(KERNELS / f"{name}.py", tmp_path / name)
        before = "sys.modules['triton'] = None" if name == "softmax_kl" else ""  # as on a machine without Triton
        done = python("-c", COPY.format(name=name, call=code, before=before), cwd=tmp_path / name, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_the_parts_that_two_files_share_are_equal():
    """dice_ce.py and student_loss.py are copied alone, so each has its own: one text, but for the names of the logits
    and the temperature."""
    functions = []
    for name in ("dice_ce", "student_loss"):
        nodes = ast.walk(ast.parse((KERNELS / f"{name}.py").read_text()))
        functions.append({n.name: ast.unparse(n) for n in nodes if isinstance(n, ast.FunctionDef)})
    dice, student = functions
    alike = ("_pixel_ptrs", "_load_shifted", "_store", "_thread_sum", "_finish_kernel", "_words", "_geometry",
             "_warn_no_triton")  # fmt: skip
    assert {name: dice[name] for name in alike} == {name: student[name] for name in alike}
    sums = student["_sums_kernel"].replace("s_", "z_").replace("_exp(z, 1.0, C)", "_exp(z, C)")
    assert dice["_sums_kernel"].replace("s_", "z_") == sums
    exp = student["_exp"].replace(", inv_tau", "").replace(" * inv_tau", "").replace(" / tau", "")
    assert dice["_exp"] == exp


@pytest.mark.parametrize("name", sorted(set(FILES.values())))
def test_without_triton_cuda_tensors_warn_once(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.find_spec(f"kernels.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    on_cuda = SimpleNamespace(is_cuda=True, shape=(1, 4, 2, 2), dtype=torch.float32, numel=lambda: 16)
    with pytest.warns(UserWarning, match="Triton") as seen:
        assert [module._use_triton(on_cuda) for _ in range(2)] == [False, False]
    assert len(seen) == 1


# ---- what only a GPU can show --------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_and_host_syncs(loss):
    tensors = inputs(loss, (24, 4, 256, 256), device="cuda", target_dtype=torch.uint8)
    leaf = tensors[0].requires_grad_()
    for _ in range(2):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (grad,) = torch.autograd.grad(sum(call(loss, [leaf, *tensors[1:]], {})), leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        peak = torch.cuda.max_memory_allocated() - before
        del grad
    assert peak <= leaf.numel() * leaf.element_size() + 2**20

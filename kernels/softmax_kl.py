"""
Distillation between two segmentation networks, one pass over memory: the KL divergence or the squared distance of
temperature-softened class probabilities. Triton on CUDA, plain torch elsewhere; NCHW logits are read where they lie.

    loss = softmax_kl(student_logits, teacher_logits, tau=2.0)        # Hinton et al. 2015, arXiv 1503.02531, section 2
    loss = softmax_mse(student_logits, teacher_logits, tau=20.0)      # ACT-Net, arXiv 2207.01900

Maths. M = N*H*W pixels, p = softmax(s / tau) and q = softmax(t / tau) over the C classes of a pixel, e = p - q:
    KL   L = tau^2/M * sum q (log q - log p)      dL/ds_k = tau/M * e_k
    MSE  L =     1/M * sum e^2                    dL/ds_k = 2/(tau M) * p_k (e_k - sum_c e_c p_c)
The gradient goes to the student alone. In the KL, sum p = sum q = 1 lets every term be written q (exp(-d) - 1 + d) with
d = log q - log p: no term is negative, and where |d| is small a series replaces the difference of near-equal numbers
(logits of standard deviation 0.5 at tau = 20: the worst hundredth of the pixels is wrong by 3e-3 and more in the plain
form, by 8e-6 and more in this one, both in fp32).

Bytes. Let U be one logits tensor. A gradient is local to its pixel, so the forward writes it while the logits are on
chip, already multiplied by the gradient that `expected_grad` says will arrive (1 for `loss.backward()`, the term's
weight in a weighted sum). The backward compares that number with the one that did arrive, on the device and without a
host sync: equal, and it is done; different, and it computes the gradient anew. A wrong guess costs time, never a digit.
                          forward           backward             total    peak beyond the inputs
    expected_grad right   R s, R t, W g     4 bytes              3 U      1 U
    expected_grad wrong   R s, R t, W g     R s, R t, W g        6 U      1 U
    expected_grad=None    R s, R t          R s, R t, W g        5 U      1 U, only in the backward
    eager, kl             15 kernels                                26 U in fp32, 61 U in bf16 (its U is half)
    eager, mse            11 kernels                                18 U in fp32, 45 U in bf16
The other design, a stored gradient scaled in the backward, moves 5 U as well, rounds twice and needs 2 U of memory.
fp16: a gradient of a mean over 24*256*256 pixels is below 1e-7 and fp16 ends at 6e-8, which is why a loss scale exists.
Whatever arrives is multiplied in fp32 before the cast, and since a scale is never 1, fp16 logits take the row of None.

Loads and stores take 16 bytes per thread (C <= 4, fp32 also C <= 8) where H*W is divisible by 16 and the pixels of a
class are neighbours: Triton specialises on integers and addresses divisible by 16. Elsewhere (channels_last, 17 x 13,
a slice that starts off a 16-byte boundary) the same source is compiled once more with narrower ones: the same bytes in
more instructions.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS and Windows: the reference serves
    triton = None

if triton is not None:

    @triton.jit
    def _pixel_ptrs(ptr, n, pixel, W, stride_n, stride_h, stride_w, FLAT: tl.constexpr):
        """Addresses of class 0 at the pixels of slice n (int64). FLAT: rows follow each other, no division needed."""
        if FLAT:
            return ptr + n * stride_n + pixel.to(tl.int64) * stride_w
        else:
            return ptr + n * stride_n + (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w

    @triton.jit
    def _load_shifted(ptrs, stride_c, mask, inv_tau, C: tl.constexpr):
        """C vectors of (logit - the pixel's largest) / tau: in this order logits of 1e4 keep their digits."""
        x = ()
        for _ in tl.static_range(C):
            x = x + (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)
            ptrs += stride_c  # walks from class to class, so no c * stride can overflow
        top = x[0]
        for c in tl.static_range(1, C):
            top = tl.maximum(top, x[c])
        out = ()
        for c in tl.static_range(C):
            out = out + ((x[c] - top) * inv_tau,)
        return out

    @triton.jit
    def _exp(z, C: tl.constexpr):
        """C vectors of exp(z_c), and their sum."""
        e = (tl.exp(z[0]),)
        total = e[0]
        for c in tl.static_range(1, C):
            e = e + (tl.exp(z[c]),)
            total += e[c]
        return e, total

    @triton.jit
    def _distance_kernel(
        # data ptrs
        s_ptr, t_ptr,  # (N, C, H, W) logits of student and teacher, fp32 | fp16 | bf16 each
        g_ptr,  # (N, C, H, W) gradient of the student's logits, the student's dtype (GRAD)
        up_ptr,  # () fp32, the incoming gradient (backward)
        loss_ptr,  # (programs,) fp32, each program's share of the loss (LOSS)
        # shapes
        HW, W, blocks,  # pixels of a slice, of a row; blocks of a slice
        # strides
        s_n, s_c, s_h, s_w, t_n, t_c, t_h, t_w, g_n, g_c, g_h, g_w,
        # numbers
        inv_tau, loss_scale, grad_scale, expected,
        # constants
        C: tl.constexpr, MSE: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, FLAT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        up = expected
        if not LOSS:
            up = tl.load(up_ptr)
            if up == expected:  # the forward has written this very gradient
                return
        pid = tl.program_id(0)
        n = (pid // blocks).to(tl.int64)
        pixel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = pixel < HW
        zs = _load_shifted(_pixel_ptrs(s_ptr, n, pixel, W, s_n, s_h, s_w, FLAT), s_c, mask, inv_tau, C)
        zt = _load_shifted(_pixel_ptrs(t_ptr, n, pixel, W, t_n, t_h, t_w, FLAT), t_c, mask, inv_tau, C)
        es, sum_s = _exp(zs, C)
        et, sum_t = _exp(zt, C)
        inv_s, inv_t = 1.0 / sum_s, 1.0 / sum_t
        log_ratio = tl.log(sum_t) - tl.log(sum_s)

        p, e = (), ()
        loss = tl.zeros((BLOCK,), tl.float32)
        dot = tl.zeros((BLOCK,), tl.float32)
        for c in tl.static_range(C):
            pc, qc = es[c] * inv_s, et[c] * inv_t
            p, e = p + (pc,), e + (pc - qc,)
            if MSE:
                loss += e[c] * e[c]
                dot += e[c] * pc
            else:
                d = (zt[c] - zs[c]) - log_ratio  # log q - log p
                series = 1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720))))
                loss += tl.where(tl.abs(d) < 0.25, qc * d * d * series, e[c] + qc * d)
        if LOSS:
            tl.store(loss_ptr + pid, tl.sum(tl.where(mask, loss, 0.0)) * loss_scale)
        if GRAD:
            ptrs = _pixel_ptrs(g_ptr, n, pixel, W, g_n, g_h, g_w, FLAT)
            for c in tl.static_range(C):
                local = p[c] * (e[c] - dot) if MSE else e[c]
                tl.store(ptrs, (local * (up * grad_scale)).to(g_ptr.dtype.element_ty), mask=mask)
                ptrs += g_c


def _launch(student, teacher, grad, upstream, tau, expected, mse):
    """Forward where `upstream` is None: returns the loss. Otherwise fills `grad`."""
    n, c, h, w = student.shape
    # Four warps, 16 bytes per thread and load: 4 pixels of fp32, 8 of the half types; fewer where registers run out.
    block = 128 * (16 // student.element_size() if c <= 4 else 4 if c <= 8 else 2)
    blocks = -(-h * w // block)
    tensors = [student, teacher] + ([] if grad is None else [grad])
    flat = h == 1 or all(x.stride(2) == w * x.stride(3) for x in tensors)
    pixels = n * h * w
    loss = student.new_empty(n * blocks, dtype=torch.float32) if upstream is None else None
    with torch.cuda.device_of(student):
        # No fused multiply-add: it would round one product of `pc - qc` and not the other; equal logits would not
        # give exactly 0, neither loss nor gradient.
        _distance_kernel[(n * blocks,)](
            student, teacher, grad, upstream, loss,
            h * w, w, blocks,
            *student.stride(), *teacher.stride(), *((0, 0, 0, 0) if grad is None else grad.stride()),
            1 / tau, (1 if mse else tau * tau) / pixels, (2 / tau if mse else tau) / pixels, expected,
            C=c, MSE=mse, LOSS=upstream is None, GRAD=grad is not None, FLAT=flat, BLOCK=block, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        return None if loss is None else loss.sum()


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, tau, mse, expected):
        ctx.grad = None if expected is None else torch.empty_like(student)
        ctx.args = tau, expected, mse
        # A teacher that ran under inference_mode may not be saved by autograd, but may be kept.
        ctx.inference_teacher = teacher if teacher.is_inference() else None
        ctx.save_for_backward(student, None if teacher.is_inference() else teacher)
        return _launch(student, teacher, ctx.grad, None, tau, expected or 0.0, mse)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        student, teacher = ctx.saved_tensors
        tau, expected, mse = ctx.args
        grad, ctx.grad = ctx.grad, None  # autograd owns it from here: a second backward makes its own
        if grad is None:
            grad, expected = torch.empty_like(student), float("nan")  # equal to nothing
        _launch(student, ctx.inference_teacher if teacher is None else teacher, grad, upstream, tau, expected, mse)
        return grad, None, None, None, None


# ---- public ----------------------------------------------------------------------------------------------------------


def softmax_kl(student_logits, teacher_logits, tau=1.0, *, expected_grad=1.0):
    """
    tau^2 * mean over the N*H*W pixels of KL(teacher || student), summed over classes; a scalar, fp32 (fp64 from fp64).

    student_logits, teacher_logits: (N, C, H, W), floating, any strides; only the student gets a gradient.
    expected_grad: the gradient that this loss will receive, i.e. its weight in the total; None: no guess. Speed only.
    Kernel for 2..16 classes below fp64, the reference for all else. Raises ValueError for other shapes or tau <= 0.
    """
    return _distance(student_logits, teacher_logits, tau, False, expected_grad)


def softmax_mse(student_logits, teacher_logits, tau=1.0, *, expected_grad=1.0):
    """Mean over the N*H*W pixels of sum over classes of (p - q)^2, no factor of tau; arguments as in `softmax_kl`."""
    return _distance(student_logits, teacher_logits, tau, True, expected_grad)


def softmax_kl_reference(student_logits, teacher_logits, tau=1.0):
    """`softmax_kl` in plain torch, fp32 inside (fp64 from fp64)."""
    log_p = F.log_softmax(_upcast(student_logits) / tau, 1)
    log_q = F.log_softmax(teacher_logits.detach().to(log_p.dtype) / tau, 1)
    return (log_q.exp() * (log_q - log_p)).sum() * (tau * tau / _pixels(student_logits))


def softmax_mse_reference(student_logits, teacher_logits, tau=1.0):
    """`softmax_mse` in plain torch, fp32 inside (fp64 from fp64)."""
    p = F.softmax(_upcast(student_logits) / tau, 1)
    q = F.softmax(teacher_logits.detach().to(p.dtype) / tau, 1)
    return F.mse_loss(p, q, reduction="sum") / _pixels(student_logits)


def _upcast(x):
    return x if x.dtype == torch.float64 else x.float()


def _pixels(logits):
    return max(logits.numel() // max(logits.shape[1], 1), 1)  # an empty batch has loss 0


def _distance(student, teacher, tau, mse, expected):
    if student.dim() != 4 or student.shape[1] < 2 or student.shape != teacher.shape:
        raise ValueError(f"want two (N, C >= 2, H, W) tensors, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not (student.is_floating_point() and teacher.is_floating_point() and student.device == teacher.device):
        raise ValueError("student and teacher logits must be floating-point tensors on one device")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if not _use_triton(student, teacher):
        return (softmax_mse_reference if mse else softmax_kl_reference)(student, teacher, tau)
    apply = _Distance.apply
    if torch.compiler.is_compiling():  # the graph breaks around the launch
        apply = torch.compiler.disable(apply)
    if student.dtype == torch.float16 or not (student.requires_grad and torch.is_grad_enabled()):
        expected = None
    return apply(student, teacher.detach(), float(tau), mse, None if expected is None else float(expected))


def _use_triton(*tensors):
    x = tensors[0]
    if x.numel() == 0 or not 2 <= x.shape[1] <= 16 or any(t.dtype == torch.float64 for t in tensors):
        return False
    if x.is_cuda:
        return triton is not None or _warn_no_triton()
    # TRITON_INTERPRET counts at decoration, so the kernel's type tells and the environment of today does not.
    return x.device.type == "cpu" and triton is not None and not isinstance(_distance_kernel, triton.JITFunction)


@functools.cache
def _warn_no_triton():
    warnings.warn("Triton is not installed: the losses run in plain torch", stacklevel=4)
    return False

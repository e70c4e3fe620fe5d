"""
The student's whole objective in two passes over memory and one gradient: Dice and cross-entropy on the labelled slices,
distillation from a teacher and consistency with a co-teacher on all of them. Triton on CUDA, plain torch elsewhere.

    dice, ce, kd, co = student_loss(s, target, t, c, tau=20.0, distill="mse", expected_grads=(1, 1, w_kd, w_co))
    loss = dice + ce + w_kd * kd + w_co * co             # ACT-Net, arXiv 2207.01900; dice + ce is its L_seg

Maths. s, t, c: logits of student, teacher, co-teacher, (N, C, H, W); the first N_l slices are labelled. M = N*H*W,
p = softmax(s), r = softmax(c), p' = softmax(s / tau), q' = softmax(t / tau), V labelled pixels, K scored classes:
    I_c = sum p_c y_c      D_c = smooth + sum y_c + (sum p_c^2 if squared else sum p_c)     R_c = (2 I_c + smooth) / D_c
    dice = 1 - 1/K sum_c R_c         a_c = d dice/d p_c = 1/(K D_c) * (R_c * (2 p_c if squared else 1) - 2 y_c)
    ce   = -1/V sum log p_y          over the labelled pixels that are not ignored, as in Dice
    kd   = tau^2/M sum q' (log q' - log p')  for distill="kl",  1/M sum e^2 with e = p' - q'  for "mse"
    co   = 1/M sum (p - r)^2
    d/ds_k = p_k (A_k - sum_c A_c p_c) + g_ce/V (p_k - y_k) + g_kd B_k         A = g_dice a + g_co 2/M (p - r)
             B_k = tau/M e_k  for "kl",  2/(tau M) p'_k (e_k - sum_c e_c p'_c)  for "mse"

Bytes. Let U be one logits tensor of all N slices, u its labelled part, L the labels. `expected_grads` are the gradients
that the four terms will receive, their weights in the sum: the second pass writes the gradient for them, the backward
compares them, on the device, with those that arrive: nothing to do, or all of it anew. A wrong guess costs time only.
                             forward                      backward                  total        u = U/2, fp32, uint8
    expected_grads right     R u, L; R s, t, c, L; W g    16 bytes                  4 U + u + 2 L        4.6 U
    expected_grads wrong     the same                     R s, t, c, L; W g         8 U + u + 3 L        8.6 U
    expected_grads=None      R u, L; R s, t, c            R s, t, c, L; W g         7 U + u + 2 L        7.6 U
    dice_ce, softmax_kl and softmax_mse, right guesses: 6 U + 3 u + 2 L, and 8 U to slice and to add    15.6 U
    eager                    79 kernels                                                                 69 U
Peak beyond the inputs: one gradient. fp16 is never guessed, as a loss scaler's factor is not 1; incoming gradients are
multiplied in fp32 before the cast, so what is near 1e-7 keeps its digits under a loss scale. No atomics, fixed order of
every sum: two runs agree bit for bit. Loads of NCHW logits take 16 bytes where H*W is divisible by 16 (C <= 4, fp32
C <= 8; half types 8 in the second pass); channels_last of 4 half-type classes likewise, two pixels of 8 bytes at once.
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

PROGRAMS = 768  # of the first pass: what an H100 keeps resident in fp32, six per multiprocessor; fixes the sums' order

if triton is not None:

    @triton.jit
    def _pixel_ptrs(ptr, n, pixel, W, stride_n, stride_h, stride_w, FLAT: tl.constexpr, WORDS: tl.constexpr = False):
        """Addresses at the pixels of slice n (int64), class 0. FLAT: rows follow each other, no division needed."""
        if WORDS:  # a pixel is one int64, see `_words`
            return (ptr + n * stride_n).to(tl.pointer_type(tl.int64), bitcast=True) + pixel
        elif FLAT:
            return ptr + n * stride_n + pixel.to(tl.int64) * stride_w
        else:
            return ptr + n * stride_n + (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w

    @triton.jit
    def _load_shifted(ptr, strides, n, pixel, W, mask, C: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr):
        """C vectors of logit - the pixel's largest: in this order logits of 1e4 keep their digits."""
        ptrs = _pixel_ptrs(ptr, n, pixel, W, strides[0], strides[2], strides[3], FLAT, WORDS)
        word = tl.load(ptrs, mask=mask, other=0) if WORDS else 0
        x, z, top = (), (), None
        for c in tl.static_range(C):
            if WORDS:
                x = x + ((word >> 16 * c).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True).to(tl.float32),)
            else:
                x = x + (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)
                ptrs += strides[1]  # walks from class to class, so no c * stride can overflow
            top = x[0] if c == 0 else tl.maximum(top, x[c])
        for c in tl.static_range(C):
            z = z + (x[c] - top,)
        return z

    @triton.jit
    def _store(x, ptr, strides, n, pixel, W, mask, C: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr):
        """C vectors to where `_load_shifted` would read them."""
        ptrs = _pixel_ptrs(ptr, n, pixel, W, strides[0], strides[2], strides[3], FLAT, WORDS)
        word = tl.zeros(mask.shape, tl.int64)
        for c in tl.static_range(C):
            if WORDS:
                word |= x[c].to(ptr.dtype.element_ty).to(tl.uint16, bitcast=True).to(tl.int64) << 16 * c
            else:
                tl.store(ptrs, x[c].to(ptr.dtype.element_ty), mask=mask)
                ptrs += strides[1]
        if WORDS:
            tl.store(ptrs, word, mask=mask)

    @triton.jit
    def _exp(z, inv_tau, C: tl.constexpr):
        """C vectors of exp(z_c / tau), and their sum."""
        e, total = (), None
        for c in tl.static_range(C):
            e = e + (tl.exp(z[c] * inv_tau),)
            total = e[0] if c == 0 else total + e[c]
        return e, total

    @triton.jit
    def _thread_sum(x):
        """Adds the neighbours that each of the 128 threads holds: no exchange, and one register per accumulator."""
        return tl.sum(tl.reshape(x, (128, x.shape[0] // 128)), axis=1)

    @triton.jit
    def _sums_kernel(
        # data ptrs
        s_ptr,  # (N, C, H, W) student's logits, fp32 | fp16 | bf16; the labelled slices come first
        y_ptr,  # (N_l, H, W) labels, any integer
        part_ptr,  # (3 C + 1, programs) fp32: per class sum p y, sum p^2 or p, sum y; then sum -log p_y
        # shapes
        HW, W, blocks, total_blocks, programs,
        # strides
        s_n, s_c, s_h, s_w, y_n, y_h, y_w,
        # numbers
        ignore,
        # constants
        C: tl.constexpr, SQUARED: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        pid = tl.program_id(0)
        acc = (tl.zeros((128,), tl.float32),) * (3 * C + 1)
        for block in range(pid, total_blocks, programs):
            n = (block // blocks).to(tl.int64)
            pixel = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
            mask = pixel < HW
            y = tl.load(_pixel_ptrs(y_ptr, n, pixel, W, y_n, y_h, y_w, FLAT), mask=mask, other=0).to(tl.int32)
            keep = mask & (y != ignore)
            z = _load_shifted(s_ptr, (s_n, s_c, s_h, s_w), n, pixel, W, mask, C, FLAT, WORDS)
            e, total = _exp(z, 1.0, C)
            inv_total, log_total = 1.0 / total, tl.log(total)
            nll = tl.where(keep, float("nan"), 0.0)  # a label that is no class stays NaN: seen without a host sync
            new = ()
            for c in tl.static_range(C):
                p = tl.where(keep, e[c] * inv_total, 0.0)
                hit = keep & (y == c)
                nll = tl.where(hit, log_total - z[c], nll)
                new = new + (
                    acc[3 * c] + _thread_sum(tl.where(hit, p, 0.0)),
                    acc[3 * c + 1] + _thread_sum(p * p if SQUARED else p),
                    acc[3 * c + 2] + _thread_sum(hit.to(tl.float32)),
                )
            acc = new + (acc[3 * C] + _thread_sum(nll),)
        for k in tl.static_range(3 * C + 1):
            tl.store(part_ptr + k * programs + pid, tl.sum(acc[k]))

    @triton.jit
    def _finish_kernel(
        part_ptr,  # (3 C + 1, programs) fp32
        dice_ptr, ce_ptr,  # () fp32, the losses
        coef_ptr,  # (2 C + 1,) fp32: a_c = coef[2c] y_c + coef[2c+1] (2 p_c or 1); last 1/V
        programs, smooth,
        C: tl.constexpr, FIRST: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        i = tl.arange(0, LANES)
        mask = i < programs
        dice, count = 0.0, 0.0
        for c in tl.static_range(C):
            row = part_ptr + 3 * c * programs + i
            inter = tl.sum(tl.load(row, mask=mask, other=0.0))
            p_sum = tl.sum(tl.load(row + programs, mask=mask, other=0.0))
            y_sum = tl.sum(tl.load(row + 2 * programs, mask=mask, other=0.0))
            count += y_sum
            den = p_sum + y_sum + smooth
            empty = den == 0.0  # smooth = 0 and the class nowhere
            inv = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, den))
            ratio = tl.where(empty, 1.0, (2.0 * inter + smooth) * inv)
            weight = 1.0 / (C - FIRST) if c >= FIRST else 0.0
            dice += weight * (1.0 - ratio)
            tl.store(coef_ptr + 2 * c, -2.0 * weight * inv)
            tl.store(coef_ptr + 2 * c + 1, weight * ratio * inv)
        inv_count = 1.0 / tl.maximum(count, 1.0)
        tl.store(coef_ptr + 2 * C, inv_count)
        nll = tl.load(part_ptr + 3 * C * programs + i, mask=mask, other=0.0)
        tl.store(dice_ptr, dice)
        tl.store(ce_ptr, tl.sum(nll) * inv_count)

    @triton.jit
    def _student_kernel(
        # data ptrs
        s_ptr, t_ptr, c_ptr,  # (N, C, H, W) logits, fp32 | fp16 | bf16 each; t_ptr and c_ptr may be None
        y_ptr,  # (N_l, H, W) labels, any integer
        g_ptr,  # (N, C, H, W) gradient of the student's logits, their dtype (GRAD)
        coef_ptr,  # (2 C + 1,) fp32, from _finish_kernel
        up_dice_ptr, up_ce_ptr, up_kd_ptr, up_co_ptr,  # () fp32, the incoming gradients (backward)
        part_ptr,  # (2, programs) fp32, each program's share of kd and co (LOSS)
        # shapes
        HW, W, blocks, labeled,
        # strides
        s_n, s_c, s_h, s_w, t_n, t_c, t_h, t_w, c_n, c_c, c_h, c_w, y_n, y_h, y_w, g_n, g_c, g_h, g_w,
        # numbers
        ignore, inv_tau, kd_loss_scale, kd_grad_scale, inv_pixels, up_dice, up_ce, up_kd, up_co,
        # constants
        C: tl.constexpr, SQUARED: tl.constexpr, MSE: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
        FLAT: tl.constexpr, S_WORDS: tl.constexpr, T_WORDS: tl.constexpr, C_WORDS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        if not LOSS:
            dice_in, ce_in = tl.load(up_dice_ptr), tl.load(up_ce_ptr)
            kd_in, co_in = tl.load(up_kd_ptr), tl.load(up_co_ptr)
            if (dice_in == up_dice) & (ce_in == up_ce) & (kd_in == up_kd) & (co_in == up_co):
                return  # the forward has written this very gradient
            up_dice, up_ce, up_kd, up_co = dice_in, ce_in, kd_in, co_in
        pid = tl.program_id(0)
        n = (pid // blocks).to(tl.int64)
        pixel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = pixel < HW
        zs = _load_shifted(s_ptr, (s_n, s_c, s_h, s_w), n, pixel, W, mask, C, FLAT, S_WORDS)
        zero = tl.zeros((BLOCK,), tl.float32)
        co, kd, dot = zero, zero, zero
        # A, the gradient at the probabilities of Dice and consistency, and its way back through the softmax
        es, sum_s = _exp(zs, 1.0, C)
        inv_s = 1.0 / sum_s
        labels = pixel < tl.where(n < labeled, HW, 0)
        y = tl.load(_pixel_ptrs(y_ptr, n, pixel, W, y_n, y_h, y_w, FLAT), mask=labels, other=0).to(tl.int32)
        keep = labels & (y != ignore)
        up_ce *= tl.load(coef_ptr + 2 * C)
        if c_ptr is not None:
            zc = _load_shifted(c_ptr, (c_n, c_c, c_h, c_w), n, pixel, W, mask, C, FLAT, C_WORDS)
            ec, sum_c = _exp(zc, 1.0, C)
            inv_c = 1.0 / sum_c
        p, a, grad = (), (), ()  # without GRAD nobody reads them, and the compiler drops what leads to them
        for c in tl.static_range(C):
            pc = es[c] * inv_s
            on_label = up_dice * tl.load(coef_ptr + 2 * c)
            on_prob = up_dice * tl.load(coef_ptr + 2 * c + 1)
            ac = tl.where(y == c, on_label, 0.0) + on_prob * (2.0 * pc if SQUARED else 1.0)
            ac = tl.where(keep, ac, 0.0)
            if c_ptr is not None:
                diff = pc - ec[c] * inv_c
                co += diff * diff
                ac += (2.0 * up_co * inv_pixels) * diff
            p, a = p + (pc,), a + (ac,)
            dot += ac * pc
        for c in tl.static_range(C):
            ce_grad = tl.where(keep, up_ce * (p[c] - tl.where(y == c, 1.0, 0.0)), 0.0)
            grad = grad + (p[c] * (a[c] - dot) + ce_grad,)

        if t_ptr is not None:
            zt = _load_shifted(t_ptr, (t_n, t_c, t_h, t_w), n, pixel, W, mask, C, FLAT, T_WORDS)
            es, sum_s = _exp(zs, inv_tau, C)
            et, sum_t = _exp(zt, inv_tau, C)
            scale, total = up_kd * kd_grad_scale, ()
            if MSE:
                inv_s, inv_t = 1.0 / sum_s, 1.0 / sum_t
                dot = zero
                for c in tl.static_range(C):
                    e = es[c] * inv_s - et[c] * inv_t
                    kd += e * e
                    dot += e * es[c] * inv_s
                for c in tl.static_range(C):
                    pc = es[c] * inv_s
                    total = total + (grad[c] + scale * pc * ((pc - et[c] * inv_t) - dot),)
            else:
                log_s, log_t = tl.log(sum_s), tl.log(sum_t)
                for c in tl.static_range(C):
                    # exp once more rather than es / sum_s: registers are scarcer here than the exponential units
                    log_p, log_q = zs[c] * inv_tau - log_s, zt[c] * inv_tau - log_t
                    qc = tl.exp(log_q)
                    e = tl.exp(log_p) - qc
                    # q (exp(-d) - 1 + d): no term is negative, and the series keeps the digits of a small one
                    d = log_q - log_p
                    series = 1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720))))
                    kd += tl.where(tl.abs(d) < 0.25, qc * d * d * series, e + qc * d)
                    total = total + (grad[c] + scale * e,)
            grad = total

        if LOSS:
            tl.store(part_ptr + pid, tl.sum(tl.where(mask, kd, 0.0)) * kd_loss_scale)
            tl.store(part_ptr + tl.num_programs(0) + pid, tl.sum(tl.where(mask, co, 0.0)) * inv_pixels)
        if GRAD:
            _store(grad, g_ptr, (g_n, g_c, g_h, g_w), n, pixel, W, mask, C, FLAT, S_WORDS)


def _words(*tensors):
    """Whether each pixel is an aligned word of 8 bytes, 4 classes of a half type, and the next pixel the next word."""
    given = [x for x in tensors if x is not None]
    dense = all(x.shape[1] == 4 and x.element_size() == 2 and x.stride()[1:] == (1, 4 * x.shape[3], 4) for x in given)
    return dense and all((x.data_ptr() | 2 * x.stride(0)) % 8 == 0 for x in given)


def _geometry(vec, *tensors):
    """Pixels per block, blocks per slice, and whether every tensor's rows follow each other."""
    _, c, h, w = tensors[0].shape
    vec = vec if c <= 4 else 4 if c <= 8 else 2  # fewer where registers run out; four warps throughout
    flat = h == 1 or all(x.stride(-2) == w * x.stride(-1) for x in tensors if x is not None)
    return 128 * vec, -(-h * w // (128 * vec)), flat


def _launch(student, target, teacher, coteacher, grad, coef, ups, expected, tau, squared, mse, ignore):
    """Second pass: returns (kd, co) where `ups` is None (forward), and fills `grad` where there is one."""
    n, c, h, w = student.shape
    # 16 bytes per thread and load in fp32 and in words, 8 in the half types: 8 pixels of them want all 255 registers,
    # and the 256 bytes of a warp are whole sectors either way.
    words = _words(student, grad)
    block, blocks, flat = _geometry(2 if words else 4, student, target, teacher, coteacher, grad)
    strides = [v for x in (student, teacher, coteacher) for v in ((0, 0, 0, 0) if x is None else x.stride())]
    pixels = n * h * w
    part = None if ups else student.new_empty((2, n * blocks), dtype=torch.float32)
    # No fused multiply-add: it rounds one product of `pc - qc` and not the other, so equal logits would not give 0.
    _student_kernel[(n * blocks,)](
        student, teacher, coteacher, target, grad, coef, *(ups or (None,) * 4), part, h * w, w, blocks, len(target),
        *strides, *target.stride(), *((0, 0, 0, 0) if grad is None else grad.stride()),
        ignore, 1 / tau, (1 if mse else tau * tau) / pixels, (2 / tau if mse else tau) / pixels, 1 / pixels, *expected,
        C=c, SQUARED=squared, MSE=mse, LOSS=ups is None, GRAD=grad is not None, FLAT=flat, BLOCK=block,
        S_WORDS=words, T_WORDS=_words(teacher), C_WORDS=_words(coteacher), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return None if ups else (part[0].sum(), part[1].sum())


class _StudentLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, target, teacher, coteacher, tau, mse, smooth, squared, first, ignore, expected):
        _, c, h, w = student.shape
        words = _words(student)  # 16 bytes per load
        block, blocks, flat = _geometry(4 if words else 16 // student.element_size(), student, target)
        programs = max(min(len(target) * blocks, PROGRAMS), 1)
        sums = student.new_empty((3 * c + 1, programs), dtype=torch.float32)
        dice, ce = (student.new_empty((), dtype=torch.float32) for _ in range(2))
        coef = student.new_empty(2 * c + 1, dtype=torch.float32)
        ctx.args, ctx.expected = (tau, squared, mse, ignore), expected
        ctx.grad = None if expected is None else torch.empty_like(student)
        # Networks that ran under inference_mode may not be saved by autograd, but may be kept.
        others = [x for x in (teacher, coteacher) if x is not None and not x.is_inference()]
        ctx.save_for_backward(student, target, coef, *others)
        ctx.kept = [x if x is None or x.is_inference() else ... for x in (teacher, coteacher)]
        with torch.cuda.device_of(student):
            _sums_kernel[(programs,)](
                student, target, sums, h * w, w, blocks, len(target) * blocks, programs,
                *student.stride(), *target.stride(), ignore,
                C=c, SQUARED=squared, FLAT=flat, WORDS=words, BLOCK=block, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            _finish_kernel[(1,)](
                sums, dice, ce, coef, programs, smooth,
                C=c, FIRST=first, LANES=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            expected = (0.0, 0.0, 0.0, 0.0) if ctx.grad is None else expected
            kd, co = _launch(student, target, teacher, coteacher, ctx.grad, coef, None, expected, *ctx.args)
        return dice, ce, kd, co

    @staticmethod
    @once_differentiable
    def backward(ctx, *ups):
        student, target, coef, *others = ctx.saved_tensors
        teacher, coteacher = (others.pop(0) if x is ... else x for x in ctx.kept)
        grad, expected, ctx.grad = ctx.grad, ctx.expected, None  # autograd owns it now: a second backward makes its own
        if grad is None:
            grad, expected = torch.empty_like(student), (float("nan"),) * 4  # equal to nothing
        with torch.cuda.device_of(student):
            _launch(student, target, teacher, coteacher, grad, coef, ups, expected, *ctx.args)
        return grad, *(None,) * 10


# ---- public ----------------------------------------------------------------------------------------------------------


def student_loss(
    student_logits, target, teacher_logits, coteacher_logits, *, tau=1.0, distill="kl", smooth=1e-5, squared=True,
    include_background=True, ignore_index=-100, expected_grads=(1.0, 1.0, 1.0, 1.0),
):  # fmt: skip
    """
    (dice, ce, kd, co), four scalars, fp32 (fp64 from fp64). dice and ce over the labelled slices, which come first; kd
    ("kl": tau^2 * KL(teacher || student); "mse": squared distance of the probabilities; both at temperature tau, summed
    over classes) and co (squared distance at temperature 1) are means over all N*H*W pixels.

    student_logits: (N, C, H, W) floating, any strides, gets the gradient; teacher_logits, coteacher_logits: the same
    shape, no gradient, None leaves the term 0; target: (N_l, H, W) integer, N_l <= N, 0..C-1 or ignore_index.
    smooth, squared, include_background: as in `dice_ce`. expected_grads: the weights of the four terms in the total, or
    None for no guess. Speed only.
    Kernel for 2..16 classes below fp64, the reference for all else. ValueError for other shapes, dtypes and options.
    A label that is no class: IndexError from the reference, a NaN ce from the kernel (a check would be a host sync).
    """
    s = student_logits
    given = [x for x in (teacher_logits, coteacher_logits) if x is not None]
    if s.dim() != 4 or s.shape[1] < 2 or any(x.shape != s.shape for x in given):
        raise ValueError(f"want logits (N, C >= 2, H, W), got {[tuple(x.shape) for x in (s, *given)]}")
    if target.dim() != 3 or target.shape[1:] != s.shape[2:] or len(target) > len(s):
        raise ValueError(f"want a target (N_l <= {len(s)}, {s.shape[2]}, {s.shape[3]}), got {tuple(target.shape)}")
    if not all(x.is_floating_point() for x in (s, *given)) or target.is_floating_point() or target.is_complex():
        raise ValueError("want floating logits and integer labels")
    if any(x.device != s.device for x in (target, *given)):
        raise ValueError(f"the student's logits are on {s.device}, other arguments are not")
    if not tau > 0 or not smooth >= 0 or distill not in ("kl", "mse"):
        raise ValueError(f"want tau > 0, smooth >= 0, distill kl or mse; got {tau}, {smooth}, {distill}")
    if not _use_triton(s, *given):
        return student_loss_reference(
            s, target, teacher_logits, coteacher_logits, tau=tau, distill=distill, smooth=smooth, squared=squared,
            include_background=include_background, ignore_index=ignore_index,
        )  # fmt: skip
    apply = _StudentLoss.apply
    if torch.compiler.is_compiling():  # the graph breaks around the launches
        apply = torch.compiler.disable(apply)
    teachers = [None if x is None else x.detach() for x in (teacher_logits, coteacher_logits)]
    guess = expected_grads is not None and s.dtype != torch.float16 and s.requires_grad and torch.is_grad_enabled()
    return apply(
        s, target, *teachers, float(tau), distill == "mse", float(smooth), bool(squared),
        0 if include_background else 1, int(ignore_index), tuple(map(float, expected_grads)) if guess else None,
    )  # fmt: skip


def student_loss_reference(
    student_logits, target, teacher_logits, coteacher_logits, *, tau=1.0, distill="kl", smooth=1e-5, squared=True,
    include_background=True, ignore_index=-100,
):  # fmt: skip
    """`student_loss` in plain torch, fp32 inside (fp64 from fp64)."""
    x = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    pixels = max(x.numel() // x.shape[1], 1)
    target = target.long()
    keep = target != ignore_index  # (N_l, H, W)
    log_p = F.log_softmax(x, 1)
    labeled = log_p[: len(target)]
    ce = F.nll_loss(labeled, target, ignore_index=ignore_index, reduction="sum") / keep.sum().clamp(min=1)

    keep = keep.unsqueeze(1)
    p = labeled.exp() * keep
    classes = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    y = (target.unsqueeze(1) == classes) & keep  # (N_l, C, H, W)
    inter = (p * y).sum((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    total = ((p.square() if squared else p) + y).sum((0, 2, 3), keepdim=True)
    den = total + smooth
    if smooth == 0:
        den = den + (den == 0)  # a class that is nowhere: 0 / 0 becomes 0 / 1
    distance = total.sub(inter, alpha=2) / den  # 1 - R_c
    dice = distance[:, 0 if include_background else 1 :].mean()

    kd = co = x.new_zeros(())
    if teacher_logits is not None:
        log_s = log_p if tau == 1 else F.log_softmax(x / tau, 1)
        t = teacher_logits.detach().to(x.dtype)
        log_t = F.log_softmax(t if tau == 1 else t / tau, 1)
        if distill == "kl":
            kd = (log_t.exp() * (log_t - log_s)).sum() * (tau * tau / pixels)
        else:
            kd = F.mse_loss(log_s.exp(), log_t.exp(), reduction="sum") / pixels
    if coteacher_logits is not None:
        co = F.mse_loss(log_p.exp(), F.softmax(coteacher_logits.detach().to(x.dtype), 1), reduction="sum") / pixels
    return dice, ce, kd, co


def _use_triton(*tensors):
    x = tensors[0]
    if x.numel() == 0 or not 2 <= x.shape[1] <= 16 or any(t.dtype == torch.float64 for t in tensors):
        return False
    if x.is_cuda:
        return triton is not None or _warn_no_triton()
    # TRITON_INTERPRET counts at decoration, so the kernel's type tells and the environment of today does not.
    return x.device.type == "cpu" and triton is not None and not isinstance(_student_kernel, triton.JITFunction)


@functools.cache
def _warn_no_triton():
    warnings.warn("Triton is not installed: the losses run in plain torch", stacklevel=3)
    return False

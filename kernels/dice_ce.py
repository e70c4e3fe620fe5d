"""
Soft Dice and cross-entropy of a segmentation from one softmax, in two passes over memory. Triton on CUDA, plain torch
elsewhere; NCHW logits and integer labels are read where they lie.

    dice_loss, ce_loss = dice_ce(logits, target)                      # (N, C, H, W), (N, H, W)
    loss = dice_loss + ce_loss                                        # Milletari et al. 2016, arXiv 1606.04797

Maths. p = softmax(z) over the classes, y the one-hot label; sums run over the V pixels whose label is not ignored, of
the whole batch at once ("batch Dice"); K classes are scored (C, or C - 1 without the background):
    I_c = sum p_c y_c      D_c = smooth + sum y_c + (sum p_c^2 if squared else sum p_c)     R_c = (2 I_c + smooth) / D_c
    dice = 1 - 1/K sum_c R_c           a_c = d dice/d p_c = 1/(K D_c) * (R_c * (2 p_c if squared else 1) - 2 y_c)
    ce   = -1/V sum_pixels log p_y     d/dz_k = g_dice * p_k (a_k - sum_c a_c p_c) + g_ce/V * (p_k - y_k)
A class absent from prediction and label has R_c = 1 (also with smooth=0); with every pixel ignored both losses are 0.

Bytes. Let U be the logits and L the labels. Dice couples all pixels, so two passes are the least:
    forward   R z, R L         per-program sums (at most 768 * (3 C + 1) floats), then one program finishes them
    backward  R z, R L, W g    in all 3 U + 2 L, peak beyond the inputs 1 U and only in the backward
    eager     42 U in fp32 with uint8 labels (44 kernels, half of them tiny), 91 U in bf16
Labels of uint8 weigh an eighth of int64. Incoming gradients are multiplied in fp32 before the cast, so an fp16 gradient
(a mean over 24*256*256 pixels: below 1e-7, where fp16 ends at 6e-8) keeps its digits under a loss scale.
16-byte loads and what becomes of them when H*W is not divisible by 16: as in softmax_kl.py; but channels_last of four
half-type classes is as fast: two pixels of 8 bytes in one load or store.
No atomics: each program adds its blocks in order, the partial sums are added in order, two runs agree bit for bit.
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
    def _exp(z, C: tl.constexpr):
        """C vectors of exp(z_c), and their sum."""
        e, total = (), None
        for c in tl.static_range(C):
            e = e + (tl.exp(z[c]),)
            total = e[0] if c == 0 else total + e[c]
        return e, total

    @triton.jit
    def _thread_sum(x):
        """Adds the neighbours that each of the 128 threads holds: no exchange, and one register per accumulator."""
        return tl.sum(tl.reshape(x, (128, x.shape[0] // 128)), axis=1)

    @triton.jit
    def _sums_kernel(
        # data ptrs
        z_ptr,  # (N, C, H, W) logits, fp32 | fp16 | bf16
        y_ptr,  # (N, H, W) labels, any integer
        part_ptr,  # (3 C + 1, programs) fp32: per class sum p y, sum p^2 or p, sum y; then sum -log p_y
        # shapes
        HW, W, blocks, total_blocks, programs,
        # strides
        z_n, z_c, z_h, z_w, y_n, y_h, y_w,
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
            z = _load_shifted(z_ptr, (z_n, z_c, z_h, z_w), n, pixel, W, mask, C, FLAT, WORDS)
            e, total = _exp(z, C)
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
    def _grad_kernel(
        # data ptrs
        z_ptr,  # (N, C, H, W) logits, fp32 | fp16 | bf16
        y_ptr,  # (N, H, W) labels, any integer
        g_ptr,  # (N, C, H, W) gradient of the logits, their dtype
        coef_ptr,  # (2 C + 1,) fp32, from _finish_kernel
        up_dice_ptr, up_ce_ptr,  # () fp32, the incoming gradients
        # shapes
        HW, W, blocks,
        # strides
        z_n, z_c, z_h, z_w, y_n, y_h, y_w, g_n, g_c, g_h, g_w,
        # numbers
        ignore,
        # constants
        C: tl.constexpr, SQUARED: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        pid = tl.program_id(0)
        n = (pid // blocks).to(tl.int64)
        pixel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = pixel < HW
        y = tl.load(_pixel_ptrs(y_ptr, n, pixel, W, y_n, y_h, y_w, FLAT), mask=mask, other=0).to(tl.int32)
        keep = mask & (y != ignore)
        z = _load_shifted(z_ptr, (z_n, z_c, z_h, z_w), n, pixel, W, mask, C, FLAT, WORDS)
        e, total = _exp(z, C)
        inv_total = 1.0 / total
        up_dice = tl.load(up_dice_ptr)
        up_ce = tl.load(up_ce_ptr) * tl.load(coef_ptr + 2 * C)
        p, a, grad = (), (), ()
        dot = tl.zeros((BLOCK,), tl.float32)
        for c in tl.static_range(C):
            pc = e[c] * inv_total
            on_label = up_dice * tl.load(coef_ptr + 2 * c)
            on_prob = up_dice * tl.load(coef_ptr + 2 * c + 1)
            ac = tl.where(y == c, on_label, 0.0) + on_prob * (2.0 * pc if SQUARED else 1.0)
            p, a = p + (pc,), a + (ac,)
            dot += ac * pc
        for c in tl.static_range(C):
            gc = p[c] * (a[c] - dot) + up_ce * (p[c] - tl.where(y == c, 1.0, 0.0))
            grad = grad + (tl.where(keep, gc, 0.0),)
        _store(grad, g_ptr, (g_n, g_c, g_h, g_w), n, pixel, W, mask, C, FLAT, WORDS)


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


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, smooth, squared, first, ignore):
        n, c, h, w = logits.shape
        words = _words(logits)  # 16 bytes per load
        block, blocks, flat = _geometry(4 if words else 16 // logits.element_size(), logits, target)
        programs = min(n * blocks, PROGRAMS)
        part = logits.new_empty((3 * c + 1, programs), dtype=torch.float32)
        dice, ce = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
        coef = logits.new_empty(2 * c + 1, dtype=torch.float32)
        with torch.cuda.device_of(logits):
            # No fused multiply-add, as in softmax_kl.py: with it `pc - qc` of equal logits would not be exactly 0.
            _sums_kernel[(programs,)](
                logits, target, part, h * w, w, blocks, n * blocks, programs,
                *logits.stride(), *target.stride(), ignore,
                C=c, SQUARED=squared, FLAT=flat, WORDS=words, BLOCK=block, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            _finish_kernel[(1,)](
                part, dice, ce, coef, programs, smooth,
                C=c, FIRST=first, LANES=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        ctx.save_for_backward(logits, target, coef)
        ctx.args = squared, ignore
        return dice, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, up_dice, up_ce):
        logits, target, coef = ctx.saved_tensors
        squared, ignore = ctx.args
        n, c, h, w = logits.shape
        grad = torch.empty_like(logits)
        words = _words(logits, grad)
        block, blocks, flat = _geometry(2 if words else 16 // logits.element_size(), logits, target, grad)
        with torch.cuda.device_of(logits):
            _grad_kernel[(n * blocks,)](
                logits, target, grad, coef, up_dice, up_ce, h * w, w, blocks,
                *logits.stride(), *target.stride(), *grad.stride(), ignore,
                C=c, SQUARED=squared, FLAT=flat, WORDS=words, BLOCK=block, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return grad, None, None, None, None, None


# ---- public ----------------------------------------------------------------------------------------------------------


def dice_ce(logits, target, *, smooth=1e-5, squared=True, include_background=True, ignore_index=-100):
    """
    (dice_loss, ce_loss), two scalars, fp32 (fp64 from fp64): 1 - mean over classes of the batch's soft Dice, and mean
    cross-entropy, both over the pixels whose label is not `ignore_index`.

    logits: (N, C, H, W) floating, any strides, gets the gradient; target: (N, H, W) integer, 0..C-1 or ignore_index.
    squared: p^2 in Dice's denominator (V-Net), else p (MONAI's default); include_background: class 0 counts in Dice.
    Kernel for 2..16 classes below fp64, the reference for all else. ValueError for other shapes, dtypes, smooth < 0.
    A label that is no class: IndexError from the reference, NaN in ce_loss from the kernel (a check is a host sync).
    """
    if logits.dim() != 4 or logits.shape[1] < 2 or target.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"want (N, C >= 2, H, W) and (N, H, W), got {tuple(logits.shape)} and {tuple(target.shape)}")
    if not logits.is_floating_point() or target.is_floating_point() or target.is_complex():
        raise ValueError(f"want floating logits and integer labels, got {logits.dtype} and {target.dtype}")
    if logits.device != target.device:
        raise ValueError(f"logits on {logits.device}, labels on {target.device}")
    if not smooth >= 0:
        raise ValueError(f"smooth must be >= 0, got {smooth}")
    if not _use_triton(logits):
        return dice_ce_reference(
            logits, target, smooth=smooth, squared=squared, include_background=include_background,
            ignore_index=ignore_index,
        )  # fmt: skip
    apply = _DiceCE.apply
    if torch.compiler.is_compiling():  # the graph breaks around the launch
        apply = torch.compiler.disable(apply)
    return apply(logits, target, float(smooth), bool(squared), 0 if include_background else 1, int(ignore_index))


def dice_ce_reference(logits, target, *, smooth=1e-5, squared=True, include_background=True, ignore_index=-100):
    """`dice_ce` in plain torch, fp32 inside (fp64 from fp64)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    keep = target != ignore_index  # (N, H, W)
    log_p = F.log_softmax(x, 1)
    ce = F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="sum") / keep.sum().clamp(min=1)

    keep = keep.unsqueeze(1)
    p = log_p.exp() * keep
    classes = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    y = (target.unsqueeze(1) == classes) & keep  # (N, C, H, W)
    inter = (p * y).sum((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    total = ((p.square() if squared else p) + y).sum((0, 2, 3), keepdim=True)
    den = total + smooth
    if smooth == 0:
        den = den + (den == 0)  # a class that is nowhere: 0 / 0 becomes 0 / 1
    distance = total.sub(inter, alpha=2) / den  # 1 - R_c
    return distance[:, 0 if include_background else 1 :].mean(), ce


def _use_triton(x):
    if x.numel() == 0 or not 2 <= x.shape[1] <= 16 or x.dtype == torch.float64:
        return False
    if x.is_cuda:
        return triton is not None or _warn_no_triton()
    # TRITON_INTERPRET counts at decoration, so the kernel's type tells and the environment of today does not.
    return x.device.type == "cpu" and triton is not None and not isinstance(_sums_kernel, triton.JITFunction)


@functools.cache
def _warn_no_triton():
    warnings.warn("Triton is not installed: the losses run in plain torch", stacklevel=3)
    return False

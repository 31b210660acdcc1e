"""What `weighted_linear_cross_entropy` does on CUDA between and around its matrix products, where Triton is installed.

This module can be imported without Triton; `is_available` then says no. Nothing in it waits for the device.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
if TYPE_CHECKING:
    constexpr = int
    tensor = Any
else:
    try:
        triton, tl = import_module("triton"), import_module("triton.language")
        # Triton reads the annotations of its kernels, and lets none in but its own
        constexpr, tensor = tl.constexpr, tl.tensor
    except ImportError:
        pass

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 16 columns a thread: two loads of 16 bytes in bfloat16. Compiled for an H100 this takes 32 registers, so that two
# programs share a processor and 64 KiB are on their way to it; with all options on 64 registers, and one program.
BLOCK, WARPS = 16384, 32
SMALLEST_CHUNK, USUAL_CHUNK, LARGEST_CHUNK, ROUNDING = 128, 2048, 4096, 128
SHARE_OF_FREE_MEMORY = 4
# Where it does not, as in torch 2.6, the operands are converted, which takes time and memory of its own.
ADDS_16_BITS_TO_32 = "dtype_out" in torch.ops.aten.addmm.overloads()


@cache
def is_available(device: torch.device) -> bool:
    """Whether there is a kernel for this device: NVIDIA's, compute capability 8.0 or above, with Triton.

    CPU tensors, which the kernel takes in Triton's interpreter (TRITON_INTERPRET=1), get False.
    """
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return triton is not None and is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def losses_and_gradient_(
    z: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    with_gradient: bool = True,
) -> Tensor:
    """ℓ_n = (1 − ε) (−log p_n[y_n]) + ε mean_v(−log p_n[v]), p_n = softmax(l_n), l_n = c tanh(s (z_n + b) / c).

    Every row of z becomes w_n ∂ℓ_n/∂z_n, in place: one kernel, which reads z twice and writes it once, in float32
    inside. The losses themselves are not weighted. Maximum and sum of exponentials are found in one sweep (Milakov and
    Gimelshein, Online normalizer calculation for softmax, 2018); the second goes backwards, to begin in the cache.

    Args:
        z: [n, V] in float32, bfloat16 or float16; its rows may lie further apart than V.
        targets: y, int64 [n], each in [0, V).
        weights: w, [n], of any sign.
        bias, logit_scale, softcap, label_smoothing: b, s, c and ε, see `weighted_linear_cross_entropy`.
        with_gradient: False leaves z as it is.

    Returns:
        ℓ, float32 [n]; a `ValueError` tells a tensor of the wrong shape, layout or dtype.
    """
    _check(z, targets, weights, bias)
    losses = z.new_empty(len(z), dtype=torch.float32)
    if not len(z):
        return losses
    vocabulary = z.shape[1]
    with torch.cuda.device_of(z):
        _row_kernel[(len(z),)](
            *(z, targets, weights, bias, losses),
            *(z.stride(0), vocabulary),
            *(float(logit_scale), float(softcap or 1), float(label_smoothing), label_smoothing / vocabulary),
            BIASED=bias is not None,
            CAPPED=softcap is not None,
            SMOOTHED=label_smoothing != 0,
            WITH_GRADIENT=with_gradient,
            BLOCK=min(BLOCK, max(8, 1 << (vocabulary - 1).bit_length())),
            num_warps=WARPS,
            # l − max l has to be 0 for the largest logit: no fusing of that difference with the scale's product
            enable_fp_fusion=False,
        )
    return losses


def add_product_(accumulator: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0) -> None:
    """accumulator ← beta · accumulator + a b; a 16-bit product is not rounded before it is added to float32.

    With `out` the very same tensor as the first argument, PyTorch lets cuBLAS read and write the accumulator, without
    a copy of its size (`addmm_out_cuda_impl` in ATen/native/cuda/Blas.cpp).

    The accumulator [V, H] is in float32 or the dtype of a [V, n] and b [n, H]; in any other, a b takes memory of its
    own. a may be the transpose of a matrix with contiguous rows. With beta = 0 the accumulator is not read.
    """
    if a.dtype == accumulator.dtype:
        torch.addmm(accumulator, a, b, beta=beta, out=accumulator)
    elif accumulator.dtype == torch.float32 and not ADDS_16_BITS_TO_32:
        torch.addmm(accumulator, a.float(), b.float(), beta=beta, out=accumulator)
    elif accumulator.dtype == torch.float32:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, beta=beta, out=accumulator)
    else:
        product = a @ b
        accumulator.copy_(product.add_(accumulator, alpha=beta) if beta else product)


def row_chunk_size(vocabulary: int, itemsize: int, device: torch.device, *, width: int | None = None) -> int:
    """Positions n whose logits are held at a time, a multiple of 128: H within [2048, 4096], less in short memory.

    Fewer than 2048 take time. Each chunk adds a product a [V, n] b [n, H] to a float32 [V, H]: 2 n V H operations,
    8 V H bytes read and written. An H100 does some 790 Tflop/s and 3.35 TB/s, so that the bytes take 943 / n times as
    long as the operations: at n = 2048 under a half of one of three products, at n = 4096 under a quarter.

    More than H take memory. A float32 gradient of the head and its copy in 16 bits, once the logits are gone, take
    6 V H bytes, as in Liger with `accum_dtype=torch.float32`; logits of n ≤ H positions do not add to that peak.

    They get at most a quarter of what is free on the device or in PyTorch's cache, since what is allocated later is
    not known here. Only then do the size, and so the rounding of the sums, depend on what else is in memory.
    A logit takes `itemsize` bytes, and H is `width`.
    """
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    affordable = free // SHARE_OF_FREE_MEMORY // (vocabulary * itemsize)
    wanted = min(max(width or 0, USUAL_CHUNK), LARGEST_CHUNK)
    return max(SMALLEST_CHUNK, min(wanted, affordable) // ROUNDING * ROUNDING)


def _check(z: Tensor, targets: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    if z.dim() != 2 or z.stride(1) != 1 or z.dtype not in DTYPES:
        raise ValueError(
            f"z has shape {tuple(z.shape)}, strides {z.stride()} and dtype {z.dtype}; accepted: [n, V] with "
            "contiguous rows, in float32, bfloat16 or float16."
        )
    for name, found, size in (("targets", targets, len(z)), ("weights", weights, len(z)), ("bias", bias, z.shape[1])):
        if found is not None and (found.shape != (size,) or not found.is_contiguous()):
            raise ValueError(
                f"{name} has shape {tuple(found.shape)} and strides {found.stride()}; accepted: ({size},), contiguous."
            )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets have dtype {targets.dtype}; accepted: int64.")


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _row_kernel(
    z: tensor,
    targets: tensor,
    weights: tensor,
    bias: tensor,
    losses: tensor,
    stride: tensor,
    vocabulary: tensor,
    scale: tensor,
    cap: tensor,
    smoothing: tensor,
    share: tensor,
    BIASED: constexpr,
    CAPPED: constexpr,
    SMOOTHED: constexpr,
    WITH_GRADIENT: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row. Each thread keeps maxima and sums of its own; they meet at the end of the first sweep only."""
    row = tl.program_id(0).to(tl.int64)  # n × V passes 2³¹
    z += row * stride
    target = tl.load(targets + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    whole = vocabulary // BLOCK * BLOCK  # blocks without a mask are loaded 16 bytes at a time whatever V is

    top = tl.full([BLOCK // 8], -3.0e38, tl.float32)  # not −inf, whose difference from a logit of −inf is no number
    total = tl.zeros([BLOCK // 8], tl.float32)
    plain = tl.zeros([BLOCK // 8], tl.float32)
    for start in range(0, whole, BLOCK):
        columns = start + lanes
        u = tl.load(z + columns, eviction_policy="evict_last")
        logit, _ = _logit(u, bias, columns, scale, cap, BIASED, CAPPED)
        top, total = _online(top, total, logit)
        if SMOOTHED:
            plain += tl.sum(tl.reshape(logit, [BLOCK // 8, 8]), 1)
    if whole < vocabulary:
        columns = whole + lanes
        inside = columns < vocabulary
        u = tl.load(z + columns, mask=inside, other=0.0)
        logit, _ = _logit(u, bias, tl.where(inside, columns, target), scale, cap, BIASED, CAPPED)
        top, total = _online(top, total, tl.where(inside, logit, -float("inf")))
        if SMOOTHED:
            plain += tl.sum(tl.reshape(tl.where(inside, logit, 0.0), [BLOCK // 8, 8]), 1)

    largest = tl.max(top, 0)
    denominator = tl.sum(total * tl.exp(top - largest), 0)
    chosen, _ = _logit(tl.load(z + target), bias, target, scale, cap, BIASED, CAPPED)
    above = largest - chosen  # exactly 0 where the target is the largest
    if SMOOTHED:
        above = (1.0 - smoothing) * above + smoothing * (largest - tl.sum(plain, 0) / vocabulary)
    tl.store(losses + row, above + tl.log(denominator))

    if WITH_GRADIENT:
        weight = tl.load(weights + row).to(tl.float32) * scale
        inverse = 1.0 / denominator
        tl.debug_barrier()  # every thread has read the target's logit
        if whole < vocabulary:
            columns = whole + lanes
            inside = columns < vocabulary
            u = tl.load(z + columns, mask=inside, other=0.0)
            logit, slope = _logit(u, bias, tl.where(inside, columns, target), scale, cap, BIASED, CAPPED)
            gradient = _probability_less_target(logit, largest, inverse, columns, target, smoothing, share)
            tl.store(z + columns, (weight * slope * gradient).to(z.dtype.element_ty), mask=inside)
        for done in range(0, whole, BLOCK):
            columns = whole - BLOCK - done + lanes
            u = tl.load(z + columns, eviction_policy="evict_first")
            logit, slope = _logit(u, bias, columns, scale, cap, BIASED, CAPPED)
            gradient = _probability_less_target(logit, largest, inverse, columns, target, smoothing, share)
            u = (weight * slope * gradient).to(z.dtype.element_ty)
            tl.store(z + columns, u, eviction_policy="evict_first")


@_jit
def _online(top: tensor, total: tensor, logit: tensor) -> tensor:
    """Each of the maxima and of the sums of exp(l − maximum) takes in eight more logits, those of one thread."""
    logit = tl.reshape(logit, [top.shape[0], 8])
    higher = tl.maximum(top, tl.max(logit, 1))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)


@_jit
def _probability_less_target(
    logit: tensor, largest: tensor, inverse: tensor, columns: tensor, target: tensor, smoothing: tensor, share: tensor
) -> tensor:
    """p_v − (1 − ε) [v = y] − ε / V."""
    probability = tl.exp(logit - largest) * inverse
    return tl.where(columns == target, probability - (1.0 - smoothing), probability) - share


@_jit
def _logit(
    u: tensor, bias: tensor, columns: tensor, scale: tensor, cap: tensor, BIASED: constexpr, CAPPED: constexpr
) -> tensor:
    """l = c tanh(s (u + b) / c), and 1 − tanh².

    With E = exp(−2 |x|), tanh |x| = (1 − E) / (1 + E) and 1 − tanh² x = 4 E / (1 + E)². Below 0.55, where 1 − E is
    short of digits, tanh x = x + x³ P(x²), P of degree 4, fitted at Chebyshev nodes: relative error 4e-9, some 1e-7
    in float32. The tanh of the hardware has 11 bits, and 2 sigmoid(2x) − 1 is short of digits near 0 in the same way.
    """
    u = u.to(tl.float32)
    if BIASED:
        u += tl.load(bias + columns).to(tl.float32)
    u *= scale
    if CAPPED:
        x = u / cap
        size = tl.abs(x)
        e = tl.exp(-2.0 * size)
        inverse = 1.0 / (1.0 + e)
        q = size * size
        p = (((-0.00661578 * q + 0.02131276) * q - 0.05391007) * q + 0.13333118) * q - 0.33333332
        tanh = tl.where(size < 0.55, size + size * q * p, (1.0 - e) * inverse)
        return cap * tl.where(x < 0.0, -tanh, tanh), 4.0 * e * inverse * inverse
    else:  # noqa: RET505 - Triton follows one branch only where it sees both
        return u, 1.0

"""The LM head and its weighted loss without the N×V logits: gradients are made in the forward pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .losses import check_vocabulary
from .timeline import IGNORE_INDEX, SIGNED_INTEGERS
from .weighting import check_weights

VOCABULARY_BLOCK = 8192


@torch.compiler.disable
def weighted_linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Σ_n w_n ((1 − ε) (−log p_n[y_n]) + ε mean_v(−log p_n[v])) over the n with y_n ≠ −100, where p_n = softmax(z_n),
    z_n = c tanh(s (W h_n + b) / c), without the N×V matrix of the z.

    The weights are known before the forward pass, so the gradients are made in it, one chunk of positions at a time:
    three matrix products, nothing computed twice. Positions without a target, or of weight 0, never meet the head.
    Sums, and the gradients of `head_weight` and `bias`, are accumulated in float32 (in float64 for float64 arguments);
    products run in the arguments' dtype, or in autocast's where it is on. Under `torch.no_grad` there is only the sum.

    Args:
        hidden: h, [N, H].
        head_weight: W, [V, H]; a DTensor is gathered.
        targets: y, integers [N]; −100 marks a position without a target.
        weights: w, [N].
        bias: b, [V]; it is added before the scale, as a linear layer's own bias is.
        logit_scale: s.
        softcap: c > 0; None leaves out the tanh.
        label_smoothing: ε in [0, 1).
        chunk_size: positions whose logits are held at a time; None chooses it from V and the device.

    Returns:
        The weighted sum (not divided by anything), 0-dim, float32; it can be differentiated once.

    Raises:
        ValueError: an argument of the wrong shape or type or out of its range; a label outside the
            vocabulary, or a weight of a target that is negative or not finite (looked for on the CPU only, elsewhere
            it would wait for the device).
        RuntimeError: a second backward pass through the same result, or one with `create_graph=True`.
    """
    return weighted_linear_cross_entropy_terms(
        [(hidden, head_weight)],
        targets,
        weights,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
    )


@torch.compiler.disable
def weighted_linear_cross_entropy_terms(
    terms: Sequence[tuple[Tensor, Tensor]],
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`weighted_linear_cross_entropy` of z_n = c tanh(s (Σ_i W_i x_i,n + b) / c).

    A low-rank adapter on the head is a second term, x_1 = A h and W_1 = B times the adapter's scale: with W_0 frozen,
    no V×H gradient is made.

    Args:
        terms: the pairs (x_i [N, H_i], W_i [V, H_i]); the first names `hidden` and `head_weight` in the errors.
        targets: see `weighted_linear_cross_entropy`, as for all that follow.
        weights: [N].
        bias: [V].
        logit_scale: s.
        softcap: c.
        label_smoothing: ε.
        chunk_size: positions at a time.

    Returns:
        The weighted sum, 0-dim.

    Raises:
        ValueError: as `weighted_linear_cross_entropy`.
        RuntimeError: as `weighted_linear_cross_entropy`.
    """
    _check_options(softcap, label_smoothing, chunk_size)
    bias = None if bias is None else _gathered(bias)
    flat = [tensor for x, weight in terms for tensor in (x, _gathered(weight))]
    _check_tensors(flat, targets, weights, bias)
    if not torch.is_grad_enabled():
        flat, weights = [tensor.detach() for tensor in flat], weights.detach()
        bias = None if bias is None else bias.detach()
    device, vocabulary = flat[0].device.type, flat[1].shape[0]
    if chunk_size is None:
        chunk_size = default_chunk_size(vocabulary, device)
    options = _Options(logit_scale, softcap, label_smoothing, chunk_size, _product_dtypes(flat, device))
    return _WeightedLinearCrossEntropy.apply(options, targets, weights, bias, *flat)


def default_chunk_size(vocabulary: int, device_type: str) -> int:
    """256 positions; off the CPU more, where the vocabulary is small: what fills 512 MiB with float32 logits."""
    return 256 if device_type == "cpu" else max(256, 2**27 // vocabulary)


@dataclass(frozen=True)
class _Options:
    logit_scale: float
    softcap: float | None
    label_smoothing: float
    chunk_size: int
    product_dtypes: list[torch.dtype]


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    """apply(options, targets, weights, bias, x_0, W_0, x_1, W_1, ...)."""

    @staticmethod
    def forward(
        ctx: Any, options: _Options, targets: Tensor, weights: Tensor, bias: Tensor | None, *flat: Tensor
    ) -> Tensor:
        _, _, needs_weights, needs_bias, *needs = ctx.needs_input_grad
        exact = reduce(torch.promote_types, (tensor.dtype for tensor in flat), torch.float32)
        grads = [torch.zeros_like(t, dtype=exact) if need else None for t, need in zip(flat, needs, strict=True)]
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs_bias else None

        chosen = targets != IGNORE_INDEX
        if not needs_weights:
            chosen &= weights != 0
        positions = chosen.nonzero().squeeze(1)
        y = targets.index_select(0, positions).long().unsqueeze(1)
        w = weights.index_select(0, positions).to(exact)
        peak = _largest(w)
        losses = torch.empty_like(w)

        matrices = [weight.to(dtype) for weight, dtype in zip(flat[1::2], options.product_dtypes, strict=True)]
        size = (min(options.chunk_size, len(positions)), len(matrices[0]))
        buffers = {dtype: matrices[0].new_empty(size, dtype=dtype) for dtype in {exact, *options.product_dtypes}}
        for start in range(0, len(positions), options.chunk_size):
            rows = slice(start, start + options.chunk_size)
            index = positions[rows]
            xs = [x.index_select(0, index).to(matrix.dtype) for x, matrix in zip(flat[0::2], matrices, strict=True)]
            chunk = {dtype: buffer[: len(index)] for dtype, buffer in buffers.items()}
            slope = _logits_(chunk, exact, xs, matrices, bias, options)
            losses[rows], total = _losses_(chunk[exact], y[rows], options.label_smoothing)
            if not (any(needs) or needs_bias):
                continue
            _gradient_(chunk[exact], total, y[rows], options.label_smoothing)
            chunk[exact].mul_((w[rows] * (options.logit_scale / peak)).unsqueeze(1) / total)
            if slope is not None:
                chunk[exact].mul_(slope)
            if grad_bias is not None:
                grad_bias += chunk[exact].sum(0)
            for dtype in chunk.keys() - {exact}:
                chunk[dtype].copy_(chunk[exact])
            for x, matrix, grad_x, grad_matrix in zip(xs, matrices, grads[0::2], grads[1::2], strict=True):
                if grad_x is not None:
                    grad_x.index_copy_(0, index, torch.mm(chunk[matrix.dtype], matrix).to(exact))
                if grad_matrix is not None:
                    _add_product_(grad_matrix, chunk[matrix.dtype].t(), x)

        grad_weights = w.new_zeros(len(weights)).index_copy_(0, positions, losses / peak) if needs_weights else None
        ctx.dtypes = [None if t is None else t.dtype for t in (weights, bias, *flat)]
        ctx.gradients = [grad_weights, grad_bias, *grads]
        ctx.peak = peak
        return (losses * w).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "weighted_linear_cross_entropy: its gradients are made in the forward pass and cannot be "
                "differentiated again, create_graph=True received; compute the loss from the logits instead."
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "weighted_linear_cross_entropy: second backward pass through the same result. Its gradients are made "
                "in the forward pass and handed out once; call it again instead of using retain_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_output * ctx.peak
        scaled = [
            None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled


def _largest(w: Tensor) -> Tensor:
    """The largest |w|, or 1: divided by it, the weights keep float16 gradients from overflowing."""
    peak = w.abs().amax() if len(w) else w.new_zeros(())
    return torch.where(peak > 0, peak, 1)


def _logits_(
    chunk: dict[torch.dtype, Tensor],
    exact: torch.dtype,
    xs: Sequence[Tensor],
    matrices: Sequence[Tensor],
    bias: Tensor | None,
    options: _Options,
) -> Tensor | None:
    """Write the logits of a chunk into `chunk[exact]`; returns their slope 1 − tanh² where they are capped."""
    z = chunk[exact]
    for i, (x, matrix) in enumerate(zip(xs, matrices, strict=True)):
        if x.dtype == exact:
            z.addmm_(x, matrix.t(), beta=float(i > 0))
        else:
            product = torch.mm(x, matrix.t(), out=chunk[x.dtype])
            z.copy_(product) if i == 0 else z.add_(product)
    if bias is not None:
        z.add_(bias)
    if options.logit_scale != 1:
        z.mul_(options.logit_scale)
    if options.softcap is None:
        return None
    z.div_(options.softcap).tanh_()
    slope = 1 - z.square()
    z.mul_(options.softcap)
    return slope


def _losses_(z: Tensor, y: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Turn logits z into exp(z − max z) in place; returns the losses [n] and Σ_v exp(z_v − max z) [n, 1]."""
    expected = z.gather(1, y)
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing * z.mean(1, keepdim=True)
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    return (top + total.log() - expected).squeeze(1), total


def _gradient_(z: Tensor, total: Tensor, y: Tensor, label_smoothing: float) -> None:
    """Turn exp(z − max z) into `total` times the gradient of the losses with respect to the logits, in place."""
    if label_smoothing:
        z.sub_(total * (label_smoothing / z.shape[1]))
    z.scatter_(1, y, z.gather(1, y) - (1 - label_smoothing) * total)


def _add_product_(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to the accumulator; a 16-bit product is added block by block, so that it never stands there whole."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
        return
    for block, part in zip(accumulator.split(VOCABULARY_BLOCK), a.split(VOCABULARY_BLOCK), strict=True):
        block += torch.mm(part, b)


def _gathered(parameter: Tensor) -> Tensor:
    """The whole parameter; its gradient goes back as the mean over the ranks, as FSDP2 averages its own."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _product_dtypes(flat: Sequence[Tensor], device_type: str) -> list[torch.dtype]:
    """The dtype in which `F.linear(x_i, W_i)` would run, for each term."""
    dtypes = [torch.promote_types(x.dtype, weight.dtype) for x, weight in zip(flat[0::2], flat[1::2], strict=True)]
    if not torch.is_autocast_enabled(device_type):
        return dtypes
    return [dtype if dtype == torch.float64 else torch.get_autocast_dtype(device_type) for dtype in dtypes]


def _check_options(softcap: float | None, label_smoothing: float, chunk_size: int | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap!r} is out of range; accepted: softcap > 0, or None for no cap.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} is out of range; accepted: 0 ≤ label_smoothing < 1.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r} is out of range; accepted: an integer ≥ 1, or None.")


def _check_tensors(flat: Sequence[Tensor], targets: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    hidden, head_weight = flat[:2]
    for x, weight in zip(flat[0::2], flat[1::2], strict=True):
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not len(weight):
            raise ValueError(
                f"hidden has shape {tuple(x.shape)} and head_weight {tuple(weight.shape)}; accepted: [N, H] "
                "and [V, H], V > 0."
            )
        if len(x) != len(hidden) or len(weight) != len(head_weight):
            raise ValueError(
                f"terms hold x of shape {tuple(x.shape)} and W of shape {tuple(weight.shape)}; accepted: "
                f"[{len(hidden)}, H_i] and [{len(head_weight)}, H_i], as in the first term."
            )
    if targets.shape != hidden.shape[:1] or targets.dtype not in SIGNED_INTEGERS:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; accepted: integers with a sign, of "
            f"shape ({len(hidden)},), one per row of hidden."
        )
    if weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; accepted: ({len(hidden)},), one per row of hidden."
        )
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; accepted: ({len(head_weight)},), one per row of head_weight."
        )
    check_vocabulary(targets, len(head_weight))
    if weights.device.type == "cpu":
        check_weights("weights", weights[targets.to(weights.device) != IGNORE_INDEX])

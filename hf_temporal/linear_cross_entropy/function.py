"""The LM head and its weighted loss without the N×V logits: gradients are made in the forward pass, chunk by chunk."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from hf_temporal.losses import check_label_smoothing, check_vocabulary
from hf_temporal.positions import IGNORE_INDEX, SIGNED_INTEGERS
from hf_temporal.weighting import check_weights

from .block_head import BlockHead
from .head import Head, Term, TokenStatistics, product_dtype

ROUNDING = 64


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
    three matrix products. Positions without a target are left out, and so are those of weight 0 unless `weights` needs
    a gradient. Sums, and the gradients of `head_weight` and `bias`, are accumulated in float32 (in float64 for float64
    arguments; those of two chunks of a 16-bit `head_weight` are added in its own dtype); products run in the
    arguments' dtype, or in autocast's where it is on. Under `torch.no_grad` there is only the sum.

    Args:
        hidden: h, [N, H].
        head_weight: W, [V, H]; a DTensor is gathered.
        targets: y, integers [N]; −100 marks a position without a target.
        weights: w, [N].
        bias: b, [V]; it is added before the scale, as a linear layer's own bias is.
        logit_scale: s.
        softcap: c > 0, finite; None leaves out the tanh.
        label_smoothing: ε in [0, 1).
        chunk_size: positions whose logits are held at a time; None chooses it from the shapes, dtypes, device and
            which gradients are wanted.

    Returns:
        The weighted sum (not divided by anything), 0-dim, float32 (float64 for float64 arguments); it can be
        differentiated once.

    Raises:
        ValueError: an argument of the wrong shape or type or out of its range; on the CPU alone, to avoid a device
            sync elsewhere, also a label outside the vocabulary, or a target's weight that is negative or not finite.
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
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """`weighted_linear_cross_entropy`, with its result and errors, of z_n = c tanh(s (Σ_i W_i x_i,n + b) / c).

    A low-rank adapter on the head is a second term, x_1 = A h and W_1 = B times the adapter's scale: with W_0 frozen,
    no V×H gradient is made.

    Args:
        terms: the pairs (x_i [N, H_i], W_i [V, H_i]); the first names `hidden` and `head_weight` in the errors.
        positions: n of all that have a target, any order, [M]; where `weights` needs no gradient, others of weight 0
            may be among them. With None they are searched for, which synchronises with the device.
        statistics: is filled at these positions.
    """
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap!r} is out of range; accepted: 0 < softcap < ∞, or None for no cap.")
    check_label_smoothing(label_smoothing)
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size={chunk_size!r} is out of range; accepted: an integer ≥ 1, or None.")
    bias = None if bias is None else _gathered(bias)
    flat = [tensor for x, weight in terms for tensor in (x, _gathered(weight))]
    _check_tensors(flat, targets, weights, bias)
    if not torch.is_grad_enabled():
        flat, weights = [tensor.detach() for tensor in flat], weights.detach()
        bias = None if bias is None else bias.detach()
    options = {"logit_scale": logit_scale, "softcap": softcap, "label_smoothing": label_smoothing}
    make_head = partial(_head, dtypes=_product_dtypes(flat, flat[0].device.type), options=options)
    with torch.autocast(flat[0].device.type, enabled=False):  # the dtypes of the products are settled
        return _WeightedLinearCrossEntropy.apply(
            make_head, chunk_size, statistics, targets, weights, positions, bias, *flat
        )


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    """apply(make_head, chunk_size, statistics, targets, weights, positions, bias, x_0, W_0, x_1, W_1, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        make_head: Callable[..., Head],
        chunk_size: int | None,
        statistics: TokenStatistics | None,
        targets: Tensor,
        weights: Tensor,
        positions: Tensor | None,
        bias: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:
        needs_weights, _, needs_bias, *needs = ctx.needs_input_grad[4:]
        xs = flat[0::2]
        head = make_head(flat, bias, needs, needs_bias)
        head.measures = statistics is not None
        if positions is None:
            chosen = targets != IGNORE_INDEX
            if not needs_weights:
                chosen &= weights != 0
            positions = chosen.nonzero().squeeze(1)
        y = targets.index_select(0, positions).long().clamp_(min=0)
        w = weights.index_select(0, positions).to(head.exact)
        losses = torch.empty_like(w)
        peak = None
        if len(w) and torch.float16 in {*(term.dtype for term in head.terms), *(tensor.dtype for tensor in flat)}:
            peak = w.abs().amax()  # divided by it, weights do not take the gradients out of float16's range
            peak = torch.where(peak > 0, peak, 1)
        shares = w if peak is None else w / peak

        largest = chunk_size or head.chunk_size(len(positions))
        count = -(-len(positions) // largest)
        size = min(largest, -(-len(positions) // (ROUNDING * max(count, 1))) * ROUNDING)
        head.make_gradients(count)
        grads_x = [torch.zeros_like(x) if need else None for x, need in zip(xs, needs[0::2], strict=True)]
        head.reserve(min(size, len(positions)))
        for i in range(count):
            chunk = slice(i * size, (i + 1) * size)
            index = positions[chunk]
            inputs = [x.index_select(0, index).to(term.dtype) for x, term in zip(xs, head.terms, strict=True)]
            losses[chunk], gradients = head.losses(
                inputs, y[chunk], shares[chunk], is_first=i == 0, is_last=i == count - 1
            )
            if statistics is not None and head.measured is not None:
                statistics.entropy[index] = head.measured.entropy
                statistics.is_top1[index] = head.measured.is_top1
            for grad_x, gradient in zip(grads_x, gradients, strict=True):
                if grad_x is not None and gradient is not None:
                    grad_x.index_copy_(0, index, gradient.to(grad_x.dtype))

        grad_weights = w.new_zeros(len(weights)).index_copy_(0, positions, losses) if needs_weights else None
        if grad_weights is not None and peak is not None:
            grad_weights /= peak
        ctx.dtypes = [None if t is None else t.dtype for t in (weights, None, bias, *flat)]
        interleaved = [g for term, grad_x in zip(head.terms, grads_x, strict=True) for g in (grad_x, term.grad_matrix)]
        ctx.gradients = [grad_weights, None, head.grad_bias, *interleaved]
        ctx.peak = peak
        return (losses * w).where(w != 0, 0).sum()

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
        factor = grad_output if ctx.peak is None else grad_output * ctx.peak
        if factor.device.type == "cpu" and factor == 1:
            factor = None
        elif factor.device.type != "cpu":
            factor = factor.view(1)  # CUDA would round a 0-dim factor to the gradient's dtype
        for gradient in gradients:
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, None, *typed


def _head(
    flat: Sequence[Tensor],
    bias: Tensor | None,
    needs: Sequence[bool],
    needs_bias: bool,
    *,
    dtypes: Sequence[torch.dtype],
    options: dict[str, Any],
) -> Head:
    from . import kernel_trial, triton_kernel  # only here: they import Triton
    from .row_head import RowHead

    exact = reduce(torch.promote_types, (tensor.dtype for tensor in flat), torch.float32)
    stored = exact if len(set(dtypes)) > 1 else dtypes[0]
    settings = {"exact": exact, "stored": stored, **options}
    terms = []
    for matrix, dtype, needs_x, needs_matrix in zip(flat[1::2], dtypes, needs[0::2], needs[1::2], strict=True):
        # a matrix that is wider than its products is converted once, a narrower one where it is used
        converted = matrix.to(dtype) if dtype.itemsize < matrix.dtype.itemsize else matrix
        terms.append(Term(converted, dtype, needs_x, matrix.dtype if needs_matrix else None))
    has_kernel = stored in triton_kernel.DTYPES and triton_kernel.is_available(flat[0].device)
    backend = RowHead if has_kernel and kernel_trial.is_trusted(terms, bias, **settings) else BlockHead
    grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs_bias else None
    return backend(terms, bias=bias, grad_bias=grad_bias, **settings)


def _gathered(parameter: Tensor) -> Tensor:
    """The whole parameter; its gradient goes back as the mean over the ranks, as FSDP2 averages its own."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _product_dtypes(flat: Sequence[Tensor], device_type: str) -> list[torch.dtype]:
    """The dtype in which `F.linear(x_i, W_i)` would run, for each term; float32 where that would be emulated."""
    dtypes = [torch.promote_types(x.dtype, weight.dtype) for x, weight in zip(flat[0::2], flat[1::2], strict=True)]
    if torch.is_autocast_enabled(device_type):
        cast = torch.get_autocast_dtype(device_type)
        dtypes = [dtype if dtype == torch.float64 else cast for dtype in dtypes]
    return [product_dtype(dtype, device_type) for dtype in dtypes]


def _check_tensors(flat: Sequence[Tensor], targets: Tensor, weights: Tensor, bias: Tensor | None) -> None:
    hidden, (N, V) = flat[0], map(len, flat[:2])
    for x, weight in zip(flat[0::2], flat[1::2], strict=True):
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not len(weight):
            raise ValueError(
                f"hidden has shape {tuple(x.shape)} and head_weight {tuple(weight.shape)}; accepted: [N, H] "
                "and [V, H], V > 0."
            )
        if len(x) != N or len(weight) != V:
            raise ValueError(
                f"terms hold x of shape {tuple(x.shape)} and W of shape {tuple(weight.shape)}; accepted: "
                f"[{N}, H_i] and [{V}, H_i], as in the first term."
            )
    if targets.shape != hidden.shape[:1] or targets.dtype not in SIGNED_INTEGERS:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; accepted: integers with a sign, of "
            f"shape ({N},), one per row of hidden."
        )
    if weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; accepted: ({N},), one per row of hidden.")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted: ({V},), one per row of head_weight.")
    check_vocabulary(targets, V)
    if weights.device.type == "cpu":
        check_weights("weights", weights[targets.to(weights.device) != IGNORE_INDEX])

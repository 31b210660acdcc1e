"""A chunk of positions through the LM head, with a kernel that goes row by row: losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_pass
from .head_chunk import Head


def losses_by_rows(
    head: Head, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, *, is_first: bool, is_last: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses [n] of a chunk, unweighted, and ∂ Σ w ℓ / ∂x of each of its x, [n, H].

    Logits stand as [n, V], rows apart by a multiple of 16, and one kernel makes losses and gradients of them.
    """
    z = buffer.view(-1, head.row_length)[: len(y), : head.vocabulary]
    for i, (term, x) in enumerate(zip(head.terms, xs, strict=True)):
        matrix = term.matrix.to(term.dtype).t()
        if z.dtype == term.dtype:
            torch.addmm(z, x, matrix, beta=float(i > 0), out=z)
        else:
            z.copy_(x @ matrix) if i == 0 else z.add_(x @ matrix)
    losses = triton_pass.losses_and_gradient_(
        z,
        y,
        w,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        label_smoothing=head.label_smoothing,
        with_gradient=head.needs_gradient,
    )
    grads_x: list[Tensor | None] = [None] * len(xs)
    if head.grad_bias is not None:
        head.grad_bias.add_(z.sum(0, dtype=head.exact))
    for i, (term, x) in enumerate(zip(head.terms, xs, strict=True)):
        gradient = z.to(term.dtype)
        if term.needs_grad_x:
            grads_x[i] = gradient @ term.matrix.to(term.dtype)
        if term.grad_matrix is not None:
            sums = term.grad_matrix if term.sums is None else term.sums
            triton_pass.add_product_(sums, gradient.t(), x, beta=float(not is_first))
            if is_last and term.sums is not None:
                term.grad_matrix.copy_(term.sums)
    return losses, grads_x

"""The LM head and its loss with the Triton kernel, one row of the logits after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import triton_kernel
from .head import Head, statistics_of


@dataclass(eq=False, repr=False)
class RowHead(Head):
    """The head on NVIDIA GPUs: logits of a chunk are held as [n, V], and `triton_kernel` makes gradients of them."""

    logits: Tensor = field(init=False)  # the memory of the largest chunk's

    def chunk_size(self, positions: int) -> int:  # noqa: ARG002
        matrix = self.terms[0].matrix
        return triton_kernel.row_chunk_size(len(matrix), self.stored.itemsize, matrix.device, width=matrix.shape[1])

    def reserve(self, positions: int) -> None:
        row = -(-self.vocabulary // 16) * 16  # for loads of 16 bytes
        self.logits = self.terms[0].matrix.new_empty(positions, row, dtype=self.stored)

    def _scaled(self, z: Tensor) -> Tensor:
        logits = z.float() if self.bias is None else z + self.bias.float()
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def losses(
        self, xs: Sequence[Tensor], y: Tensor, w: Tensor, *, is_first: bool, is_last: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        z = self.logits[: len(y), : self.vocabulary]
        for i, (term, x) in enumerate(zip(self.terms, xs, strict=True)):
            matrix = term.matrix.to(term.dtype).t()
            if z.dtype == term.dtype:
                torch.addmm(z, x, matrix, beta=float(i > 0), out=z)
            else:
                z.copy_(x @ matrix) if i == 0 else z.add_(x @ matrix)
        if self.measures:
            self.measured = statistics_of(self._scaled(z), y)
        losses = triton_kernel.losses_and_gradient_(
            z,
            y,
            w,
            bias=self.bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            with_gradient=self.needs_gradient,
        )
        grads_x: list[Tensor | None] = [None] * len(xs)
        if self.grad_bias is not None:
            self.grad_bias.add_(z.sum(0, dtype=self.exact))
        for i, (term, x) in enumerate(zip(self.terms, xs, strict=True)):
            gradient = z.to(term.dtype)
            if term.needs_grad_x:
                grads_x[i] = gradient @ term.matrix.to(term.dtype)
            if term.grad_matrix is not None:
                sums = term.grad_matrix if term.sums is None else term.sums
                triton_kernel.add_product_(sums, gradient.t(), x, beta=float(not is_first))
                if is_last and term.sums is not None:
                    term.grad_matrix.copy_(term.sums)
        return losses, grads_x

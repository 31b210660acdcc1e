"""Inputs of the LM head's loss, with the loss in plain PyTorch and what its rounding errors are measured by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@dataclass(frozen=True)
class Problem:
    """Terms x_0, W_0, x_1, W_1, ...; targets, weights, bias; and the options of the loss."""

    tensors: list[Tensor]
    targets: Tensor
    weights: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return self.tensors if self.bias is None else [*self.tensors, self.bias]

    def loss(self, **options: Any) -> Tensor:
        terms = list(zip(self.tensors[0::2], self.tensors[1::2], strict=True))
        return weighted_linear_cross_entropy_terms(
            terms, self.targets, self.weights, bias=self.bias, **self.options, **options
        )

    def logits(self) -> Tensor:
        z = sum(x @ weight.T for x, weight in zip(self.tensors[0::2], self.tensors[1::2], strict=True))
        z = self.options["logit_scale"] * (z if self.bias is None else z + self.bias)
        cap = self.options["softcap"]
        return z if cap is None else cap * torch.tanh(z / cap)

    def reference(self) -> Tensor:
        losses = F.cross_entropy(
            self.logits(), self.targets, reduction="none", label_smoothing=self.options["label_smoothing"]
        )
        return (self.weights * losses).sum()

    def magnitudes(self) -> list[float]:
        """What rounding errors of the loss and of each leaf's gradient are proportional to.

        |∂ℓ/∂z| ≤ 2, so a gradient is at most 2 s Σw |x|, 2 s w |W| or 2 s Σw, however small it comes out; the errors
        of the logits themselves grow with their size.
        """
        if not len(self.targets):
            return [1.0] * (1 + len(self.leaves))
        w = self.weights * (self.targets != -100)
        size = float(self.logits().abs().max().clamp(min=1))
        slope = size * self.options["logit_scale"]
        found = [size * float(w.sum())]
        for x, weight in zip(self.tensors[0::2], self.tensors[1::2], strict=True):
            found += [slope * float(w.max() * weight.abs().max()), slope * float(w.sum() * x.abs().max())]
        if self.bias is not None:
            found.append(slope * float(w.sum()))
        return [magnitude or 1.0 for magnitude in found]

    def exact(self) -> Problem:
        """The same numbers in float64, as new leaves."""
        double = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        bias = None if self.bias is None else double.pop()
        return replace(self, tensors=double, bias=bias, weights=self.weights.double())


def make_problem(
    N: int = 13,
    V: int = 31,
    widths: tuple[int, ...] = (8,),
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    masked: float = 0.3,
    seed: int = 0,
    size: float = 1.0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [matrix for H in widths for matrix in (size * normal(N, H), normal(V, H) / H**0.5)]
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < masked] = -100
    weights = torch.rand(N, generator=generator) * 3 + 0.1
    weights[torch.rand(N, generator=generator) < 0.2] = 0
    return Problem(
        tensors=[tensor.to(dtype).requires_grad_() for tensor in tensors],
        targets=targets,
        weights=weights,
        bias=normal(V).to(dtype).requires_grad_() if bias else None,
        options={"logit_scale": 1.0, "softcap": None, "label_smoothing": 0.0, **options},
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


def largest_error(problem: Problem, reference: Problem) -> float:
    """The largest error of the loss and of the gradients, as a share of their magnitudes."""
    loss, expected = problem.loss(), reference.reference()
    gradients = zip(
        torch.autograd.grad(loss, problem.leaves), torch.autograd.grad(expected, reference.leaves), strict=True
    )
    with torch.no_grad():
        errors = [(got.double() - right).abs().flatten() for got, right in [(loss, expected), *gradients]]
        return max(
            float(error.max()) / magnitude
            for error, magnitude in zip(errors, problem.magnitudes(), strict=True)
            if len(error)
        )

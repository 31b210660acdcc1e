"""Inputs of the Triton kernel and its loss in float64; and where the kernel can run: on a GPU, or interpreted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal.linear_cross_entropy.triton_kernel import losses_and_gradient_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="the kernel needs Triton, and a GPU or its interpreter",
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

ALL: dict[str, Any] = {"bias": True, "logit_scale": 0.7, "softcap": 3.0, "label_smoothing": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, **{name: {name: value} for name, value in ALL.items()}, "all": ALL}


@dataclass(frozen=True)
class Problem:
    """z [n, V] with the other arguments of `losses_and_gradient_`."""

    z: Tensor
    targets: Tensor
    weights: Tensor
    options: dict[str, Any]

    def reference(self) -> tuple[Tensor, Tensor]:
        """Losses, and the gradient of their weighted sum, in float64."""
        z = self.z.double().requires_grad_()
        losses = F.cross_entropy(
            logits(z, self.options),
            self.targets,
            reduction="none",
            label_smoothing=self.options.get("label_smoothing", 0.0),
        )
        (gradient,) = torch.autograd.grad((self.weights.double() * losses).sum(), z)
        return losses.detach(), gradient


def logits(z: Tensor, options: dict[str, Any]) -> Tensor:
    bias, cap = options.get("bias"), options.get("softcap")
    z = options.get("logit_scale", 1.0) * (z if bias is None else z + bias.to(z.dtype))
    return z if cap is None else cap * torch.tanh(z / cap)


def make_problem(
    V: int = 130, n: int = 5, dtype: torch.dtype = torch.float32, *, spread: float = 3.0, **options: Any
) -> Problem:
    generator = torch.Generator().manual_seed(V)
    z = (torch.randn(n, V, generator=generator) * spread).to(DEVICE, dtype)
    targets = torch.randint(V, (n,), generator=generator).to(DEVICE)
    weights = torch.tensor([0.5, -2.0, 0.0, 1e3, 1.0] * n)[:n].to(DEVICE)
    if options.pop("bias", False):
        options["bias"] = torch.randn(V, generator=generator).to(DEVICE, dtype)
    return Problem(z, targets, weights, options)


def assert_right(problem: Problem) -> None:
    losses, gradient = problem.reference()
    z = problem.z.clone()
    got = losses_and_gradient_(z, problem.targets, problem.weights, **problem.options)
    assert got.dtype == torch.float32
    assert z.dtype == problem.z.dtype
    exact = logits(problem.z.double(), problem.options)
    size = float(torch.cat([exact[exact.isfinite()], losses]).abs().max().clamp(min=1))
    assert float((got - losses).abs().max()) <= 3e-7 * size
    # Triton's interpreter cuts the digits of bfloat16 off instead of rounding them: twice the error
    rounding = torch.finfo(z.dtype).eps * gradient.abs()
    scale = problem.options.get("logit_scale", 1.0) * problem.weights.abs().unsqueeze(1)
    assert bool(((z.double() - gradient).abs() <= rounding + 3e-7 * size * scale).all())

"""Entropy and top-1 of each target token, measured while its logits are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms
from hf_temporal.linear_cross_entropy.head import TokenStatistics, statistics_of

N, H, V = 300, 24, 700


def expected(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.double().softmax(-1)
    return -(p * p.log()).sum(-1), logits.argmax(-1) == y


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bias": True, "logit_scale": 0.7},
        {"label_smoothing": 0.1, "bias": True},
        {"softcap": 5.0, "logit_scale": 1.3},
        {"is_wide": True},  # exponentials that need a bound
        {"is_wide": True, "softcap": 50.0},
        {"adapter": True},
        {"frozen": True},
        {"frozen_hidden": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "bias": True, "softcap": 5.0},
    ],
    ids=lambda case: " ".join(case) or "plain",
)
def test_against_float64(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dtype = case.get("dtype", torch.float32)
    hidden, head = torch.randn(N, H).to(dtype), (torch.randn(V, H) * (9 if case.get("is_wide") else 0.4)).to(dtype)
    bias = torch.randn(V).to(dtype) if case.get("bias") else None
    terms = [
        (hidden.requires_grad_(not case.get("frozen_hidden")), head.requires_grad_(not case.get("frozen"))),
    ]
    if case.get("adapter"):
        terms.append((torch.randn(N, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)))
    logits = sum((x.detach().double() @ w.detach().double().T for x, w in terms), torch.zeros(()))
    logits = case.get("logit_scale", 1.0) * (logits + (0.0 if bias is None else bias.double()))
    if softcap := case.get("softcap"):
        logits = softcap * torch.tanh(logits / softcap)
    y = torch.randint(0, V, (N,))
    y[::2] = logits.argmax(-1)[::2]
    weights = torch.rand(N)
    weights[:40] = 0  # measured as well
    targets = y.clone()
    targets[::7] = -100
    positions = (targets != -100).nonzero()[:, 0]
    statistics = TokenStatistics(torch.zeros(N), torch.zeros(N, dtype=torch.bool))
    options: dict[str, Any] = {key: case[key] for key in ("logit_scale", "softcap", "label_smoothing") if key in case}
    given: dict[str, Any] = {"positions": positions, "bias": bias, **options}
    loss = weighted_linear_cross_entropy_terms(terms, targets, weights, **given, statistics=statistics)
    plain = weighted_linear_cross_entropy_terms(terms, targets, weights, **given)
    assert loss == plain
    entropy, is_top1 = expected(logits, y)
    tolerance = 0.15 if dtype == torch.bfloat16 else 2e-3 if case.get("is_wide") else 2e-5
    torch.testing.assert_close(statistics.entropy[positions].double(), entropy[positions], rtol=0, atol=tolerance)
    differs = (statistics.is_top1 != is_top1)[positions].float().mean()
    assert differs <= (0.05 if dtype == torch.bfloat16 else 0)
    assert not statistics.entropy[::7].any()
    torch.testing.assert_close(statistics_of(logits, y).entropy.double(), entropy, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_change() -> None:
    torch.manual_seed(0)
    y, weights = torch.randint(0, V, (N,)), torch.rand(N)
    gradients = []
    for statistics in (None, TokenStatistics(torch.zeros(N), torch.zeros(N, dtype=torch.bool))):
        torch.manual_seed(1)
        hidden, head = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        weighted_linear_cross_entropy_terms([(hidden, head)], y, weights, statistics=statistics).backward()
        gradients.append((hidden.grad, head.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)

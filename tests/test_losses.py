from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_temporal import weighted_cross_entropy, weighted_regression_loss


def reference(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Σ wℓ in float64, one line."""
    log_p, on = logits.double().log_softmax(-1), labels != -100
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (weights.double() * ((1 - smoothing) * nll - smoothing * log_p.mean(-1)))[on].sum()


@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(2, 13),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]),
    st.integers(0, 10_000),
)
def test_values_and_gradients_against_float64(
    batch: int, length: int, vocabulary: int, smoothing: float, precision: tuple[torch.dtype, float], seed: int
) -> None:
    torch.manual_seed(seed)
    dtype, tolerance = precision
    logits = (3 * torch.randn(batch, length, vocabulary)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = torch.randint(vocabulary, (batch, length)).masked_fill(torch.rand(batch, length) < 0.3, -100)
    weights = torch.rand(batch, length) * 4
    total, weight = weighted_cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    expected = reference(exact, labels, weights, smoothing)
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(weight.double(), weights[labels != -100].double().sum(), rtol=1e-6, atol=0)
    total.backward()
    expected.backward()
    assert logits.grad is not None
    assert exact.grad is not None
    rounding = 2**-8 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=4 * tolerance)


def test_nothing_to_predict_is_zero() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    total, weight = weighted_cross_entropy(logits, torch.full((1, 2), -100), torch.ones(1, 2))
    total.backward()
    assert (total.item(), weight.item()) == (0.0, 0.0)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([[1, 7]])}, "labels hold 7; accepted: token ids from 0 to 4"),
        ({"labels": torch.tensor([[1, -1]])}, "labels hold -1"),
        ({"labels": torch.tensor([[1, 2, 3]])}, r"labels have shape \(1, 3\) and logits \(1, 2, 5\)"),
        ({"weights": torch.ones(2)}, r"weights have shape \(2,\); accepted: \(1, 2\)"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 is out of range"),
    ],
)
def test_cross_entropy_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.randn(1, 2, 5), "labels": torch.tensor([[1, 2]]), "weights": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("kind", ["squared", "absolute"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 1), (2, 5, 3)])
def test_regression_weighs_after_the_square(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    predictions = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(shape, dtype=torch.float64)
    targets[0, 1] = float("nan")
    weights = torch.rand(2, 5, dtype=torch.float64) * 3
    total, weight = weighted_regression_loss(predictions, targets, weights, kind=kind)
    on = ~targets.isnan().reshape(2, 5, -1).any(-1)
    error = (predictions - targets).reshape(2, 5, -1)
    each = (error**2 if kind == "squared" else error.abs()).mean(-1)
    torch.testing.assert_close(total, (weights * each)[on].sum())
    torch.testing.assert_close(weight, weights[on].sum())
    total.backward()
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()
    assert not predictions.grad[0, 1].any()


def test_regression_drops_a_last_dimension_of_one() -> None:
    total, _ = weighted_regression_loss(torch.ones(1, 3, 1), torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
    assert total.item() == 6.0


def test_regression_errors() -> None:
    with pytest.raises(ValueError, match="kind='huber' is not known"):
        weighted_regression_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3), kind="huber")
    with pytest.raises(ValueError, match=r"labels have shape \(1, 3\) and predictions \(1, 4\)"):
        weighted_regression_loss(torch.ones(1, 4), torch.ones(1, 3), torch.ones(1, 3))

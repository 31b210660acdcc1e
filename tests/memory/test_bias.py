"""The memory bias is the formula's, and it is what gradient descent on the weighted squared error sees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from hf_temporal import TemporalWeighting, weighted_regression_loss
from hf_temporal.memory.bias import memory_bias
from hf_temporal.memory.functionals import Functional, causal_convolution

T = 64
POWERS = [-1.0, 0.0, 1.0, 2.0, 10.0, math.inf]
EXPONENTIAL = Functional("exponential")


def weighted_error(outputs: Tensor, targets: Tensor, power: float) -> Tensor:
    """Σ_t w(t) (y_t − ŷ_t)² of the series `[batch, T, 1]`, summed over the batch."""
    weights = TemporalWeighting(power).weights(torch.arange(1, T + 1).expand(outputs.shape[:2]))
    return weighted_regression_loss(outputs, targets, weights)[0]


def linear_rnn(inputs: Tensor, recurrent: Tensor, entry: Tensor, readout: Tensor) -> Tensor:
    """ŷ_t = c·h_t, h_t = W h_{t−1} + u x_t, step by step."""
    hidden, outputs = torch.zeros_like(entry), []
    for x in inputs.unbind(-2):
        hidden = hidden @ recurrent.T + x * entry
        outputs.append(hidden @ readout)
    return torch.stack(outputs, -1)[..., None]


def linear_rnn_memory(recurrent: Tensor, entry: Tensor, readout: Tensor) -> Tensor:
    """ρ̂(s) = c·W^s u."""
    return torch.stack([readout @ torch.linalg.matrix_power(recurrent, lag) @ entry for lag in range(T)])


def signs(seed: int) -> Tensor:
    """One series of ±1, `[1, T, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (1, T, 1), generator=generator).double() * 2 - 1


def hadamard() -> Tensor:
    """T series of ±1, `[T, T, 1]`, whose products x_i x_j sum to T where i = j and else to 0."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < T:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[..., None]


# ---- the formula


@pytest.mark.parametrize(
    ("power", "first"), [(0.0, 0.0308), (1.0, 0.0233), (2.0, 0.0207), (10.0, 0.0169), (math.inf, 0.0156)]
)
def test_documented_figures(power: float, first: float) -> None:
    bias = memory_bias(TemporalWeighting(power), T)
    assert (bias.dtype, bias.shape) == (torch.float64, (T,))
    assert round(bias[0].item(), 4) == first
    assert bias.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("normalization", ["sequence", "batch", "tokens"])
@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 3.0])
def test_sum_of_the_later_weights(power: float, normalization: str) -> None:
    raw = [sum(r**power for r in range(s + 1, 8)) for s in range(7)]
    bias = memory_bias(TemporalWeighting(power, normalization=normalization), 7)
    torch.testing.assert_close(bias, torch.tensor(raw, dtype=torch.float64) / sum(raw), rtol=1e-6, atol=0)


def test_all_weight_on_the_last_time_is_flat() -> None:
    assert memory_bias(TemporalWeighting(math.inf), T).tolist() == [1 / T] * T


def test_weights_of_ones_own() -> None:
    first_half = TemporalWeighting(weight_fn=lambda t, T: (t <= T / 2).to(t))
    torch.testing.assert_close(memory_bias(first_half, 4), torch.tensor([2, 1, 0, 0], dtype=torch.float64) / 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"length=0; accepted: a whole number of at least 1"):
        memory_bias(TemporalWeighting(), 0)
    with pytest.raises(ValueError, match=r"weighting=TemporalWeighting\(.*is 0 at 1..5; accepted"):
        memory_bias(TemporalWeighting(weight_fn=lambda t, _: t * 0), 5)


# ---- what the weighted squared error sees


@pytest.mark.parametrize("power", POWERS)
def test_half_the_second_derivative_along_a_free_memory_function(power: float) -> None:
    inputs = signs(seed=1)
    targets = EXPONENTIAL(inputs)

    def error(memory: Tensor) -> Tensor:
        return weighted_error(causal_convolution(inputs, memory), targets, power)

    curvature = hessian(error, torch.zeros(T, dtype=torch.float64)).diagonal() / 2
    torch.testing.assert_close(
        curvature / curvature.sum(), memory_bias(TemporalWeighting(power), T), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("power", POWERS)
def test_half_the_second_derivative_along_the_memory_of_a_linear_rnn(power: float) -> None:
    """Along ρ(s) through the recurrence: of T units, W = Q P Qᵀ with Q orthogonal and P the cyclic shift.

    With u = Q e_0, c·W^s u = c·Q e_s: the readout Q e_s has the memory e_s, so the readout c + Q δ has ρ̂ + δ.
    """
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(T, T, dtype=torch.float64)).Q
    recurrent = basis @ torch.eye(T, dtype=torch.float64).roll(1, 0) @ basis.T
    entry, readout = basis[:, 0], torch.randn(T, dtype=torch.float64)
    inputs = signs(seed=2)
    targets = EXPONENTIAL(inputs)

    def memory(change: Tensor) -> Tensor:
        return linear_rnn_memory(recurrent, entry, readout + basis @ change)

    def error(change: Tensor) -> Tensor:
        return weighted_error(linear_rnn(inputs, recurrent, entry, readout + basis @ change), targets, power)

    at = torch.zeros(T, dtype=torch.float64)
    torch.testing.assert_close(jacobian(memory, at), torch.eye(T, dtype=torch.float64))
    curvature = hessian(error, at).diagonal() / 2
    torch.testing.assert_close(
        curvature / curvature.sum(), memory_bias(TemporalWeighting(power), T), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("power", POWERS)
def test_the_gradient_of_a_small_linear_rnn_weighs_each_lag_by_its_bias(power: float) -> None:
    """∂E/∂θ = 2 Σ_s B(s) (ρ̂(s) − ρ(s)) ∂ρ̂(s)/∂θ for W, u and c, B being b before it is divided by its sum Σ_r r·w(r).

    Exact where products of different inputs cancel; here they do over the batch.
    """
    torch.manual_seed(0)
    parameters = tuple(torch.randn(shape, dtype=torch.float64) / 2 for shape in ((3, 3), (3,), (3,)))
    inputs = hadamard()
    targets = EXPONENTIAL(inputs)
    wanted = [parameter.clone().requires_grad_() for parameter in parameters]
    (weighted_error(linear_rnn(inputs, *wanted), targets, power) / T).backward()

    weighting, times = TemporalWeighting(power), torch.arange(1, T + 1)
    charge = memory_bias(weighting, T) * (weighting.weights(times).double() * times).sum()
    mistake = linear_rnn_memory(*parameters) - EXPONENTIAL.memory(T)
    for parameter, slope in zip(wanted, jacobian(linear_rnn_memory, parameters), strict=True):
        assert parameter.grad is not None
        expected = torch.tensordot(2 * charge * mistake, slope, dims=1)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)

"""The scan of h_t = W h_{t−1} + u_t is the plain loop: values, gradients, second derivatives, float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_temporal.memory import linear_recurrence as module
from hf_temporal.memory.linear_recurrence import linear_recurrence


def by_loop(inputs: Tensor, weight: Tensor) -> Tensor:
    state, states = torch.zeros_like(inputs[:, 0]), []
    for each in inputs.unbind(1):
        state = each + state @ weight.T
        states.append(state)
    return torch.stack(states, dim=1)


def orthogonal(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


def of_radius_one(width: int) -> Tensor:
    weight = torch.randn(width, width, dtype=torch.float64)
    return weight / torch.linalg.eigvals(weight).abs().max()


@pytest.mark.parametrize("time", [1, 2, 16, 17, 32, 33, 47, 64, 130])
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients(time: int, batch: int) -> None:
    torch.manual_seed(time)
    weight = of_radius_one(5).requires_grad_()
    inputs = torch.randn(batch, time, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(inputs)
    found, expected = linear_recurrence(inputs, weight), by_loop(inputs, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found, (inputs, weight), upstream)
    theirs = torch.autograd.grad(expected, (inputs, weight), upstream, allow_unused=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[1], torch.zeros_like(weight) if time == 1 else theirs[1], rtol=1e-10, atol=1e-9)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOP_LENGTH", 1)
    torch.manual_seed(0)
    weight = of_radius_one(2).requires_grad_()
    inputs = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_recurrence, (inputs, weight))
    assert torch.autograd.gradgradcheck(linear_recurrence, (inputs, weight))


@pytest.mark.parametrize("matrix", [orthogonal, of_radius_one])
def test_float32_is_as_exact_as_the_loop_over_a_thousand_steps(matrix: object) -> None:
    torch.manual_seed(0)
    assert callable(matrix)
    weight, inputs = matrix(32), torch.randn(4, 1000, 32, dtype=torch.float64)
    upstream = torch.randn_like(inputs)
    results = []
    for function, dtype in ((linear_recurrence, torch.float32), (by_loop, torch.float32), (by_loop, torch.float64)):
        u, w = inputs.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        states = function(u, w)
        results.append([states, *torch.autograd.grad(states, (u, w), upstream.to(dtype))])
    for ours, loop, exact in zip(*results, strict=True):
        error, loop_error = ((each.double() - exact).norm() / exact.norm() for each in (ours, loop))
        assert error < max(4 * loop_error.item(), 1e-6)
        assert error < 1e-4


def test_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    weight = orthogonal(8).float()
    inputs = torch.randn(2, 200, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = linear_recurrence(inputs.bfloat16(), weight)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), by_loop(inputs.bfloat16().float(), weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("inputs", "weight"), [((2, 3), (3, 3)), ((2, 5, 3), (3, 2)), ((2, 5, 3), (4, 4))])
def test_shapes_that_do_not_fit_are_named(inputs: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"accepted: \[batch, time, D\] and \[D, D\]"):
        linear_recurrence(torch.zeros(inputs), torch.zeros(weight))

"""The recurrences are the plain loop: values, gradients, second derivatives, float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_temporal.memory import recurrences
from hf_temporal.memory.recurrences import linear_recurrence, tanh_recurrence

Activation = Callable[[Tensor], Tensor]
Recurrence = Callable[[Tensor, Tensor], Tensor]


def by_loop(inputs: Tensor, weight: Tensor, activation: Activation = lambda x: x) -> Tensor:
    state, states = torch.zeros_like(inputs[:, 0]), []
    for each in inputs.unbind(1):
        state = activation(each + state @ weight.T)
        states.append(state)
    return torch.stack(states, dim=1)


def by_tanh_loop(inputs: Tensor, weight: Tensor) -> Tensor:
    return by_loop(inputs, weight, torch.tanh)


PAIRS = pytest.mark.parametrize(
    ("function", "loop"), [(linear_recurrence, by_loop), (tanh_recurrence, by_tanh_loop)], ids=["linear", "tanh"]
)


def orthogonal(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


def of_radius_one(width: int) -> Tensor:
    weight = torch.randn(width, width, dtype=torch.float64)
    return weight / torch.linalg.eigvals(weight).abs().max()


@PAIRS
@pytest.mark.parametrize("time", [1, 2, 16, 17, 32, 33, 47, 64, 130])
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients(function: Recurrence, loop: Recurrence, time: int, batch: int) -> None:
    torch.manual_seed(time)
    weight = of_radius_one(5).requires_grad_()
    inputs = torch.randn(batch, time, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(inputs)
    found, expected = function(inputs, weight), loop(inputs, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found, (inputs, weight), upstream)
    theirs = torch.autograd.grad(expected, (inputs, weight), upstream, allow_unused=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[1], torch.zeros_like(weight) if time == 1 else theirs[1], rtol=1e-10, atol=1e-9)
    (alone,) = torch.autograd.grad(function(inputs, weight.detach()), inputs, upstream)
    assert torch.equal(alone, ours[0])


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrences, "LOOP_LENGTH", 1)
    torch.manual_seed(0)
    weight = of_radius_one(2).requires_grad_()
    inputs = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_recurrence, (inputs, weight))
    assert torch.autograd.gradgradcheck(linear_recurrence, (inputs, weight))


@PAIRS
@pytest.mark.parametrize("matrix", [orthogonal, of_radius_one])
def test_float32_is_as_exact_as_the_loop_over_a_thousand_steps(
    function: Recurrence, loop: Recurrence, matrix: Callable[[int], Tensor]
) -> None:
    torch.manual_seed(0)
    weight, inputs = matrix(32), torch.randn(4, 1000, 32, dtype=torch.float64)
    upstream = torch.randn_like(inputs)
    results = []
    for each, dtype in ((function, torch.float32), (loop, torch.float32), (loop, torch.float64)):
        u, w = inputs.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        states = each(u, w)
        results.append([states, *torch.autograd.grad(states, (u, w), upstream.to(dtype))])
    for mine, plain, exact in zip(*results, strict=True):
        error, loop_error = ((found.double() - exact).norm() / exact.norm() for found in (mine, plain))
        assert error < max(4 * loop_error.item(), 1e-6)
        assert error < 1e-4


@PAIRS
def test_half_precision_is_computed_in_float32(function: Recurrence, loop: Recurrence) -> None:
    torch.manual_seed(0)
    weight = orthogonal(8).float()
    inputs = torch.randn(2, 200, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = function(inputs.bfloat16(), weight)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), loop(inputs.bfloat16().float(), weight), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("inputs", "weight"), [((2, 3), (3, 3)), ((2, 5, 3), (3, 2)), ((2, 5, 3), (4, 4))])
def test_shapes_that_do_not_fit_are_named(inputs: tuple[int, ...], weight: tuple[int, ...]) -> None:
    for function in (linear_recurrence, tanh_recurrence):
        with pytest.raises(ValueError, match=r"accepted: \[batch, time, D\] and \[D, D\]"):
            function(torch.zeros(inputs), torch.zeros(weight))


def test_the_tanh_recurrence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    rnn = torch.nn.RNN(6, 6, batch_first=True, bias=False).double()
    inner, recurrent = rnn.get_parameter("weight_ih_l0"), rnn.get_parameter("weight_hh_l0")
    x = torch.randn(3, 40, 6, dtype=torch.float64)
    for function in (tanh_recurrence, recurrences._by_torch):
        torch.testing.assert_close(function(x @ inner.T, recurrent), rnn(x)[0])

"""The memory function of a model, and its distance to a target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_temporal.memory.configuration import LinearRnnConfig
from hf_temporal.memory.functionals import Functional
from hf_temporal.memory.modeling import LinearRnnForRegression, MemoryModelForRegression
from hf_temporal.memory.models import FAMILIES
from hf_temporal.memory.probe import constant_input_memory, gradient_memory, impulse_memory, memory_distance


def linear_model(**settings: Any) -> MemoryModelForRegression:
    torch.manual_seed(0)
    model = LinearRnnForRegression(
        LinearRnnConfig(**{"hidden_size": 5, "input_size": 2, "output_size": 3, **settings})
    )
    return model.double()


def by_hand(model: Any, length: int) -> Tensor:
    """C W^s U."""
    power, memory = torch.eye(5, dtype=torch.float64), []
    for _ in range(length):
        memory.append(model.head.weight @ power @ model.input.weight)
        power = model.backbone.blocks[0].mixer.recurrent @ power
    return torch.stack(memory).detach()


@pytest.mark.parametrize("length", [1, 2, 9, 60])
@pytest.mark.parametrize("use_bias", [False, True])
def test_the_memory_of_a_linear_rnn_is_that_of_its_matrices(length: int, use_bias: bool) -> None:
    model = linear_model(use_bias=use_bias)
    torch.testing.assert_close(impulse_memory(model, length), by_hand(model, length))
    if not use_bias:
        torch.testing.assert_close(constant_input_memory(model, length), by_hand(model, length).abs())
        torch.testing.assert_close(constant_input_memory(model, length, value=-2.0), 2 * by_hand(model, length).abs())


def test_a_linear_rnn_is_exactly_the_convolution_with_its_memory() -> None:
    model, x = linear_model(), torch.randn(4, 40, 2, dtype=torch.float64)
    memory = impulse_memory(model, 40)
    expected = torch.stack([sum(x[:, t - s] @ memory[s].T for s in range(t + 1)) for t in range(40)], 1)  # type: ignore[misc]
    torch.testing.assert_close(model(x).logits, expected)


def test_the_gradients_of_a_linear_model_are_its_memory_whatever_the_inputs() -> None:
    model, x = linear_model(), torch.randn(3, 40, 2, dtype=torch.float64)
    torch.testing.assert_close(gradient_memory(model, x), by_hand(model, 40))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["tanh_rnn", "attention", None])
def test_the_gradients_of_what_is_not_linear_are_the_mean_of_finite_differences(family: str | None) -> None:
    torch.manual_seed(0)
    x, step = torch.randn(4, 7, 1, dtype=torch.float64), 1e-5
    model: Any = Functional("polynomial", before=0.5, after=1.0)
    if family:
        model = FAMILIES[family].regression(FAMILIES[family].config(hidden_size=8)).double().eval()
    outputs_of = (lambda each: model(each).logits) if family else model
    found = gradient_memory(model, x)
    for lag in range(7):
        bump = torch.zeros_like(x)
        bump[:, 6 - lag] = step
        with torch.no_grad():
            difference = (outputs_of(x + bump) - outputs_of(x - bump))[:, -1, 0].mean() / (2 * step)
        torch.testing.assert_close(found[lag, 0, 0], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["tcn", "state_space"])
def test_other_linear_models_are_read_alike(family: str) -> None:
    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind.regression(kind.config(hidden_act="linear", normalization="none", hidden_size=6)).double()
    x = torch.randn(1, 30, 1, dtype=torch.float64)
    memory = impulse_memory(model, 30)[:, 0, 0]
    with torch.no_grad():
        outputs = (model(x).logits - model(0 * x).logits)[0, :, 0]
    expected = torch.stack([sum(memory[s] * x[0, t - s, 0] for s in range(t + 1)) for t in range(30)])  # type: ignore[misc]
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("family", ["tanh_rnn", "tcn", "state_space", "attention"])
def test_a_model_that_is_not_linear_is_refused(family: str) -> None:
    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind.regression(kind.config())
    with pytest.raises(ValueError, match=r"is not linear and time-invariant.*or constant_input_memory"):
        impulse_memory(model, 20)
    assert constant_input_memory(model, 20).shape == (20, 1, 1)
    assert constant_input_memory(model, 20).isfinite().all()


class Clock(nn.Module):
    """y_t = t·x_t: linear, but not the same at all times."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.scale = LinearRnnConfig(), nn.Parameter(torch.ones(()))

    def forward(self, input_values: Tensor) -> Any:
        times = torch.arange(1.0, input_values.shape[1] + 1)[:, None]
        return type("Output", (), {"logits": self.scale * times * input_values})


def test_a_model_that_changes_with_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Clock is not linear and time-invariant"):
        impulse_memory(Clock(), 10)


def test_steps_under_constant_input_by_hand() -> None:
    kind = FAMILIES["tanh_rnn"]
    torch.manual_seed(0)
    model = kind.regression(kind.config(hidden_size=4)).double()
    with torch.no_grad():
        y = model(torch.full((1, 12, 1), 0.7, dtype=torch.float64)).logits[0, :, 0]
        rest = model(torch.zeros(1, 1, 1, dtype=torch.float64)).logits[0, 0, 0]
    memory = constant_input_memory(model, 12, value=0.7)[:, 0, 0]
    assert memory[0].item() == pytest.approx(abs(y[0] - rest).item())
    torch.testing.assert_close(memory[1:], (y[1:] - y[:-1]).abs())


def test_training_goes_on_as_it_was() -> None:
    model = linear_model()
    model.train()
    model.head.eval()
    memory = impulse_memory(model, 4)
    assert not memory.requires_grad
    assert model.training
    assert not model.head.training


def test_distance_by_lag_and_by_thirds() -> None:
    target = torch.zeros(8, dtype=torch.float64)
    memory = torch.tensor([3.0, 0, 0, 2.0, 2.0, -2.0, 0, -4.0])
    distance = memory_distance(memory, target)
    assert distance.by_lag.tolist() == [3.0, 0, 0, 2.0, 2.0, 2.0, 0, 4.0]
    assert distance.short == pytest.approx(math.sqrt(9 / 3))
    assert distance.middle == pytest.approx(2.0)
    assert distance.long == pytest.approx(math.sqrt(16 / 2))
    assert memory_distance(memory[:, None, None], target).long == distance.long


def test_bad_lengths_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="length=0; accepted: a whole number of at least 1"):
        impulse_memory(linear_model(), 0)
    with pytest.raises(ValueError, match="length=-1; accepted"):
        constant_input_memory(linear_model(), -1)
    for memory, target in ((torch.ones(3), torch.ones(4)), (torch.ones(4, 2, 1), torch.ones(4)), (torch.ones(2),) * 2):
        with pytest.raises(ValueError, match=r"memory has shape \(\d.*\) and target \(\d,\); accepted"):
            memory_distance(memory, target)

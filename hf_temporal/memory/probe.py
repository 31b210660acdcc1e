"""What a model remembers: its memory function, and how far that is from a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_temporal.model.model_loss import undisturbed

LINEARITY_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class MemoryDistance:
    """|ρ̂(s) − ρ(s)| for each lag s, and its root mean square over each third of the lags.

    Args:
        by_lag: `[length]`.
        short: over the first third of the lags, s = 0, 1, …; where their number is not divisible by three, the first
            and then the second third are one longer.
        middle: over the second third.
        long: over the last third.
    """

    by_lag: Tensor
    short: float
    middle: float
    long: float


def impulse_memory(model: nn.Module, length: int) -> Tensor:
    """ρ̂(s) with y_t = Σ_s ρ̂(s) x_{t−s} + c: the response at lag s to a unit impulse at time 0, less that to nothing.

    Exact for a model that is linear (up to a constant) and time-invariant, and refused for any other: a doubled and
    turned impulse half-way must have the doubled and turned response.

    Args:
        model: one for regression, called with `input_values` `[batch, time, input_size]`, that has a `config` with
            `input_size` and returns `logits` `[batch, time, output_size]`.
        length: number of lags, s = 0..length−1.

    Returns:
        `[length, output_size, input_size]`, in the dtype of the model.

    Raises:
        ValueError: `length` below 1; a model that is not linear or not time-invariant.
    """
    _check_length(length)
    size, like = _input_of(model)
    later = length // 2
    inputs = like.new_zeros(1 + 2 * size, length, size)
    dimensions = torch.arange(size, device=like.device)
    inputs[1 + dimensions, 0, dimensions] = 1
    inputs[1 + size + dimensions, later, dimensions] = -2
    outputs = _run(model, inputs)
    responses = outputs[1:] - outputs[:1]
    memory, control = responses[:size], responses[size:]
    expected = torch.zeros_like(control)
    expected[:, later:] = -2 * memory[:, : length - later]
    scale = responses.abs().max()
    if not (control - expected).abs().max() <= LINEARITY_TOLERANCE * scale:
        raise ValueError(
            f"{type(model).__name__} is not linear and time-invariant: its response to an impulse depends on the "
            "impulse's size or time. Accepted: linear models, or constant_input_memory for any other."
        )
    return memory.permute(1, 2, 0)


def constant_input_memory(model: nn.Module, length: int, *, value: float = 1.0) -> Tensor:
    """|y_s − y_{s−1}| under the constant input x_t = value, for s = 1..length−1; at s = 0, |y_0 − y_0 under input 0|.

    For y_t = Σ_s ρ(s) x_{t−s} that is |value · ρ(s)|. A model that looks at nothing but the values of its inputs and
    not at their positions, such as attention without them, shows 0 at every lag but the first.

    Args:
        model: as for `impulse_memory`, linear or not.
        length: number of lags, s = 0..length−1.
        value: of one input, the others held at 0, each in turn.

    Returns:
        `[length, output_size, input_size]`, in the dtype of the model.

    Raises:
        ValueError: `length` below 1.

    Source: the memory function of the paper's authors, |y_{t+1} − y_t|, here at lag s = t + 1 and begun at lag 0.
    """
    _check_length(length)
    size, like = _input_of(model)
    inputs = torch.cat([like.new_zeros(1, size), value * torch.eye(size).to(like)])
    outputs = _run(model, inputs[:, None].expand(-1, length, -1))
    before = torch.cat([outputs[:1, :1].expand(size, -1, -1), outputs[1:, :-1]], dim=1)
    return (outputs[1:] - before).abs().permute(1, 2, 0)


def gradient_memory(model: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """E[∂y_T/∂x_{T−s}] over the inputs, for s = 0..T−1: how much the last output hangs on what was s times ago.

    For y_t = Σ_s ρ(s) x_{t−s} that is ρ(s). Unlike a constant input, inputs of the kind that a nonlinear model was
    trained on tell what it does with those.

    Args:
        model: one for regression, as for `impulse_memory`, linear or not, or a `Functional`. It is run as it is: put a
            model that has dropout into eval mode.
        inputs: `[batch, time, input_size]`, T being `time`.

    Returns:
        `[time, output_size, input_size]`, in the dtype of the inputs.
    """
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = model(inputs)
        last = (outputs if isinstance(outputs, Tensor) else outputs.logits)[:, -1].mean(0)
        gradients = [torch.autograd.grad(each, inputs, retain_graph=True)[0].sum(0) for each in last]
    return torch.stack(gradients, 1).flip(0)


def memory_distance(memory: Tensor, target: Tensor) -> MemoryDistance:
    """|memory − target| by lag, and its root mean square over the short, the middle and the long lags.

    Against `constant_input_memory` the target is |ρ|; for a nonlinear functional, what the same probe finds in it.

    Args:
        memory: `[length]`, or `[length, 1, 1]` as the functions above return it for one input and one output.
        target: ρ, `[length]`.

    Raises:
        ValueError: shapes that do not fit, fewer than three lags.
    """
    if memory.shape[1:] == (1, 1):
        memory = memory[:, 0, 0]
    if memory.dim() != 1 or memory.shape != target.shape or len(target) < 3:
        raise ValueError(
            f"memory has shape {tuple(memory.shape)} and target {tuple(target.shape)}; accepted: [length] for both, "
            "or [length, 1, 1] for memory, with length ≥ 3."
        )
    dtype = torch.promote_types(memory.dtype, target.dtype)
    by_lag = (memory.to(dtype) - target.to(memory.device, dtype)).abs()
    short, middle, long = (part.square().mean().sqrt().item() for part in by_lag.tensor_split(3))
    return MemoryDistance(by_lag, short, middle, long)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length!r}; accepted: a whole number of at least 1.")


def _input_of(model: Any) -> tuple[int, Tensor]:
    return model.config.input_size, next(model.parameters())


def _run(model: nn.Module, inputs: Tensor) -> Tensor:
    with undisturbed(model):
        outputs: Tensor = model(input_values=inputs).logits
    return outputs

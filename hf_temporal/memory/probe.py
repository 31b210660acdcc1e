"""The memory function of a model, and its distance to a target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_temporal.data import check_counts
from hf_temporal.model.model_loss import undisturbed

LINEARITY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class MemoryDistance:
    """|ρ̂(s) − ρ(s)| for each lag s, `[length]`, and its root mean square over the short, middle and long lags.

    These are the thirds of the lags, the first and then the second of which may be one longer.
    """

    by_lag: Tensor
    short: float
    middle: float
    long: float


def impulse_memory(model: nn.Module, length: int) -> Tensor:
    """The memory function of a linear model, ρ̂(s) with y_t = Σ_s ρ̂(s) x_{t−s} + c, by its impulse response.

    ρ̂(s) is the response at lag s to a unit impulse at time 0, less the response to zeros. A model is refused if it is
    not linear (up to a constant) and time-invariant: an impulse of −2 half-way must have −2 times the response.

    Called with `input_values`, `[batch, time, input_size]`, the model returns `logits`, `[batch, time, output_size]`;
    its `config` has `input_size`. The result is `[length, output_size, input_size]` in the dtype of the model, for the
    lags s = 0..length−1. A model that is refused, or a `length` below 1, is a `ValueError`.
    """
    size, like = _input_of(model, length)
    later = length // 2
    inputs = like.new_zeros(1 + 2 * size, length, size)
    dimensions = torch.arange(size, device=like.device)
    inputs[1 + dimensions, 0, dimensions] = 1
    inputs[1 + size + dimensions, later, dimensions] = -2
    with undisturbed(model):
        outputs = model(input_values=inputs).logits
    responses = outputs[1:] - outputs[:1]
    memory, control = responses[:size], responses[size:]
    expected = F.pad(-2 * memory[:, : length - later], (0, 0, later, 0))
    if not (control - expected).abs().max() <= LINEARITY_TOLERANCE * responses.abs().max():
        accepted = "accepted: a model that is, or constant_input_memory for any other"
        raise ValueError(f"{type(model).__name__} is not linear and time-invariant; {accepted}.")
    return memory.permute(1, 2, 0)


def constant_input_memory(model: nn.Module, length: int, *, value: float = 1.0) -> Tensor:
    """The memory function of any model by its steps under a constant input.

    |y_s − y_{s−1}| under x_t = value for s = 1..length−1, and |y_0 − y_0 under input 0| at s = 0; |value · ρ(s)| for
    y_t = Σ_s ρ(s) x_{t−s}. It is 0 at every lag but the first for attention without positions.

    Model and result are as for `impulse_memory`, linear or not; `value` is that of one input, each in turn, while the
    others are 0.

    Source: the memory function of the paper's authors, |y_{t+1} − y_t|, here at lag s = t + 1 and begun at lag 0.
    """
    size, like = _input_of(model, length)
    inputs = torch.cat([like.new_zeros(1, size), value * torch.eye(size).to(like)])
    with undisturbed(model):
        outputs = model(input_values=inputs[:, None].expand(-1, length, -1)).logits
    before = torch.cat([outputs[:1, :1].expand(size, -1, -1), outputs[1:, :-1]], dim=1)
    return (outputs[1:] - before).abs().permute(1, 2, 0)


def gradient_memory(model: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """How much the last output depends on the input s times before: E[∂y_T/∂x_{T−s}] over the inputs, s = 0..T−1.

    For y_t = Σ_s ρ(s) x_{t−s} that is ρ(s). For a nonlinear model the inputs should be like those it was trained on,
    which a constant input is not.

    The model is as for `impulse_memory`, linear or not, or a `Functional`; one with dropout has to be in eval mode.
    The inputs are `[batch, T, input_size]`, the result is `[T, output_size, input_size]`.
    """
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = model(inputs)
        last = (outputs if isinstance(outputs, Tensor) else outputs.logits)[:, -1].mean(0)
        gradients = [torch.autograd.grad(each, inputs, retain_graph=True)[0].sum(0) for each in last]
    return torch.stack(gradients, 1).flip(0)


def memory_distance(memory: Tensor, target: Tensor) -> MemoryDistance:
    """The distance of a memory function to its target, by lag and over the short, middle and long lags.

    For `constant_input_memory` the target is |ρ|, and for a nonlinear functional, what the same probe finds in it.
    The memory is `[length]`, or `[length, 1, 1]` as the functions above return it for one input and one output, ρ
    `[length]`. Other shapes, or fewer than three lags, are a `ValueError`.
    """
    if memory.shape[1:] == (1, 1):
        memory = memory[:, 0, 0]
    if memory.dim() != 1 or memory.shape != target.shape or len(target) < 3:
        given = f"memory has shape {tuple(memory.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{given}; accepted: [length], or [length, 1, 1] for memory, with length ≥ 3.")
    dtype = torch.promote_types(memory.dtype, target.dtype)
    by_lag = (memory.to(dtype) - target.to(memory.device, dtype)).abs()
    short, middle, long = (part.square().mean().sqrt().item() for part in by_lag.tensor_split(3))
    return MemoryDistance(by_lag, short, middle, long)


def _input_of(model: Any, length: int) -> tuple[int, Tensor]:
    """The input size of a model, and a tensor of its dtype and device."""
    check_counts(length=length)
    return model.config.input_size, next(model.parameters())

"""The recurrences of RNNs: the linear one as a scan of logarithmic depth, and that with tanh."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOOP_LENGTH = 16


def linear_recurrence(inputs: Tensor, weight: Tensor) -> Tensor:
    """h_t = W h_{t−1} + u_t with h_{−1} = 0, that is h_t = Σ_{s=0..t} W^s u_{t−s}.

    Computed by odd–even reduction: pairs of times are merged, W u_{2k} + u_{2k+1}, the recurrence of W², half as long,
    is solved in the same way, and the times between are filled in. That is about 2·time·D² multiplications per row,
    twice those of a loop, in 2·log₂(time) matrix products. The gradient is the same recurrence backwards,
    g_t = Wᵀ g_{t+1} + ∂L/∂h_t, with ∂L/∂u = g and ∂L/∂W = Σ_t g_t h_{t−1}ᵀ, without powers of W; it can be
    differentiated again.

    The inputs u and the result h are `[batch, time, D]` and of one dtype, W is `[D, D]`; it is computed in float32 at
    least. Shapes that do not fit are a `ValueError`.

    Source: Blelloch, *Prefix sums and their applications*, 1990.
    """
    dtype = _check(inputs, weight)
    with torch.autocast(inputs.device.type, enabled=False):
        return _LinearRecurrence.apply(inputs.to(dtype), weight.to(dtype)).to(inputs.dtype)


def tanh_recurrence(inputs: Tensor, weight: Tensor) -> Tensor:
    """h_t = tanh(W h_{t−1} + u_t) with h_{−1} = 0.

    On accelerators this is the kernel of `torch.nn.RNN`. On a CPU, where that spends most of its time on autograd's
    bookkeeping, forward and backward are loops of two operations in place, and ∂L/∂W is one matrix product at the end.

    Arguments, result and errors are those of `linear_recurrence`. It can be differentiated once.
    """
    dtype = _check(inputs, weight)
    with torch.autocast(inputs.device.type, enabled=False):
        if inputs.device.type != "cpu":
            return _by_torch(inputs.to(dtype), weight.to(dtype)).to(inputs.dtype)
        states = _TanhRecurrence.apply(inputs.to(dtype).transpose(0, 1), weight.to(dtype))
        return states.transpose(0, 1).to(inputs.dtype)


def _check(inputs: Tensor, weight: Tensor) -> torch.dtype:
    if inputs.dim() != 3 or weight.shape != (inputs.shape[-1], inputs.shape[-1]):
        given = f"inputs have shape {tuple(inputs.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{given}; accepted: [batch, time, D] and [D, D].")
    return torch.promote_types(torch.float32, torch.promote_types(inputs.dtype, weight.dtype))


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        time = inputs.shape[1]
        halvings = (max(time - 1, 0) // LOOP_LENGTH).bit_length()
        padded = F.pad(inputs, (0, 0, 0, -time % 2**halvings))
        return _odd_even(padded, weight.T, halvings)[:, :time]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, states = ctx.saved_tensors
        gradient = _LinearRecurrence.apply(gradients[0].flip(1), weight.T).flip(1)
        if not ctx.needs_input_grad[1]:
            return gradient, None
        return gradient, gradient[:, 1:].flatten(0, 1).T @ states[:, :-1].flatten(0, 1)


def _by_torch(inputs: Tensor, weight: Tensor) -> Tensor:
    start, identity = inputs.new_zeros(1, inputs.shape[0], inputs.shape[2]), torch.eye(len(weight)).to(weight)
    states, _ = torch.rnn_tanh(
        inputs, start, [identity, weight],
        has_biases=False, num_layers=1, dropout=0.0, train=True, bidirectional=False, batch_first=True,
    )  # fmt: skip
    return states


class _TanhRecurrence(torch.autograd.Function):
    """On `[time, batch, D]`."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor) -> Tensor:
        states = inputs.clone(memory_format=torch.contiguous_format)
        state, power = inputs.new_zeros(inputs.shape[1:]), weight.T
        for each in states.unbind(0):
            state = each.addmm_(state, power).tanh_()
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, states = ctx.saved_tensors
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        slopes, after = 1 - states.square(), states.new_zeros(states.shape[1:])
        for each, slope in zip(reversed(gradient.unbind(0)), reversed(slopes.unbind(0)), strict=True):
            after = each.addmm_(after, weight).mul_(slope)
        if not ctx.needs_input_grad[1]:
            return gradient, None
        return gradient, gradient[1:].flatten(0, 1).T @ states[:-1].flatten(0, 1)


def _odd_even(inputs: Tensor, power: Tensor, halvings: int) -> Tensor:
    """The states of the linear recurrence; `power` is Wᵀ, and `time` divisible by 2^halvings."""
    batch, time, width = inputs.shape
    if not halvings:
        states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        state = inputs.new_zeros(batch, width)
        for t in range(time):
            state = torch.addmm(inputs[:, t], state, power)
            states[:, t] = state
        return states
    pairs = inputs.reshape(-1, 2 * width)
    even, odd = pairs[:, :width], pairs[:, width:]
    merged = torch.addmm(odd, even, power).view(batch, -1, width)
    merged = _odd_even(merged, power @ power, halvings - 1).view(-1, width)
    states = torch.empty_like(pairs)
    states[:, width:] = merged
    states[1:, :width] = torch.addmm(even[1:], merged[:-1], power)
    states.view(batch, -1, 2 * width)[:, 0, :width] = even.unflatten(0, (batch, -1))[:, 0]
    return states.view(batch, -1, width)

"""The recurrence h_t = W h_{t−1} + u_t for a full matrix W, as a scan of logarithmic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOOP_LENGTH = 16


def linear_recurrence(inputs: Tensor, weight: Tensor) -> Tensor:
    """h_t = W h_{t−1} + u_t with h_{−1} = 0, that is h_t = Σ_{s=0..t} W^s u_{t−s}.

    Computed by odd–even reduction: pairs of times are merged, W u_{2k} + u_{2k+1}, the half as long recurrence of W²
    is solved in the same way, and the times between are filled in; about 2·time·D² multiplications per row in
    2·log₂(time) matrix products, twice those of the loop. The gradient is the same recurrence backwards,
    g_t = Wᵀ g_{t+1} + ∂L/∂h_t, with ∂L/∂u = g and ∂L/∂W = Σ_t g_t h_{t−1}ᵀ, so that it does not pass through the
    powers of W; it can be differentiated again.

    Args:
        inputs: u, `[batch, time, D]`.
        weight: W, `[D, D]`.

    Returns:
        h, `[batch, time, D]`, in the dtype of the inputs; computed in float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    Source: Blelloch, *Prefix sums and their applications*, 1990.
    """
    if inputs.dim() != 3 or weight.shape != (inputs.shape[-1], inputs.shape[-1]):
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)} and weight {tuple(weight.shape)}; accepted: [batch, time, D] "
            "and [D, D]."
        )
    dtype = torch.promote_types(torch.float32, torch.promote_types(inputs.dtype, weight.dtype))
    with torch.autocast(inputs.device.type, enabled=False):
        return _LinearRecurrence.apply(inputs.to(dtype), weight.to(dtype), False).to(inputs.dtype)


class _LinearRecurrence(torch.autograd.Function):
    """h_t = W h_{t−1} + u_t, or backwards in time h_t = W h_{t+1} + u_t."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, backwards: bool) -> Tensor:
        return _scan(inputs, weight.T, backwards=backwards)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        _, weight, ctx.backwards = inputs
        ctx.save_for_backward(weight, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weight, states = ctx.saved_tensors
        gradient = _LinearRecurrence.apply(gradients[0], weight.T, not ctx.backwards)
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        later, earlier = gradient[:, 1:], states[:, :-1]
        if ctx.backwards:
            later, earlier = gradient[:, :-1], states[:, 1:]
        return gradient, later.flatten(0, 1).T @ earlier.flatten(0, 1), None


def _scan(inputs: Tensor, power: Tensor, *, backwards: bool) -> Tensor:
    """The states; `power` is Wᵀ."""
    time = inputs.shape[1]
    halvings = (max(time - 1, 0) // LOOP_LENGTH).bit_length()
    padded = F.pad(inputs, (0, 0, 0, -time % 2**halvings))
    return _odd_even(padded, power, halvings, backwards=backwards)[:, :time]


def _odd_even(inputs: Tensor, power: Tensor, halvings: int, *, backwards: bool) -> Tensor:
    if not halvings:
        return _loop(inputs, power, backwards=backwards)
    batch, _, width = inputs.shape
    pairs = inputs.reshape(-1, 2 * width)
    even, odd = pairs[:, :width], pairs[:, width:]
    # a pair is merged at the one of its times that the recurrence reaches last
    merged = torch.addmm(even, odd, power) if backwards else torch.addmm(odd, even, power)
    merged = _odd_even(merged.view(batch, -1, width), power @ power, halvings - 1, backwards=backwards)
    merged = merged.view(-1, width)
    states = torch.empty_like(pairs)
    if backwards:
        states[:, :width] = merged
        states[:-1, width:] = torch.addmm(odd[:-1], merged[1:], power)
        states.view(batch, -1, 2 * width)[:, -1, width:] = odd.unflatten(0, (batch, -1))[:, -1]
    else:
        states[:, width:] = merged
        states[1:, :width] = torch.addmm(even[1:], merged[:-1], power)
        states.view(batch, -1, 2 * width)[:, 0, :width] = even.unflatten(0, (batch, -1))[:, 0]
    return states.view(batch, -1, width)


def _loop(inputs: Tensor, power: Tensor, *, backwards: bool) -> Tensor:
    states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    state = inputs.new_zeros(inputs.shape[0], inputs.shape[2])
    times = range(inputs.shape[1])
    for t in reversed(times) if backwards else times:
        state = torch.addmm(inputs[:, t], state, power)
        states[:, t] = state
    return states

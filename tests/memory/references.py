"""Each mixer once more, from its own parameters, written out one time after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_rnn(mixer: Any, x: Tensor, activation: Callable[[Tensor], Tensor] = lambda state: state) -> Tensor:
    state, states = x.new_zeros(x.shape[0], x.shape[2]), []
    for each in mixer.input(x).unbind(1):
        state = activation(state @ mixer.recurrent.T + each)
        states.append(state)
    return torch.stack(states, 1)


def tanh_rnn(mixer: Any, x: Tensor) -> Tensor:
    return linear_rnn(mixer, x, torch.tanh)


def tcn(mixer: Any, x: Tensor) -> Tensor:
    for causal in mixer.convolutions:
        norm, direction = causal.convolution.parametrizations.weight.parameters()
        weight = norm * direction / direction.square().sum((1, 2), keepdim=True).sqrt()
        taps, dilation = weight.shape[2], causal.dilation
        outputs = []
        for t in range(x.shape[1]):
            y = causal.convolution.bias
            for k in range(taps):
                if t - (taps - 1 - k) * dilation >= 0:
                    y = y + x[:, t - (taps - 1 - k) * dilation] @ weight[:, :, k].T
            outputs.append(F.relu(y).expand(x.shape[0], -1))
        x = torch.stack(outputs, 1)
    return x


def state_space(mixer: Any, x: Tensor) -> Tensor:
    step = mixer.log_step.exp()[:, None]
    a = torch.complex(-mixer.log_decay.exp(), mixer.frequency)
    readout = torch.complex(mixer.readout[..., 0], mixer.readout[..., 1])
    state, outputs = torch.zeros_like(a), []
    for each in x.unbind(1):
        state = torch.exp(step * a) * state + (torch.exp(step * a) - 1) / a * each[..., None]
        outputs.append(2 * (readout * state).sum(-1).real + mixer.direct * each)
    return mixer.output(F.gelu(torch.stack(outputs, 1)))


def attention(mixer: Any, x: Tensor) -> Tensor:
    if not hasattr(mixer, "heads"):
        return mixer.output(F.gelu(mixer.input(x)))
    query, key, value = mixer.input(x).chunk(3, dim=-1)
    width = x.shape[2] // mixer.heads
    outputs = []
    for t in range(x.shape[1]):
        heads = []
        for h in range(mixer.heads):
            part = slice(h * width, (h + 1) * width)
            scores = (key[:, : t + 1, part] @ query[:, t, part, None])[..., 0] / width**0.5
            heads.append((scores.softmax(-1)[..., None] * value[:, : t + 1, part]).sum(1))
        outputs.append(torch.cat(heads, -1))
    return mixer.output(torch.stack(outputs, 1))


MIXERS = {
    "linear_rnn": linear_rnn,
    "tanh_rnn": tanh_rnn,
    "tcn": tcn,
    "state_space": state_space,
    "attention": attention,
}


def backbone(family: str, model: Any, x: Tensor) -> Tensor:
    """The model's blocks by hand, from the embedded input `[batch, time, width]`."""
    if family == "attention":
        x = x + positions(x.shape[1], x.shape[2])
    for block in model.backbone.blocks:
        normed = _layer_norm(block.norm, x) if model.config.normalization == "layer" else x
        mixed = MIXERS[family](block.mixer, normed)
        x = x + mixed if model.config.skip_connections else mixed
    return _layer_norm(model.backbone.norm, x) if model.config.normalization == "layer" else x


def positions(time: int, width: int) -> Tensor:
    half = (width + 1) // 2
    rows = [
        [float(torch.tensor(t / 10000 ** (i / half), dtype=torch.float64).sin()) for i in range(half)]
        + [float(torch.tensor(t / 10000 ** (i / half), dtype=torch.float64).cos()) for i in range(half)]
        for t in range(time)
    ]
    return torch.tensor(rows, dtype=torch.float64)[:, :width]


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

"""The initial values of the parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import initialization as init

from .mixers import RnnMixer, StateSpaceMixer


@torch.no_grad()
def initialize(module: nn.Module, config: Any) -> None:
    """Initialize the parameters that a module of a model itself holds, except those that were loaded.

    - Linear maps and convolutions are uniform in ±1/√inputs, weight and bias, as in torch; the norms of a
      weight-normalized convolution are those of the direction.
    - Recurrent matrices are orthogonal, times `recurrent_scale`.
    - State-space models are S4D-Lin: A = −1/2 + iπn, Δ log-uniform between the configured steps, C complex normal of
      variance 1, D = 1.
    - Embeddings are standard normal, layer norms the identity.
    """
    if isinstance(module, nn.Linear):
        _uniform(module.in_features, module.weight, module.bias)
    elif isinstance(module, nn.Conv1d):
        _uniform(module.in_channels * module.kernel_size[0], module.bias)
    elif isinstance(module, ParametrizationList):
        norm, direction = module.parameters()
        _uniform(direction[0].numel(), direction)
        init.copy_(norm, direction.norm(dim=(1, 2), keepdim=True))
    elif isinstance(module, RnnMixer):
        init.orthogonal_(module.recurrent, gain=config.recurrent_scale)
    elif isinstance(module, StateSpaceMixer):
        init.uniform_(module.log_step, math.log(config.smallest_step), math.log(config.largest_step))
        init.constant_(module.log_decay, math.log(0.5))
        init.copy_(module.frequency, math.pi * torch.arange(config.state_size).expand_as(module.frequency))
        init.normal_(module.readout, std=0.5**0.5)
        init.ones_(module.direct)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)


def _uniform(inputs: int, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

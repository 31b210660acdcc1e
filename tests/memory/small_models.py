"""Small models of every family, for regression and for tokens, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from hf_temporal.memory.models import FAMILIES

KINDS = ("regression", "tokens")
BOTH = pytest.mark.parametrize("kind", KINDS)
EVERY = pytest.mark.parametrize("family", FAMILIES)
VOCABULARY = 12
SMALL: dict[str, dict[str, Any]] = {
    "linear_rnn": {},
    "tanh_rnn": {},
    "tcn": {"num_hidden_layers": 2, "kernel_size": 3},
    "state_space": {"state_size": 3, "largest_step": 0.5, "smallest_step": 0.1},
    "attention": {"intermediate_size": 12},
}


def small(family: str, kind: str, **settings: Any) -> Any:
    set_seed(0)
    settings = {"hidden_size": 6, "num_hidden_layers": 2, **SMALL[family], **settings}
    if kind == "tokens":
        return FAMILIES[family].causal_lm(FAMILIES[family].config(vocab_size=VOCABULARY, **settings))
    return FAMILIES[family].regression(FAMILIES[family].config(**{"input_size": 2, "output_size": 3, **settings}))


def inputs_of(kind: str, time: int = 9, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "tokens":
        return {"input_ids": torch.randint(VOCABULARY, (batch, time), generator=generator)}
    return {"input_values": torch.randn(batch, time, 2, generator=generator)}

"""The model families by name, known to `AutoConfig`, `AutoModel` (regression) and `AutoModelForCausalLM` (tokens).

model = LinearRnnForRegression(LinearRnnConfig(input_size=1, output_size=1, hidden_size=32))
outputs = model(input_values=x, labels=y)  # x [batch, time, 1], y [batch, time]

family = FAMILIES["state_space"]
model = family.causal_lm(family.config(vocab_size=12, num_hidden_layers=4))
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import (
    AttentionConfig,
    LinearRnnConfig,
    MemoryModelConfig,
    StateSpaceConfig,
    TanhRnnConfig,
    TcnConfig,
)
from .modeling import (
    AttentionForCausalLM,
    AttentionForRegression,
    LinearRnnForCausalLM,
    LinearRnnForRegression,
    StateSpaceForCausalLM,
    StateSpaceForRegression,
    TanhRnnForCausalLM,
    TanhRnnForRegression,
    TcnForCausalLM,
    TcnForRegression,
)

__all__ = [
    "FAMILIES",
    "AttentionConfig",
    "AttentionForCausalLM",
    "AttentionForRegression",
    "Family",
    "LinearRnnConfig",
    "LinearRnnForCausalLM",
    "LinearRnnForRegression",
    "MemoryModelConfig",
    "StateSpaceConfig",
    "StateSpaceForCausalLM",
    "StateSpaceForRegression",
    "TanhRnnConfig",
    "TanhRnnForCausalLM",
    "TanhRnnForRegression",
    "TcnConfig",
    "TcnForCausalLM",
    "TcnForRegression",
]


class Family(NamedTuple):
    """The classes of a family."""

    config: type[Any]
    regression: type[Any]
    causal_lm: type[Any]


FAMILIES = {
    "linear_rnn": Family(LinearRnnConfig, LinearRnnForRegression, LinearRnnForCausalLM),
    "tanh_rnn": Family(TanhRnnConfig, TanhRnnForRegression, TanhRnnForCausalLM),
    "tcn": Family(TcnConfig, TcnForRegression, TcnForCausalLM),
    "state_space": Family(StateSpaceConfig, StateSpaceForRegression, StateSpaceForCausalLM),
    "attention": Family(AttentionConfig, AttentionForRegression, AttentionForCausalLM),
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.config.model_type, _family.config)
    AutoModel.register(_family.config, _family.regression)
    AutoModelForCausalLM.register(_family.config, _family.causal_lm)
    _family.config.register_for_auto_class()
    _family.regression.register_for_auto_class("AutoModel")
    _family.causal_lm.register_for_auto_class("AutoModelForCausalLM")

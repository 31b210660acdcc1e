"""The model families by name, known to `AutoConfig`, `AutoModel` (regression) and `AutoModelForCausalLM` (tokens)."""

from __future__ import annotations

from typing import Any

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

FAMILIES: dict[str, tuple[type[MemoryModelConfig], type[Any], type[Any]]] = {
    "linear_rnn": (LinearRnnConfig, LinearRnnForRegression, LinearRnnForCausalLM),
    "tanh_rnn": (TanhRnnConfig, TanhRnnForRegression, TanhRnnForCausalLM),
    "tcn": (TcnConfig, TcnForRegression, TcnForCausalLM),
    "state_space": (StateSpaceConfig, StateSpaceForRegression, StateSpaceForCausalLM),
    "attention": (AttentionConfig, AttentionForRegression, AttentionForCausalLM),
}

for _config, _regression, _causal_lm in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _regression)
    AutoModelForCausalLM.register(_config, _causal_lm)
    _config.register_for_auto_class()
    _regression.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")

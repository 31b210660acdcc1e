"""The model families by name, known to `AutoConfig`, `AutoModel` (regression) and `AutoModelForCausalLM` (tokens).

family = FAMILIES["linear_rnn"]
model = family.regression(family.config(input_size=1, output_size=1, hidden_size=32))
outputs = model(input_values=x, labels=y)  # x [batch, time, 1], y [batch, time]
"""

from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import modeling
from .configuration import AttentionConfig, LinearRnnConfig, StateSpaceConfig, TanhRnnConfig, TcnConfig


class Family(NamedTuple):
    """The classes of a family."""

    config: type[Any]
    regression: type[Any]
    causal_lm: type[Any]


FAMILIES = {
    "linear_rnn": Family(LinearRnnConfig, modeling.LinearRnnForRegression, modeling.LinearRnnForCausalLM),
    "tanh_rnn": Family(TanhRnnConfig, modeling.TanhRnnForRegression, modeling.TanhRnnForCausalLM),
    "tcn": Family(TcnConfig, modeling.TcnForRegression, modeling.TcnForCausalLM),
    "state_space": Family(StateSpaceConfig, modeling.StateSpaceForRegression, modeling.StateSpaceForCausalLM),
    "attention": Family(AttentionConfig, modeling.AttentionForRegression, modeling.AttentionForCausalLM),
}

for _family in FAMILIES.values():
    AutoConfig.register(_family.config.model_type, _family.config)
    AutoModel.register(_family.config, _family.regression)
    AutoModelForCausalLM.register(_family.config, _family.causal_lm)
    _family.config.register_for_auto_class()
    _family.regression.register_for_auto_class("AutoModel")
    _family.causal_lm.register_for_auto_class("AutoModelForCausalLM")

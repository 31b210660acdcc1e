"""The small models: each trains for a step in its recipe, with a loss that is read exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_temporal.data.copying.digits import digit_tokenizer
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.finetuning.small_models import SMALL
from hf_temporal.model.model_loss import read_model_loss
from recipes import finetune_causal_lm, finetune_seq2seq
from tests.finetuning.test_tasks import DIGITS, QUICK, evaluations

ONE_STEP = ("--max_steps", "1", "--temporal_power", "2")


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_is_trained_for_a_step(name: str, tmp_path: Path) -> None:
    flags = [*DIGITS, "--model_type", name, "--config_overrides", "small", *QUICK, *ONE_STEP]
    flags += ["--output_dir", str(tmp_path)]
    if name == "t5":
        finetune_seq2seq.main([*flags, "--predict_with_generate"])
    else:
        finetune_causal_lm.main(flags)
    before, after = (each["metrics"] for each in evaluations(tmp_path))
    assert math.isfinite(after["eval_temporal_loss"])
    assert after["eval_loss"] != before["eval_loss"]
    assert 0 <= after["eval_recall"] <= 1


@pytest.mark.parametrize("name", [name for name in SMALL if name != "t5"])
def test_the_loss_of_a_small_model_is_read_exactly(name: str) -> None:
    model, _ = load_causal_lm(ModelArguments(model_type=name, config_overrides="small"), digit_tokenizer())
    read = read_model_loss(model)
    assert read.in_words().startswith("loss: cross-entropy; labels: shifted by the model; ")
    assert model.num_parameters() < 400_000
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)  # as in the code of a model card


@pytest.mark.parametrize("given", ["small,num_hidden_layers=4", "num_hidden_layers=4,small"])
def test_a_value_of_ones_own_wins_over_the_small_one(given: str) -> None:
    values = ModelArguments(model_type="llama", config_overrides=given).config_values()
    assert values == SMALL["llama"] | {"num_hidden_layers": 4}


def test_a_kind_without_small_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config_overrides='small' for model_type='gpt2'; accepted: .*, mamba2, "):
        ModelArguments(model_type="gpt2", config_overrides="small")

"""The trainer in combination with what `Trainer` offers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_temporal import (
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightTrainer,
)
from tests.test_trainer import SETTINGS, losses, trainer
from tests.tiny_models import PadCollator, causal_examples, tiny_model

# ---- hyperparameter search


def test_search_sets_the_fields_after_construction(tmp_path: Path) -> None:
    seen: list[float] = []

    class Spying(TemporalWeightTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            seen.append(losses(self)[0]["temporal_power"])
            return result

    one = Spying(
        args=TemporalTrainingArguments(str(tmp_path), **{**SETTINGS, "max_steps": 1}),
        train_dataset=causal_examples(8),
        eval_dataset=causal_examples(8),
        data_collator=PadCollator(),
        model_init=lambda: tiny_model("llama"),
    )
    one.hyperparameter_search(
        hp_space=lambda trial: {"temporal_power": trial.suggest_categorical("temporal_power", [3.0])},
        n_trials=1,
        direction="minimize",
        backend="optuna",
    )
    assert seen == [3.0]


def test_searching_a_field_beside_an_explicit_weighting(tmp_path: Path) -> None:
    one = TemporalWeightTrainer(
        args=TemporalTrainingArguments(str(tmp_path), **SETTINGS),
        train_dataset=causal_examples(8),
        eval_dataset=causal_examples(8),
        data_collator=PadCollator(),
        model_init=lambda: tiny_model("llama"),
        weighting=TemporalWeighting(1.0),
    )
    with pytest.raises(ValueError, match="temporal_power is searched beside an explicit weighting="):
        one.hyperparameter_search(
            hp_space=lambda trial: {"temporal_power": trial.suggest_categorical("temporal_power", [3.0])},
            n_trials=1,
            direction="minimize",
            backend="optuna",
        )


# ---- what Trainer offers, in combination


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"average_tokens_across_devices": False},
        {"dataloader_num_workers": 1},
    ],
)
def test_options_of_trainer(option: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for settings in ({}, option):
        one = trainer(
            tmp_path, temporal_power=2.0, temporal_fused_head="on", max_steps=1, train_dataset=causal_examples(4),
            **settings,
        )  # fmt: skip
        one.train()
        results.append((losses(one)[0]["loss"], losses(one)[0]["grad_norm"]))
    assert results[1] == pytest.approx(results[0], rel=2e-2 if "bf16" in option else 1e-6)


def test_iterable_data_sets(tmp_path: Path) -> None:
    class Rows(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(causal_examples(12))

    one = trainer(tmp_path, temporal_power=2.0, train_dataset=Rows())
    one.train()
    reference = trainer(
        tmp_path, temporal_power=2.0, train_sampling_strategy="sequential", train_dataset=causal_examples(12)
    )
    reference.train()
    assert [entry["loss"] for entry in losses(one)] == [entry["loss"] for entry in losses(reference)]

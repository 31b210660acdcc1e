"""Stock trainers and ours, run through the same behaviour and compared in all that it returns and leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from tests.test_dropin import CLOCKS, data, tokenizer
from tests.tiny_models import SEQ2SEQ, tiny_model
from tests.tiny_training import norm

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 5e-3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 11,
}  # fmt: skip
OURS_ALONE = {"temporal_weighting.json", "loss_by_position.json"}
NOT_COMPARED = (*CLOCKS, "_memory", "_delta", "_time")


@dataclass
class Maker:
    """Makes trainers of the stock classes or of ours, which differ in nothing else, and keeps them."""

    ours: bool
    folder: Path
    made: list[Any] = field(default_factory=list)

    def __call__(self, name: str = "llama", trainer: dict[str, Any] | None = None, **arguments: Any) -> Any:
        """A trainer of the tiny model `name` and its examples; `trainer` and `arguments` override."""
        seq2seq = name in SEQ2SEQ
        kinds: tuple[Any, Any] = (
            (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)
        )
        zero = {}
        if self.ours:
            kinds, zero = (TemporalWeightTrainer, TemporalTrainingArguments), {"temporal_power": 0.0}
            if seq2seq:
                kinds = TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments
        given: dict[str, Any] = {
            "model": None if trainer and "model_init" in trainer else tiny_model(name),
            "train_dataset": data(name, 12, seed=0),
            "eval_dataset": data(name, 5, seed=1),
            **(trainer or {}),
        }
        given.setdefault("data_collator", DataCollatorForSeq2Seq(tokenizer(), model=given["model"]))
        torch.manual_seed(1)
        args = kinds[1](output_dir=str(self.folder), **{**SETTINGS, **arguments}, **zero)
        self.made.append(kinds[0](args=args, **given))
        return self.made[-1]


Behaviour = Callable[[Maker], Any]


def assert_stock(behaviour: Behaviour, folder: Path) -> None:
    """What a behaviour returns, logs, leaves in the model and writes is the same with ours."""
    stock, ours = Maker(False, folder / "stock"), Maker(True, folder / "ours")
    theirs_returned, mine_returned = behaviour(stock), behaviour(ours)
    assert_same(mine_returned, theirs_returned, "returned")
    for mine, theirs in zip(ours.made, stock.made, strict=True):
        assert_same(mine.state.log_history, theirs.state.log_history, "log_history")
        assert mine.state.best_global_step == theirs.state.best_global_step
        assert_same(mine.state.best_metric, theirs.state.best_metric, "best_metric")
        if theirs.model is not None:  # a search has none before it begins
            assert_same(dict(mine.model.state_dict()), dict(theirs.model.state_dict()), "parameters")
    assert files(ours.folder) - OURS_ALONE == files(stock.folder)


def files(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in paths if path.name not in OURS_ALONE}


def assert_same(mine: Any, theirs: Any, where: str) -> None:
    """Equal in everything that stock has; ours may have more keys."""
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if not str(key).endswith(NOT_COMPARED):
                assert key in mine, (where, key)
                assert_same(mine[key], value, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs), where
        for index, (ours, stock) in enumerate(zip(mine, theirs, strict=True)):
            assert_same(ours, stock, f"{where}[{index}]")
    elif isinstance(theirs, (Tensor, np.ndarray)):
        a, b = torch.as_tensor(mine).double(), torch.as_tensor(theirs).double()
        assert a.shape == b.shape, where
        assert norm({"": a - b}) <= 2e-4 * norm({"": b}) + 1e-6, where
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), where
    else:
        assert mine == theirs, where

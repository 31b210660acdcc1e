"""A stock training script with the trainer's name changed and p = 0: no number that it logs changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from tests.tiny_models import IGNORE, SEQ2SEQ, VOCABULARY, examples, tiny_model

CLOCKS = ("_runtime", "_per_second")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def data(name: str, count: int, seed: int) -> Dataset:
    rows: list[dict[str, Any]] = []
    for row in examples(name, count, seed=seed):
        labels = row["labels"]
        if name == "gpt2":  # stock counts a first label that this model's loss never scores
            labels = [IGNORE, *labels[1:]]
        rows.append({**row, "labels": labels, "title": "a column that no model takes"})
    return Dataset.from_list(rows)


def arrays(predictions: Any) -> list[Any]:
    """The arrays of nested tuples, in order."""
    if isinstance(predictions, tuple):
        return [array for part in predictions for array in arrays(part)]
    return [np.asarray(predictions)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels = prediction.label_ids
    logits = next(array for array in arrays(prediction.predictions) if array.ndim == 3)
    return {"hits": float(np.mean(logits.argmax(-1)[labels != IGNORE])), "shape": float(np.prod(logits.shape))}


def generated(prediction: EvalPrediction) -> dict[str, float]:
    return {"sum": float(np.clip(prediction.predictions, 0, None).sum())}


def script(trainer_class: type[Trainer], arguments: TrainingArguments, name: str, adapter: str, dropout: float) -> Any:
    """A training script as the examples of transformers write it."""
    model = tiny_model(name, adapter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    generates = getattr(arguments, "predict_with_generate", False)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data(name, 12, seed=0),
        eval_dataset=data(name, 5, seed=1),
        processing_class=tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model, label_pad_token_id=IGNORE),
        compute_metrics=generated if generates else accuracy,
    )
    trainer.train()
    final = trainer.evaluate(metric_key_prefix="final")
    predicted = trainer.predict(data(name, 5, seed=2))
    return trainer, final, predicted


CASES: dict[str, dict[str, Any]] = {
    "llama": {"eval_strategy": "epoch"},
    "llama accumulated": {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1},
    "llama smoothed": {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "eval_strategy": "epoch"},
    "llama best": {
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 0.3,
        "metric_for_best_model": "loss",
    },
    "llama eval on start": {"eval_on_start": True, "gradient_checkpointing": True, "eval_accumulation_steps": 1},
    "llama bf16": {"bf16": True},
    "llama loss only": {"prediction_loss_only": True, "eval_strategy": "epoch"},
    "gpt2 dropout": {"gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
    "qwen3 lora": {"gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
    "llama lora_head": {"gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
    "gemma2 saved_head": {"eval_strategy": "epoch", "include_num_input_tokens_seen": "non_padding"},
    "cohere": {"torch_empty_cache_steps": 1, "max_grad_norm": 0.1},
    "granite sequential": {"train_sampling_strategy": "sequential", "logging_steps": 2},
    "mixtral": {"eval_strategy": "epoch"},
    "t5": {"eval_strategy": "epoch"},
    "bart smoothed": {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "eval_strategy": "epoch"},
    "mt5 generates": {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "epoch"},
    "encoder_decoder": {"eval_strategy": "epoch"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_logged_number_changes(case: str, tmp_path: Path) -> None:
    name, *words = case.split()
    adapter = words[0] if words and words[0] in ("lora", "lora_head", "saved_head") else "plain"
    dropout = 0.1 if "dropout" in words else 0.0
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 11, **CASES[case],
    }  # fmt: skip
    stock: tuple[Any, Any] = (Trainer, TrainingArguments)
    ours: tuple[Any, Any] = (TemporalWeightTrainer, TemporalTrainingArguments)
    if name in SEQ2SEQ:
        stock = Seq2SeqTrainer, Seq2SeqTrainingArguments
        ours = TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments

    torch.manual_seed(1)
    theirs = script(stock[0], stock[1](output_dir=str(tmp_path / "a"), **settings), name, adapter, dropout)
    torch.manual_seed(1)
    arguments = ours[1](output_dir=str(tmp_path / "b"), temporal_power=0.0, **settings)
    mine = script(ours[0], arguments, name, adapter, dropout)

    assert_same_numbers(mine[0].state.log_history, theirs[0].state.log_history)
    assert_same_numbers([mine[1]], [theirs[1]])
    assert_same_numbers([mine[2].metrics], [theirs[2].metrics])
    assert mine[0].state.best_metric == pytest.approx(theirs[0].state.best_metric)
    assert mine[0].state.best_global_step == theirs[0].state.best_global_step
    if not settings.get("prediction_loss_only"):
        for ours_array, array in zip(arrays(mine[2].predictions), arrays(theirs[2].predictions), strict=True):
            np.testing.assert_allclose(ours_array, array, rtol=1e-3, atol=2e-3)
        np.testing.assert_array_equal(mine[2].label_ids, theirs[2].label_ids)


def assert_same_numbers(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(mine) == len(theirs)
    for ours, stock in zip(mine, theirs, strict=True):
        for key, value in stock.items():
            if not key.endswith(CLOCKS):
                assert ours[key] == pytest.approx(value, rel=1e-4), (key, stock)


def test_plain_arguments_and_a_weighting_do_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    histories = []
    stock_and_ours: list[tuple[Any, dict[str, Any]]] = [
        (Trainer, {}),
        (TemporalWeightTrainer, {"weighting": TemporalWeighting(power=0.0)}),
    ]
    for trainer_class, extra in stock_and_ours:
        trainer = trainer_class(
            model=tiny_model("llama"), args=TrainingArguments(output_dir=str(tmp_path), **settings),
            train_dataset=data("llama", 12, seed=0), data_collator=DataCollatorForSeq2Seq(tokenizer()), **extra,
        )  # fmt: skip
        trainer.train()
        histories.append(trainer.state.log_history)
    assert_same_numbers(histories[1], histories[0])

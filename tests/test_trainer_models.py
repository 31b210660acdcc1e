"""Models whose own loss is another: no shift, no cross-entropy, labels without time, labels that are floats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_temporal import (
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightTrainer,
)
from hf_temporal.model.model_loss import read_model_loss
from tests.test_trainer import SETTINGS, losses, trainer
from tests.tiny_models import PadCollator, causal_examples, tiny_model

# ---- the model's own loss


class Aligned(LlamaForCausalLM):
    """Says that it is for causal language modelling, and compares the logits at i with the label at i."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = super().forward(input_ids=input_ids, **kwargs).logits
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Shifting(nn.Module):
    """A plain module that shifts its labels and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 16)
        self.body = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 97)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        del attention_mask
        logits = self.head(self.body(self.embed(input_ids))[0])
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("model", [lambda: Aligned(tiny_model("llama").config), Shifting])
def test_the_shift_follows_the_models_own_loss(model: Any, tmp_path: Path) -> None:
    logged = []
    kinds: list[tuple[Any, Any, dict[str, float]]] = [
        (Trainer, TrainingArguments, {}),
        (TemporalWeightTrainer, TemporalTrainingArguments, {"temporal_power": 0.0}),
    ]
    for kind, arguments, extra in kinds:
        torch.manual_seed(0)
        args = arguments(str(tmp_path), **extra, **SETTINGS)
        one = kind(model(), args, train_dataset=causal_examples(24), data_collator=PadCollator())
        if kind is Trainer:
            one.model_accepts_loss_kwargs = False
        one.train()
        logged.append([value for entry in losses(one) for value in (entry["loss"], entry["grad_norm"])])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


class Extra(LlamaForCausalLM):
    """Adds to its loss what its logits do not show."""

    def forward(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = super().forward(labels=labels, **kwargs)
        if labels is not None:
            outputs.loss = outputs.loss + self.lm_head.weight.square().mean()
        return outputs

    forward.__signature__ = __import__("inspect").signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_a_loss_that_is_no_cross_entropy(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    with pytest.raises(ValueError, match=r"own loss that is not the cross-entropy of its logits.*Accepted: power=0"):
        trainer(tmp_path, model=Extra(config), temporal_power=1.0).train()
    logged = []
    for kind in (Trainer, TemporalWeightTrainer):
        torch.manual_seed(0)
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, gradient_accumulation_steps=2, **SETTINGS)
        one = kind(Extra(config), args, train_dataset=causal_examples(24), data_collator=PadCollator())
        one.train()
        logged.append([(entry["loss"], entry["grad_norm"]) for entry in losses(one)])
    assert logged[0] == logged[1]


def test_fused_head_on_where_it_is_not_exact(tmp_path: Path) -> None:
    model = Shifting()
    with pytest.raises(ValueError, match="temporal_fused_head='on', but the LM head of Shifting cannot be fused"):
        trainer(tmp_path, model=model, temporal_fused_head="on").train()


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")
def test_a_model_that_fsdp2_cannot_shard() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model("t5")
        fully_shard(model.shared)
        fully_shard(model)
        with pytest.raises(ValueError, match=r"T5For.* cannot be run under FSDP2: .*shared\.weight.* Accepted: DDP"):
            read_model_loss(model, can_run=True)
    finally:
        torch.distributed.destroy_process_group()


# ---- labels without time


TINY_BERT = BertConfig(
    vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def classification() -> tuple[nn.Module, list[dict[str, Any]], str]:
    rows = [{"input_ids": [5, 6, 7 + i], "labels": i % 2} for i in range(12)]
    return BertForSequenceClassification(TINY_BERT), rows, r"labels of shape \(4,\)"


def answering() -> tuple[nn.Module, list[dict[str, Any]], str]:
    rows = [{"input_ids": [5, 6, 7 + i], "start_positions": i % 3, "end_positions": 2} for i in range(12)]
    return BertForQuestionAnswering(TINY_BERT), rows, "no labels"


@pytest.mark.parametrize("task", [classification, answering])
def test_labels_without_time_fall_through_at_power_zero_and_raise_else(task: Any, tmp_path: Path) -> None:
    logged = []
    for kind in (Trainer, TemporalWeightTrainer):
        torch.manual_seed(0)
        model, rows, message = task()
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, gradient_accumulation_steps=2, **SETTINGS)
        one = kind(model, args, train_dataset=rows, eval_dataset=rows)
        one.train()
        logged.append([(entry["loss"], entry["grad_norm"]) for entry in losses(one)] + [one.evaluate()["eval_loss"]])
    assert logged[0] == logged[1]
    with pytest.raises(ValueError, match=f"{message}: there is no loss per time to weight"):
        TemporalWeightTrainer(
            model, TemporalTrainingArguments(str(tmp_path), temporal_power=1.0, **SETTINGS), train_dataset=rows
        ).train()


# ---- float labels


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.GRU(2, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(inputs)[0])
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().mean(), "logits": logits}


def series(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        labels = torch.randn(6, 1, generator=generator)
        labels[: index % 3] = float("nan")
        rows.append({"inputs": torch.randn(6, 2, generator=generator), "labels": labels})
    return rows


@pytest.mark.parametrize("kind", ["squared", "absolute"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_float_labels(kind: str, accumulation: int, tmp_path: Path) -> None:
    rows, model = series(), Regressor()
    args = TemporalTrainingArguments(
        str(tmp_path),
        **{
            **SETTINGS,
            "per_device_train_batch_size": 12 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
        },
    )
    weighting = TemporalWeighting(2.0, regression_loss=kind)
    one = TemporalWeightTrainer(model, args, train_dataset=rows, eval_dataset=rows, weighting=weighting)
    metrics = one.evaluate()
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            error = (model(row["inputs"][None])["logits"][0] - row["labels"]).double()[:, 0]
        each = (error.square() if kind == "squared" else error.abs())[~error.isnan()]
        raw = (torch.arange(1, len(each) + 1).double() / len(each)) ** 2
        total += float((raw * len(each) / raw.sum() * each).sum())
        count += len(each)
    assert metrics["eval_temporal_loss"] == pytest.approx(total / count, rel=1e-5)
    one.train()
    assert losses(one)[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert math.isfinite(losses(one)[0]["grad_norm"])

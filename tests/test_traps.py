"""Cases in which a weighted loss goes wrong without anybody noticing."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    RobertaConfig,
    RobertaForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightTrainer
from hf_temporal.collator import LOSS_WEIGHTS, TimelineCollator
from hf_temporal.model.model_loss import read_model_loss
from tests.test_collator import CAUSAL, tokenizer
from tests.tiny_models import PadCollator, causal_examples, tiny_model

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def first_loss(trainer: Trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("normalization", ["sequence", "batch"])
@pytest.mark.parametrize("document_ids", [None, torch.zeros(2, 1300, dtype=torch.long)])
def test_negative_power_after_a_long_prompt(normalization: str, document_ids: Tensor | None) -> None:
    positions = torch.arange(1, 1301).repeat(2, 1)
    positions[:, :1290] = 0
    positions[1] = 0
    weights = TemporalWeighting(-100.0, normalization=normalization).weights(positions, document_ids=document_ids)
    assert weights.isfinite().all()
    assert not weights[positions == 0].any()
    if normalization == "sequence":
        assert weights[0].sum() == pytest.approx(10, rel=1e-5)


def test_deepspeed_does_not_round_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings each float of a batch to the model's dtype, so none of ours may stand there."""
    trainer = TemporalWeightTrainer(tiny_model("llama"), TrainingArguments(str(tmp_path), use_cpu=True))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.ones(2, 5, dtype=torch.long)}
    batch |= {"features": torch.rand(2, 5), LOSS_WEIGHTS: torch.rand(2, 5)}
    (collected,), _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    prepared = trainer._prepare_inputs(collected)
    assert prepared["features"].dtype == torch.bfloat16
    assert prepared.keys() == {"input_ids", "labels", "features"}
    assert trainer._temporal_step is not None
    found = trainer._temporal_step.find(prepared["labels"])
    assert found is not None
    torch.testing.assert_close(
        found.weights[:, 1:].sum(), (batch[LOSS_WEIGHTS][:, 1:] * torch.tensor([0.4, 0.8, 1.2, 1.6])).sum()
    )


def test_sharded_weights_keep_the_auxiliary_loss() -> None:
    assert read_model_loss(tiny_model("mixtral"), can_run=False).auxiliary_coefficient == 0.05
    assert read_model_loss(tiny_model("gpt2"), can_run=False).shifts_labels
    assert not read_model_loss(tiny_model("t5"), can_run=False).shifts_labels


TINY_BERT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_classes_are_no_times(tmp_path: Path) -> None:
    """Float labels [batch, classes] of a classifier: its own loss at p = 0, an error at any other."""
    rows = [{"input_ids": [5, 6, 7 + i], "labels": [float(i % 2), 1.0, 0.0, 0.5]} for i in range(4)]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(**TINY_BERT | {"num_labels": 4, "problem_type": "multi_label_classification"})
        )

    losses = []
    for kind in (Trainer, TemporalWeightTrainer):
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, **SETTINGS)
        losses.append(first_loss(kind(model(), args, train_dataset=rows)))
    assert losses[0] == losses[1]
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=1.0, **SETTINGS)
    with pytest.raises(ValueError, match="own loss on float labels that is neither"):
        TemporalWeightTrainer(model(), args, train_dataset=rows).train()


class Tagger(nn.Module):
    """Takes something else than `input_ids`, and aligns its labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(97, 16), nn.Linear(16, 97)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embed(tokens))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_that_cannot_be_run_on_tokens_is_read_on_its_first_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "tokens": torch.randint(97, (6,), generator=generator),
            "labels": torch.randint(97, (6,), generator=generator),
        }
        for _ in range(4)
    ]
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, **SETTINGS)
    loss = first_loss(TemporalWeightTrainer(Tagger(), args, train_dataset=rows))
    weights = torch.arange(1, 7).double() ** 2
    with torch.no_grad():
        logits = Tagger()(torch.stack([row["tokens"] for row in rows]))["logits"].double()
    labels = torch.stack([row["labels"] for row in rows])
    each = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert loss == pytest.approx(float((each * weights * 6 / weights.sum()).mean()), rel=1e-5)


class NeedsLabels(Tagger):
    """Takes its labels as they come, since it is never run without."""

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(tokens, labels)


def test_a_model_that_cannot_be_run_without_labels(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [{key: torch.randint(97, (6,), generator=generator) for key in ("tokens", "labels")} for _ in range(4)]
    losses = []
    for model in (Tagger(), NeedsLabels()):
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, **SETTINGS)
        losses.append(first_loss(TemporalWeightTrainer(model, args, train_dataset=rows)))
    assert losses[0] == losses[1]


class Recognizer(Tagger):
    """More frames than labels, as in speech recognition."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(tokens)["logits"]
        return {"logits": logits} if labels is None else {"loss": logits.square().mean(), "logits": logits}


def test_more_frames_than_labels(tmp_path: Path) -> None:
    rows = [{"tokens": torch.arange(6) + i, "labels": torch.arange(3)} for i in range(4)]
    losses = []
    for kind in (Trainer, TemporalWeightTrainer):
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, **SETTINGS)
        losses.append(first_loss(kind(Recognizer(), args, train_dataset=rows)))
    assert losses[0] == losses[1]
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=1.0, **SETTINGS)
    what = r"Recognizer with logits of shape \(4, 6, 97\) for labels of shape \(4, 3\): there is no loss per time"
    with pytest.raises(ValueError, match=what):
        TemporalWeightTrainer(Recognizer(), args, train_dataset=rows).train()


def test_position_ids_that_count_from_elsewhere_are_left_to_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = TINY_BERT | {"hidden_size": 16, "max_position_embeddings": 64, "num_labels": 5, "pad_token_id": 1}
    model = RobertaForTokenClassification(RobertaConfig(**settings)).eval()
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    trainer = TemporalWeightTrainer(model, args, data_collator=PadCollator(side="left"))
    assert not trainer._new_timeline().takes_position_ids


def test_labels_cut_by_the_collator(tmp_path: Path) -> None:
    def cut(rows: list[Any]) -> dict[str, Tensor]:
        batch = PadCollator()(rows)
        return {**batch, "labels": batch["labels"][:, :-3]}

    for fused in ("on", "off"):
        args = TemporalTrainingArguments(str(tmp_path), temporal_fused_head=fused, **SETTINGS)
        trainer = TemporalWeightTrainer(tiny_model("llama"), args, train_dataset=causal_examples(4), data_collator=cut)
        with pytest.raises(ValueError, match=r"labels have length \d+ and logits \d+; accepted: equal lengths"):
            trainer.train()


class WithoutItems(TemporalWeightTrainer):
    """Collects its batches in a way of its own, and counts nothing."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        del device
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_batches_that_nobody_weighed_are_averaged_over_the_accumulation(tmp_path: Path) -> None:
    rows, losses = [{"input_ids": [5, 6, 7, 8 + i], "labels": [5, 6, 7, 8 + i]} for i in range(4)], []
    for batch_size in (4, 1):
        settings = SETTINGS | {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 4 // batch_size,
        }
        args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, **settings)
        losses.append(
            first_loss(WithoutItems(tiny_model("llama"), args, train_dataset=rows, data_collator=PadCollator()))
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_prompt_tuning(fused: str, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model("llama"), config)
    rows = causal_examples(4)
    batch = PadCollator()(rows)
    with torch.no_grad():
        logits = model.eval()(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.double()[:, 3:]
    log_p, total, count = logits.log_softmax(-1), 0.0, 0
    for row, each in zip(rows, log_p, strict=True):
        targets = [i for i, label in enumerate(row["labels"]) if label != -100 and i > 0]
        raw = [((k + 1) / len(targets)) ** 2 for k in range(len(targets))]
        for w, i in zip(raw, targets, strict=True):
            total -= w * len(raw) / sum(raw) * float(each[i - 1, row["labels"][i]])
        count += len(targets)
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, temporal_fused_head=fused, **SETTINGS)
    trainer = TemporalWeightTrainer(model, args, train_dataset=rows, data_collator=PadCollator())
    assert first_loss(trainer) == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="several documents in a row, which this model does not keep apart"):
        trainer._new_timeline().add({"labels": torch.ones(1, 4), "document_ids": torch.tensor([[0, 0, 1, 1]])})


def test_every_batch_has_the_same_keys() -> None:
    one = CAUSAL.add({"labels": torch.tensor([[3, 4, 5]]), "position_ids": torch.tensor([[0, 1, 2]])})
    two = CAUSAL.add({"labels": torch.tensor([[3, 4, 5]]), "position_ids": torch.tensor([[0, 1, 0]])})
    assert set(one) == set(two)
    collator = TimelineCollator(DataCollatorForSeq2Seq(tokenizer("left")), CAUSAL)
    full = collator([{"input_ids": [3, 4], "attention_mask": [1, 1], "labels": [3, 4]}])
    padded = collator([{"input_ids": [3, 4][:n], "attention_mask": [1] * n, "labels": [3, 4][:n]} for n in (1, 2)])
    assert set(full) == set(padded) >= {"position_ids", "temporal_document_ids"}


def test_document_ids_column_beside_a_padding_collator() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [3, 4, 5], "attention_mask": [1] * 3, "labels": [3, 4, 5], "document_ids": [7, 7, 7]},
        {"input_ids": [3, 4], "attention_mask": [1] * 2, "labels": [3, 4], "document_ids": [2, 2]},
    ]
    for side in ("left", "right"):
        batch = TimelineCollator(DataCollatorForSeq2Seq(tokenizer(side)), CAUSAL)(rows)
        assert not batch["temporal_document_ids"].any()
    rows[0]["document_ids"] = [7, 8, 8]
    with pytest.raises(ValueError, match="several documents in a row: attention would cross documents"):
        TimelineCollator(DataCollatorForSeq2Seq(tokenizer("right")), CAUSAL)(rows)


def test_loss_weights_without_labels() -> None:
    rows = [{"input_ids": [3, 4], "attention_mask": [1, 1], "loss_weights": [1.0, 1.0]}]
    assert "loss_weights" not in TimelineCollator(DataCollatorForSeq2Seq(tokenizer("right")), CAUSAL)(rows)


def test_loss_weights_are_never_ignored(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**TINY_BERT))
    rows = [{"input_ids": [5, 6], "labels": i % 2, "loss_weights": [0.0, 0.0]} for i in range(4)]
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, **SETTINGS)
    with pytest.raises(ValueError, match="Accepted: power=0 without loss_weights"):
        TemporalWeightTrainer(model, args, train_dataset=rows).train()


def test_labels_of_another_type_are_named(tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=1.0, **SETTINGS)
    model = tiny_model("llama").train()
    trainer = TemporalWeightTrainer(model, args)
    with pytest.raises(ValueError, match="with labels of type ndarray"):
        trainer.compute_loss(model, {"labels": torch.ones(2, 3).numpy()})


def test_numbers_that_yaml_reads_as_strings(tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), temporal_power_start="5e-1")  # type: ignore[arg-type]
    assert args.temporal_power_start == 0.5
    with pytest.raises(ValueError, match="temporal_power_warmup_ratio='half' is not a number"):
        TemporalTrainingArguments(str(tmp_path), temporal_power_warmup_ratio="half")  # type: ignore[arg-type]


def test_another_origin_is_not_read_from_kept_loaders(tmp_path: Path) -> None:
    rows = causal_examples(4)
    losses = []
    for origins in (("sequence",), ("target", "sequence")):
        args = TemporalTrainingArguments(
            str(tmp_path), temporal_power=2.0, dataloader_num_workers=1, dataloader_persistent_workers=True, **SETTINGS
        )
        trainer = TemporalWeightTrainer(tiny_model("llama"), args, eval_dataset=rows, data_collator=PadCollator())
        for origin in origins:
            args.temporal_origin = origin
            metrics = trainer.evaluate()
        losses.append(metrics["eval_temporal_loss"])
    assert math.isfinite(losses[0])
    assert losses[0] == losses[1]

"""The mixin in front of trainers whose batches, counts and scales are their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from hf_temporal import TemporalWeighting, TemporalWeightTrainer
from tests.test_mixin import POWERS, ROWS, numbers, reference, run, weighted
from tests.tiny_models import PadCollator

# ---- batches and counts of one's own


class Masking(Trainer):
    """Every second target is no target, in the labels themselves or in a copy."""

    in_place = True

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            if not self.in_place:
                batch["labels"] = batch["labels"].clone()
            batch["labels"][:, ::2] = -100
        return batches, self._get_num_items_in_batch(batches, device)


class MaskingCopies(Masking):
    in_place = False


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kind", [Masking, MaskingCopies])
def test_labels_changed_in_own_batch_samples(kind: Any, power: float, tmp_path: Path) -> None:
    def masked(labels: list[int]) -> list[int]:
        return [-100 if i % 2 == 0 else label for i, label in enumerate(labels)]

    ours = run(weighted(kind), tmp_path, power=power)
    assert ours[0]["loss"] == pytest.approx(reference(power, labels_of=masked), rel=1e-6)


class MaskingInLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["labels"][:, ::2] = -100
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_labels_changed_in_own_compute_loss_are_weighted_anew(tmp_path: Path) -> None:
    """The items stay those that were counted before."""
    ours = run(weighted(MaskingInLoss), tmp_path, power=2.0)
    kept = [[label if i % 2 else -100 for i, label in enumerate(row["labels"])] for row in ROWS[:4]]
    count = sum(sum(label != -100 for label in row["labels"][1:]) for row in ROWS[:4])
    share = sum(sum(label != -100 for label in labels[1:]) for labels in kept) / count
    masked = reference(2.0, labels_of=lambda labels: [x if i % 2 else -100 for i, x in enumerate(labels)])
    assert ours[0]["loss"] == pytest.approx(masked * share, rel=1e-6)


class TwiceTheItems(Trainer):
    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        return None if items is None else 2 * items


class TwiceInFront(TemporalWeightTrainer):
    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return 2 * super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[operator]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kind", [weighted(TwiceTheItems), TwiceInFront])
def test_an_own_count_of_items(kind: Any, power: float, tmp_path: Path) -> None:
    assert run(kind, tmp_path, power=power)[0]["loss"] == pytest.approx(reference(power) / 2, rel=1e-6)


def test_an_own_count_beside_another_normalization(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts the items of a batch itself.*normalization='batch'"):
        run(weighted(TwiceTheItems), tmp_path, weighting=TemporalWeighting(2.0, normalization="batch"))


class Lists(Trainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(PadCollator()(inputs) if isinstance(inputs, list) else inputs)


class WithoutTensors(Trainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(PadCollator()(inputs["rows"]) if "rows" in inputs else inputs)


@pytest.mark.parametrize(
    ("kind", "collate"), [(Lists, lambda rows: rows), (WithoutTensors, lambda rows: {"rows": rows})]
)
def test_batches_that_hold_no_tensors(kind: Any, collate: Any, tmp_path: Path) -> None:
    ours = run(weighted(kind), tmp_path, power=0.0, data_collator=collate)
    assert numbers(ours) == pytest.approx(numbers(run(kind, tmp_path, data_collator=collate)), rel=1e-6)
    with pytest.raises(ValueError, match="there is no loss per time to weight"):
        run(weighted(kind), tmp_path, power=2.0, data_collator=collate)


class Counting(PadCollator):
    tokens_seen = 0


class ReadsItsCollator(Trainer):
    def get_train_dataloader(self) -> Any:
        collator: Any = self.data_collator
        assert collator.tokens_seen == 0
        collator.tokens_seen = 1
        return super().get_train_dataloader()


def test_a_trainer_that_asks_its_collator(tmp_path: Path) -> None:
    collator = Counting()
    ours = run(weighted(ReadsItsCollator), tmp_path, power=2.0, data_collator=collator)
    assert ours[0]["loss"] == pytest.approx(reference(2.0), rel=1e-6)
    assert collator.tokens_seen == 1


# ---- the trainer's own scale


class Summed(Trainer):
    loss_is_scaled_for_ga: bool | None = True

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = F.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / 4
        return (loss, outputs) if return_outputs else loss


class Averaged(Summed):
    loss_is_scaled_for_ga = False


@pytest.mark.parametrize("kind", [Summed, Averaged])
def test_the_trainers_own_scale_of_a_classifier(kind: Any, tmp_path: Path) -> None:
    def own() -> dict[str, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0,
        )  # fmt: skip
        config.num_labels = 3
        rows = [{**row, "labels": i % 3} for i, row in enumerate(ROWS)]
        return {"model": LlamaForSequenceClassification(config), "train_dataset": rows, "data_collator": collate}

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        batch = PadCollator()([{**row, "labels": [0] * len(row["input_ids"])} for row in rows])
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    ours = run(weighted(kind), tmp_path, power=0.0, **own())
    assert numbers(ours) == pytest.approx(numbers(run(kind, tmp_path, **own())), rel=1e-6)


class SaysItIsScaled(Trainer):
    loss_is_scaled_for_ga = True


class SaysItIsAMean(Trainer):
    loss_is_scaled_for_ga = False


@pytest.mark.parametrize("kind", [SaysItIsScaled, SaysItIsAMean])
@pytest.mark.parametrize("power", POWERS)
def test_nothing_of_the_trainers_scale_is_overwritten(kind: Any, power: float, tmp_path: Path) -> None:
    """The factor of a trainer that divides what is divided already stays its own."""
    assert weighted(kind).loss_is_scaled_for_ga is kind.loss_is_scaled_for_ga
    factor = run(kind, tmp_path)[0]["loss"] / reference(0.0)
    assert run(weighted(kind), tmp_path, power=power)[0]["loss"] == pytest.approx(reference(power) * factor, rel=1e-6)

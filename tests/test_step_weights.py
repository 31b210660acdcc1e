"""An optimizer step's weights: made once for all its micro-batches, in place of the trainer's own item count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightTrainer
from hf_temporal.collator import POSITIONS, TARGETS
from hf_temporal.step_weights import weigh_batches
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
POSITIONS_OF_TWO = ([[0, 1, 2, 3]], [[1, 2, 0, 0]])


def batches() -> list[dict[str, Tensor]]:
    return [
        {"labels": torch.tensor(rows) - 1, POSITIONS: torch.tensor(rows), TARGETS: torch.arange(2)}
        for rows in POSITIONS_OF_TWO
    ]


@pytest.mark.parametrize(
    ("normalization", "denominator", "weights"),
    [("sequence", 5.0, [0.5, 1.0, 1.5]), ("batch", 9.0, [1.0, 2.0, 3.0]), ("tokens", 5.0, [1.0, 2.0, 3.0])],
)
def test_a_step_by_hand(normalization: str, denominator: float, weights: list[float]) -> None:
    """Two documents of three and two target tokens, p = 1."""
    weighting = TemporalWeighting(power=1.0, normalization=normalization)
    step = weigh_batches(batches(), weighting, gather=None, device=CPU)
    scale = 3.0 if normalization == "batch" else 1.0  # under "batch" up to one factor common to the step
    assert (step.weighted[0].weights * scale).tolist() == [[0.0, *weights]]
    assert step.denominator.item() * scale == pytest.approx(denominator)
    assert step.power == 1.0
    w = [*step.weighted[0].weights[0, 1:].tolist(), *step.weighted[1].weights[0, :2].tolist()]
    assert step.effective_sample_size.item() == pytest.approx(sum(w) ** 2 / sum(x * x for x in w) / 5)
    assert all(batch.keys() == {"labels"} for batch in step.batches)


@pytest.mark.parametrize(
    ("weighting", "kept"),
    [
        (TemporalWeighting(power=16.0), True),
        (TemporalWeighting(power=-17.0), False),
        (TemporalWeighting(power=math.inf), False),
        (TemporalWeighting(weight_fn=lambda t, T: (t == T).to(t.dtype)), False),
    ],
)
def test_targets_are_listed_where_no_weight_is_zero(weighting: TemporalWeighting, kept: bool) -> None:
    step = weigh_batches(batches(), weighting, gather=None, device=CPU)
    assert [each.targets is not None for each in step.weighted] == [kept, kept]


@pytest.mark.parametrize("power", [2.0, 0.0])
def test_the_trainers_own_items_are_not_counted(power: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several ranks each count would be gathered, and thrown away for D."""
    own, calls = Trainer._get_num_items_in_batch, []

    def recorded(self: Any, batch_samples: list[Any], device: torch.device) -> Any:
        calls.append(len(batch_samples))
        return own(self, batch_samples, device)

    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", recorded)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    args = TemporalTrainingArguments(
        str(tmp_path), temporal_power=power, max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    TemporalWeightTrainer(tiny_model("llama"), args, train_dataset=rows).train()
    assert not calls


def test_items_are_counted_where_there_is_nothing_to_weight(tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=0.0, report_to="none", use_cpu=True)
    trainer = TemporalWeightTrainer(tiny_model("llama"), args)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2)}
    batches, items = trainer.get_batch_samples(iter([batch]), 1, CPU)
    assert batches[0] is batch
    assert items is not None


def test_copies_of_labels_are_found_and_changed_ones_are_not() -> None:
    """NaN marks float labels without a target; a device other than that of the batch makes copies."""
    whole, floats = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.5, math.nan, 1.0, 2.0]])
    times = torch.tensor([[0, 1, 2, 3]])
    rows: list[Any] = [{"labels": labels, POSITIONS: times.clone()} for labels in (whole, floats)]
    step = weigh_batches(rows, TemporalWeighting(power=1.0), gather=None, device=CPU)
    for labels, weighted in zip((whole, floats), step.weighted, strict=True):
        assert step.find(labels) is step.find(labels.clone()) is weighted
        assert step.find(labels + 1) is None
    whole[0, 3] = -100
    assert step.find(whole) is None


def test_copies_of_labels_with_two_kinds_of_weights() -> None:
    labels = torch.tensor([[5, 6, 7]])
    rows: list[Any] = [{"labels": labels.clone(), POSITIONS: torch.tensor([t])} for t in ([0, 1, 2], [1, 2, 3])]
    first, _ = kept = [row["labels"] for row in rows]
    step = weigh_batches(rows, TemporalWeighting(power=1.0), gather=None, device=CPU)
    assert [step.find(each) for each in kept] == step.weighted
    with pytest.raises(ValueError, match="the same labels and other weights, and the labels were copied"):
        step.find(first.clone())

"""What each p would do, told before training, against counting by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightTrainer, suggest_power
from hf_temporal.suggest import PowerReport
from tests.tiny_models import PadCollator, examples, tiny_model
from tests.tiny_training import token_losses

SETTINGS: dict[str, Any] = {
    "per_device_eval_batch_size": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def trainer_of(name: str, tmp_path: Path, *, collator: Any = None, rows: Any = None, **more: Any) -> Any:
    return TemporalWeightTrainer(
        tiny_model(name),
        TemporalTrainingArguments(str(tmp_path), **SETTINGS, **more),
        train_dataset=examples(name, 8) if rows is None else rows,
        data_collator=collator or PadCollator(),
    )


def share(values: list[list[float]], part: int, parts: int) -> float:
    """Of the part-th of `parts` in the sum of all values."""
    chosen = [
        value
        for row in values
        for rank, value in enumerate(row, start=1)
        if math.ceil(parts * rank / len(row)) - 1 == part
    ]
    return sum(chosen) / sum(map(sum, values))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_against_counting_by_hand(name: str, normalization: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, temporal_normalization=normalization)
    report = suggest_power(trainer, powers=(2.0, math.inf), max_examples=7)
    rows = [losses for losses, _ in token_losses(trainer.model.eval(), examples(name, 8)[:7])]
    lengths = sorted(map(len, rows))
    longest = lengths[-1]
    assert report.documents == 7
    assert report.lengths == (lengths[0], lengths[3], lengths[-1])
    assert report.first_token_loss == pytest.approx(sum(row[0] for row in rows) / 7, rel=1e-5)
    assert report.last_token_loss == pytest.approx(sum(row[-1] for row in rows) / 7, rel=1e-5)
    assert report.loss_quarters == pytest.approx([share(rows, part, 4) for part in range(4)], rel=1e-5)
    assert report.loss_deciles == pytest.approx([share(rows, part, 10) for part in range(10)], rel=1e-5)
    assert [effect.power for effect in report.effects] == [0, 2, math.inf]
    for effect in report.effects:
        weights = []
        for row in rows:
            n = len(row)
            if math.isinf(effect.power):
                reference = n if normalization == "sequence" else longest
                own = [float(t == reference) for t in range(1, n + 1)]
            else:
                own = [t**effect.power for t in range(1, n + 1)]
            weights.append([w * n / sum(own) for w in own] if normalization == "sequence" else own)
        flat = [w for row in weights for w in row]
        total = sum(flat)
        assert effect.effective_sample_size == pytest.approx(total**2 / sum(w * w for w in flat) / len(flat), rel=1e-5)
        assert effect.first_token == pytest.approx(sum(row[0] for row in weights) / total, rel=1e-5)
        assert effect.last_token == pytest.approx(sum(row[-1] for row in weights) / total, rel=1e-5)
        assert effect.quarters == pytest.approx([share(weights, part, 4) for part in range(4)], rel=1e-5)
        assert effect.deciles == pytest.approx([share(weights, part, 10) for part in range(10)], rel=1e-5)
        losses = [w * loss for ws, ls in zip(weights, rows, strict=True) for w, loss in zip(ws, ls, strict=True)]
        assert effect.loss == pytest.approx(sum(losses) / total, rel=1e-5)


def test_packed_rows_and_own_weights_say_the_same_as_padded_ones(tmp_path: Path) -> None:
    rows = [dict(row, loss_weights=[0.5 + (i % 3) for i in range(len(row["labels"]))]) for row in examples("llama", 6)]
    padded = suggest_power(trainer_of("llama", tmp_path, rows=rows))
    packed = suggest_power(trainer_of("llama", tmp_path, rows=rows, collator=DataCollatorWithFlattening()))
    plain = suggest_power(trainer_of("llama", tmp_path, rows=examples("llama", 6)))
    for one, other in zip(padded.effects, packed.effects, strict=True):
        assert one.quarters == pytest.approx(other.quarters, rel=1e-4)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert padded.lengths == packed.lengths == plain.lengths
    assert padded.effects[0].effective_sample_size < 0.99 < plain.effects[0].effective_sample_size


def test_nothing_is_changed(tmp_path: Path) -> None:
    trainer = trainer_of("llama", tmp_path / "out")
    trainer.model.train()
    frozen = trainer.model.model.layers[0].eval()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    suggest_power(trainer)
    assert trainer.model.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer._temporal_observer is None
    assert not (tmp_path / "out" / "loss_by_position.json").exists()


def test_the_report_says_what_counts_and_draws_it(tmp_path: Path) -> None:
    report = suggest_power(trainer_of("llama", tmp_path))
    text = str(report)
    table = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "share of the loss", *(f"weight at p = {power}" for power in ("0", "0.5", "1", "2", "4", "10")),
    ]  # fmt: skip
    effect = report.effects[-2]
    assert f"the last token alone has {effect.last_token:.0%} of the weight" in text
    assert f"A batch is worth {effect.effective_sample_size:.0%} of its tokens." in text
    assert "p = 0:" not in text
    lines = {float(line.split(":")[0].split()[-1]): line for line in report.words()[1:]}
    for each in report.effects[1:]:
        first = each.quarters[0] / report.usual.quarters[0]
        assert f"the first quarter counts {first:.2g} times" in lines[each.power]
        assert ("hardly trained" in lines[each.power]) == (first < 0.1)
        assert ("stops too early" in lines[each.power]) == (each.last_token >= 0.15)
    assert "hardly trained" not in lines[0.5]
    assert "hardly trained" in lines[10]
    worst = dataclasses.replace(report, first_token_loss=2.01 * report.usual.loss)
    mild = dataclasses.replace(report, first_token_loss=1.99 * report.usual.loss)
    assert ["worst at the first token" in each.words()[0] for each in (worst, mild)] == [True, False]
    report.plot(tmp_path / "made" / "powers.png")
    assert (tmp_path / "made" / "powers.png").read_bytes().startswith(b"\x89PNG")


def test_an_iterable_data_set_and_one_of_its_own(tmp_path: Path) -> None:
    rows = examples("llama", 8)
    own = suggest_power(trainer_of("llama", tmp_path, rows=rows[:2]), (row for row in rows), max_examples=5)
    assert own == suggest_power(trainer_of("llama", tmp_path, rows=rows[:5]))
    assert isinstance(own, PowerReport)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_examples": 0}, "max_examples=0; accepted: a whole number of at least 1"),
        ({"powers": (math.nan,)}, "power=nan is out of range"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_power(trainer_of("llama", tmp_path), **given)


def test_data_without_targets_are_named(tmp_path: Path) -> None:
    rows = [dict(row, labels=[-100] * len(row["labels"])) for row in examples("llama", 2)]
    with pytest.raises(ValueError, match="no target token in what was looked at"):
        suggest_power(trainer_of("llama", tmp_path, rows=rows))
    trainer = trainer_of("llama", tmp_path)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="dataset=None, and the trainer has no train_dataset"):
        suggest_power(trainer)


def test_the_weighting_of_the_trainer_counts(tmp_path: Path) -> None:
    trainer = trainer_of("llama", tmp_path, temporal_origin="sequence")
    given = TemporalWeightTrainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=PadCollator(),
        weighting=TemporalWeighting(origin="target"),
    )
    late, early = (suggest_power(each).effects[-1] for each in (trainer, given))
    assert late.first_token > early.first_token  # a prompt comes before: t of the first target is not 1


def test_targets_of_one_token_have_no_first_quarter(tmp_path: Path) -> None:
    rows = [dict(row, labels=[-100] * (len(row["labels"]) - 1) + row["labels"][-1:]) for row in examples("llama", 3)]
    report = suggest_power(trainer_of("llama", tmp_path, rows=rows))
    assert report.lengths == (1, 1, 1)
    assert all(effect.quarters == (0, 0, 0, 1) for effect in report.effects)
    assert "the first quarter counts 1 times" in str(report)

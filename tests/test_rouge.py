"""The ROUGE metric that lies in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate
import pytest

import hf_temporal.tasks

FOLDER = Path(hf_temporal.tasks.__file__).parent / "metrics" / "rouge"


@pytest.fixture(scope="module")
def rouge() -> Any:
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def test_scores_counted_by_hand(rouge: Any) -> None:
    scores = rouge.compute(predictions=["the cat sat here"], references=["the black cat sat"])
    assert scores["rouge1"] == pytest.approx(3 / 4)  # the, cat, sat
    assert scores["rouge2"] == pytest.approx(1 / 3)  # cat sat
    assert scores["rougeL"] == pytest.approx(3 / 4)  # the … cat sat


def test_mean_over_examples_and_the_same_text_scores_one(rouge: Any) -> None:
    scores = rouge.compute(predictions=["a cat sat", "dogs"], references=["a cat sat", "trees grow"])
    assert scores["rouge1"] == pytest.approx(0.5)
    assert scores["rougeL"] == pytest.approx(0.5)


def test_stemmer_is_a_choice(rouge: Any) -> None:
    texts = {"predictions": ["reading files"], "references": ["reads file"]}
    assert rouge.compute(**texts)["rouge1"] == 1
    assert rouge.compute(**texts, use_stemmer=False)["rouge1"] == 0


def test_lsum_matches_line_by_line(rouge: Any) -> None:
    scores = rouge.compute(predictions=["b c\na d"], references=["a d\nb c"])
    assert scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(0.5)


def test_intervals_hold_the_mean_narrow_with_more_examples_and_repeat(rouge: Any) -> None:
    texts = {"predictions": ["a b", "c d", "e f", "a z"], "references": ["a b", "c x", "y z", "a b"]}
    few, many = rouge.compute(**texts), rouge.compute(**{name: values * 25 for name, values in texts.items()})
    for scores in (few, many):
        assert 0 <= scores["rouge1_low"] < scores["rouge1"] < scores["rouge1_high"] <= 1
    assert many["rouge1_high"] - many["rouge1_low"] < (few["rouge1_high"] - few["rouge1_low"]) / 3
    assert rouge.compute(**texts) == few

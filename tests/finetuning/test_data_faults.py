"""Data files of which a part has no effect: it is told, and rows that teach nothing are left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.data.language_modeling import LanguageModelingArguments
from hf_temporal.data.loading import DataArguments
from hf_temporal.finetuning.tasks import LanguageModeling
from tests.tiny_summarization import tiny_llama, tiny_tokenizer


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; transformers' loggers do not hand on to the root."""
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_temporal")]
    for each in loggers:
        each.addHandler(caplog.handler)
    yield caplog
    for each in loggers:
        each.removeHandler(caplog.handler)


def encoded(path: Path, rows: list[dict[str, Any]], *patterns: str, streaming: bool = False) -> list[list[int]]:
    """The labels of what is trained on."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = LanguageModelingArguments(weight_pattern=[*patterns])
    task = LanguageModeling(DataArguments(train_file=str(path), streaming=streaming), arguments, text_column=None)
    tokenizer = tiny_tokenizer()
    (examples,) = task.encode(tokenizer, tiny_llama(len(tokenizer)).config).values()
    return [row["labels"] for row in examples]


def test_rows_whose_targets_nothing_predicts_or_weighs_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5], "loss_weights": [1]},
        {"input_ids": [5, 6], "loss_weights": [1, 0]},
        {"input_ids": [5, 6], "loss_weights": [0, 1]},
    ]
    assert encoded(tmp_path / "train.jsonl", rows) == [[5, 6]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_that_matches_nothing_is_told(
    tmp_path: Path, said: pytest.LogCaptureFixture, streaming: bool
) -> None:
    messages = [{"role": "user", "content": "Nothing?"}, {"role": "assistant", "content": "In file 1."}]
    encoded(tmp_path / "train.jsonl", [{"messages": messages}], "file=2", "(N)othing=3", "x*=4", streaming=streaming)
    told = {record.message for record in said.records if "matches nothing" in record.message}
    nothing = "matches nothing in the first 1 texts that are learned."
    assert told == {f"weight_pattern '(N)othing' {nothing}", f"weight_pattern 'x*' {nothing}"}


def test_columns_that_are_not_read_are_told(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    encoded(tmp_path / "train.jsonl", [{"instruction": "Do.", "output": "Done.", "history": [], "weight": 2}])
    assert "train: instruction, output are read; not read: history, weight." in said.text
    said.clear()
    encoded(tmp_path / "all.jsonl", [{"instruction": "Do.", "output": "Done."}])
    assert "not read" not in said.text

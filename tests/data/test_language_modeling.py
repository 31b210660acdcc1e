"""Plain text, prompt and completion, chat messages: which tokens are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hf_temporal.data.language_modeling import LanguageModelingArguments, encode_for_causal_lm, load_texts
from hf_temporal.data.loading import DataArguments
from tests.tiny_summarization import tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where is x1?"},
    {"role": "assistant", "content": "In file 1."},
    {"role": "user", "content": "And x2?"},
    {"role": "assistant", "content": "In file 2."},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def encode(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, size: int = 200) -> list[dict[str, Any]]:
    columns = encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(block_size=size))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def learned(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of targets, as texts; each label is the token at its place."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        runs += [[]] if label == -100 else []
        runs[-1] += [] if label == -100 else [label]
    return [str(tokenizer.decode(run)) for run in runs if run]


def write(path: Path, *rows: dict[str, Any]) -> DataArguments:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataArguments(train_file=str(path))


def test_every_token_of_a_text_is_learned_and_long_ones_are_cut_into_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The value of x1 is taken from file 1 of the folder."
    (row,) = encode({"text": [text]}, tokenizer)
    assert learned(row, tokenizer) == [f"{text}<end>"]
    rows = encode({"text": [text, "So be it."]}, tokenizer, size=4)
    assert max(len(each["input_ids"]) for each in rows) == 4
    whole = [token for each in rows for token in each["input_ids"]]
    assert tokenizer.decode(whole) == f"{text}<end>So be it.<end>"


def test_only_the_completion_and_its_end_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode({"prompt": ["Where is x1?"], "completion": [" In file 1."]}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "Where is x1? In file 1.<end>"
    assert learned(row, tokenizer) == [" In file 1.<end>"]


def test_of_a_chat_the_assistant_is_learned_with_the_end_of_each_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode({"messages": [MESSAGES]}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert learned(row, tokenizer) == ["In file 1.<end>", "In file 2.<end>"]


def test_what_a_template_puts_behind_the_end_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace("'<end>'", "'<end>\n'")
    (row,) = encode({"messages": [MESSAGES]}, tokenizer)
    assert learned(row, tokenizer) == ["In file 1.<end>", "In file 2.<end>"]


def test_a_chat_is_tokenized_as_it_is_when_the_model_has_to_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode({"messages": [MESSAGES]}, tokenizer)
    rendered = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) == {-100}
    assert row["labels"][len(prompt)] != -100


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="renders earlier turns anew"):
        encode({"messages": [MESSAGES]}, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode({"messages": [MESSAGES]}, tokenizer)


def test_rows_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode({"messages": [MESSAGES]}, tokenizer, size=10)
    assert [len(values) for values in row.values()] == [10, 10, 10]


@pytest.mark.parametrize(
    ("row", "column", "names"),
    [
        ({"text": "a", "prompt": "b"}, None, ["text"]),
        ({"id": 1, "prompt": "a", "completion": "b"}, None, ["prompt", "completion"]),
        ({"text": "a", "messages": MESSAGES}, None, ["messages"]),
        ({"text": "a", "story": "b"}, "story", ["text"]),
    ],
)
def test_columns_tell_what_the_data_are(
    tmp_path: Path, row: dict[str, Any], column: str | None, names: list[str]
) -> None:
    examples = load_texts(write(tmp_path / "train.jsonl", row), column).splits["train"]
    assert examples.column_names == names
    if column:
        assert examples["text"][:] == [row[column]]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", {"story": "a", "id": 1})
    with pytest.raises(ValueError, match=r"the data have the columns story, id; accepted: messages; .*--text_column"):
        load_texts(data)
    with pytest.raises(ValueError, match=r"text_column='tale' is no column of the train data; accepted: story, id"):
        load_texts(data, "tale")


def test_bad_block_size_is_named() -> None:
    with pytest.raises(ValueError, match="block_size=1"):
        LanguageModelingArguments(block_size=1)

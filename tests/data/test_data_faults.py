"""Data files with something wrong or unusual in them: read as they stand there, or refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_temporal.data.language_modeling import (
    LanguageModelingArguments,
    brings_weights,
    encode_for_causal_lm,
    load_texts,
)
from hf_temporal.data.loading import DataArguments
from hf_temporal.data.weights import Pattern, spread
from tests.tiny_summarization import tiny_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson + '<end>' }}{% endif %}{% for m in messages %}{{ m.role + ':' }}"
    "{{ m.content if m.content else m.tool_calls | tojson }}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
QUESTION = {"role": "user", "content": "Where is x1?"}
ANSWER = {"role": "assistant", "content": "In file 1."}


def encode(batch: dict[str, list[Any]], template: str | None = None, **settings: Any) -> dict[str, list[Any]]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(**settings))


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_pattern_weighs_a_token_once_and_an_empty_match_none() -> None:
    text, spans = "It is 12.", [(0, 2), (2, 5), (5, 8), (8, 9), (8, 9), (9, 9)]
    assert spread(text, spans, 1.0, [Pattern.parse(r"\d=3")]) == [1, 1, 3, 1, 1, 1]
    assert spread(text, spans, 1.0, [Pattern.parse(r"((It) is)=3")]) == [3, 3, 1, 1, 1, 1]
    assert spread(text, spans, 1.0, [Pattern.parse(r"x*=3")]) == [1] * 6
    assert spread(text, spans, 2.0, [Pattern.parse(r"\d=3"), Pattern.parse(r"12|\.=5")]) == [2, 2, 30, 10, 10, 2]


def test_cells_of_a_csv_file_are_the_texts_that_stand_there(tmp_path: Path) -> None:
    rows = 10_002  # pandas reads 10,000 at a time
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\nq,text\n" + "1.50,007\n" * rows, encoding="utf-8")
    texts = load_texts(DataArguments(train_file=str(path))).splits["train"]
    assert {*texts["completion"][1:]} == {"007"}
    assert texts[rows] == {"prompt": "1.50", "completion": "007"}
    stream = load_texts(DataArguments(train_file=str(path), streaming=True)).splits["train"]
    assert {row["completion"] for row in stream} == {"007", "text"}


def test_each_split_has_its_own_columns_beside_those_of_the_form(tmp_path: Path) -> None:
    plain = {"messages": [QUESTION, ANSWER]}
    more = {**plain, "tools": [{"name": "f"}], "loss_weights": 2.0}
    few, many = write(tmp_path / "few.jsonl", plain), write(tmp_path / "many.jsonl", more)
    for train, validation in ((few, many), (many, few)):
        splits = load_texts(DataArguments(train_file=train, validation_file=validation)).splits
        names = {split: {*examples.column_names} for split, examples in splits.items()}
        assert names["train" if train == many else "validation"] == {"messages", "tools", "loss_weights"}
        assert names["validation" if train == many else "train"] == {"messages"}
    text = write(tmp_path / "text.jsonl", {"text": "A text."})
    with pytest.raises(ValueError, match="column='messages' is no column of the validation data; accepted: text"):
        load_texts(DataArguments(train_file=few, validation_file=text))
    wrong = write(tmp_path / "wrong.jsonl", {"instruction": "Do.", "input": ["a", "list"], "output": "Done."})
    with pytest.raises(ValueError, match="column='input' of the train data holds"):
        load_texts(DataArguments(train_file=wrong))


def test_a_weight_is_found_in_a_cell_of_json(tmp_path: Path) -> None:
    cells = [json.dumps([QUESTION, ANSWER]), json.dumps([QUESTION, {**ANSWER, "weight": 2}])]
    for cell, weighted in zip(cells, (False, True), strict=True):
        path = write(tmp_path / f"{weighted}.jsonl", {"messages": cell})
        examples = load_texts(DataArguments(train_file=path)).splits["train"]
        assert brings_weights(examples, LanguageModelingArguments()) is weighted


def test_a_call_of_sharegpt_has_its_weight() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    asked, result = {"from": "human", "value": "Call f."}, {"from": "observation", "value": "7"}
    rows = encode({"conversations": [[asked, {**call, "weight": 3}, result]]}, TOOLS_TEMPLATE)
    assert {*rows["loss_weights"][0]} == {0, 3}
    for value in ("5", None):
        with pytest.raises(ValueError, match=r"row 0 of the data, message 1 is .*accepted: a call with name and ar"):
            encode({"conversations": [[asked, {"role": "function_call", "content": value}]]}, TOOLS_TEMPLATE)


def test_tokens_that_padding_hides_are_no_part_of_a_row() -> None:
    batch: dict[str, list[Any]] = {
        "input_ids": [[0, 0, 5, 6]],
        "labels": [[-100, -100, 5, 6]],
        "attention_mask": [[False, False, True, True]],
    }
    rows = encode({**batch, "loss_weights": [[9, 9, 1, 2]]})
    assert rows["input_ids"] == rows["labels"] == [[5, 6]]
    assert rows["loss_weights"] == [[1, 2]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2]], "labels": [None]}, "labels of row 0 of the data is None; accepted: a list of int"),
        ({"input_ids": [[1, 2]], "labels": [[1, None]]}, r"labels of row 0 of the data is \[1, None\]; accepted"),
        ({"input_ids": [[1.5, 2.0]]}, r"input_ids of row 0 of the data is \[1.5, 2.0\]; accepted: a list of integers"),
        ({"input_ids": ["1 2"]}, "input_ids of row 0 of the data is 1 2; accepted: a list of integers"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask of row 0 of the data are 1; accepted: 2"),
        ({"input_ids": [[1, 2]], "loss_weights": ["[1,"]}, "loss_weights of row 0 of the data is '.1,', which is no"),
        (
            {"prompt": [[QUESTION, {**ANSWER, "weight": 3}, QUESTION]], "completion": [[ANSWER]]},
            "message 1, of the role assistant, is 3.0; accepted: 0 or 1 there",
        ),
        (
            {"conversations": [[{"from": "system", "value": "S"}, QUESTION, ANSWER]], "system": ["T"]},
            "system and conversations of row 0 of the data both hold a system message; accepted: one of them",
        ),
        (
            {"messages": [[QUESTION, ANSWER]], "chat_template_kwargs": [{"add_generation_prompt": False}]},
            "chat_template_kwargs for the messages of row 0 of the data hold add_generation_prompt",
        ),
    ],
)
def test_what_is_wrong_is_named_by_row(batch: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(batch)


def test_no_tools_in_json_are_none() -> None:
    rows = encode({"messages": [[QUESTION, ANSWER]], "tools": ["[]"]})
    assert rows == encode({"messages": [[QUESTION, ANSWER]]})


HERMES = TOOLS_TEMPLATE.replace("m.tool_calls", "m.tool_calls[0].function")
CALLED = {"name": "f", "arguments": {"place": "Paris", "days": [1, 2]}}


def calling(calls: Any, template: str) -> str:
    """The answer that is learned of a message that calls."""
    rows = encode({"messages": [[QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]]}, template)
    return str(tiny_tokenizer().decode([label for label in rows["labels"][0] if label != -100]))


@pytest.mark.parametrize("in_json", [False, True])
def test_arguments_of_calls_are_given_as_the_template_reads_them(in_json: bool) -> None:
    arguments = json.dumps(CALLED["arguments"]) if in_json else CALLED["arguments"]
    calls: Any = [{"type": "function", "function": {**CALLED, "arguments": arguments}}]
    learned = json.dumps(CALLED["arguments"])
    assert calling(calls, HERMES) == f'{{"name": "f", "arguments": {learned}}}<end>'
    takes_json = HERMES.replace("function | tojson", "function.name + m.tool_calls[0].function.arguments")
    assert calling(calls, takes_json) == f"f{learned}<end>"
    given = "m.tool_calls[0].function.arguments"
    takes_both = TOOLS_TEMPLATE.replace(
        "m.tool_calls | tojson",
        f"m.tool_calls[0].function.name + ({given} if {given} is string else {given} | tojson)",
    )
    assert calling(calls, takes_both) == f"f{learned}<end>"
    assert calling(json.dumps(calls), HERMES) == calling(calls, HERMES)


def test_calls_that_are_none_or_that_the_template_leaves_out_are_refused() -> None:
    wrong = [{"function": {"name": "f", "arguments": "place=Paris"}}]
    with pytest.raises(ValueError, match=r"message 1 has a tool call with the arguments 'place=Paris', of which the"):
        calling(wrong, HERMES)
    with pytest.raises(ValueError, match=r"tool_calls hold 'f\(\)'; accepted: a list of mappings, or its JSON"):
        calling("f()", HERMES)
    two = [{"function": {"name": "f", "arguments": {"place": place}}} for place in ("Paris", "Rome")]
    with pytest.raises(ValueError, match=r"the chat template leaves out its tool_calls \('Rome'\)"):
        calling(two, HERMES)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="older releases refuse a column of two types by themselves")
def test_a_stream_may_hold_texts_and_parts(tmp_path: Path) -> None:
    parts = {**QUESTION, "content": [{"type": "text", "text": "Where is x1?"}]}
    path = write(tmp_path / "train.jsonl", {"messages": [QUESTION, ANSWER]}, {"messages": [parts, ANSWER]})
    (examples,) = load_texts(DataArguments(train_file=path, streaming=True)).splits.values()
    one, other = encode({"messages": [row["messages"] for row in examples]})["input_ids"]
    assert one == other


@pytest.mark.parametrize("nothing", ["m['content'] == ''", "not m['content']"])
def test_a_call_without_content_is_one_for_every_template(nothing: str) -> None:
    template = HERMES.replace("m.content if m.content else", "'' + m['content'] if not ({nothing}) else")
    template = template.replace("{nothing}", nothing)
    for content in ({}, {"content": None}):
        message = {"role": "assistant", **content, "tool_calls": [{"function": CALLED}]}
        rows = encode({"messages": [[QUESTION, message]]}, template)
        learned = [label for label in rows["labels"][0] if label != -100]
        assert tiny_tokenizer().decode(learned) == f"{json.dumps(CALLED)}<end>"

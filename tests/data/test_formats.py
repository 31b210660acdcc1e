"""The forms of data files: each becomes the rows that the plainest form of the same conversation makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from hf_temporal.data.language_modeling import (
    LanguageModelingArguments,
    brings_weights,
    encode_for_causal_lm,
    load_texts,
)
from hf_temporal.data.loading import DataArguments
from tests.tiny_summarization import tiny_tokenizer

TEMPLATE = (
    "{% if tools %}{{ 'tools: ' + (tools | tojson) + '<end>' }}{% endif %}"
    "{% for d in documents or [] %}{{ 'document: ' + d.text + '<end>' }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ':\n' }}"
    "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' + (opening or '') }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where is x1?"},
    {"role": "assistant", "content": "In file 1."},
    {"role": "user", "content": "And x2?"},
    {"role": "assistant", "content": "In file 2."},
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"name": "x1"}}}
OTHER = {"type": "function", "function": {"name": "count", "arguments": {"depth": 2}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("find", "count")
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def rows(tokenizer: PreTrainedTokenizerFast, batch: Mapping[str, Any], **settings: Any) -> list[tuple[str, list[str]]]:
    """Each row as text, with its runs of targets."""
    encoded = encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(**settings))
    made = []
    for tokens, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        runs: list[list[int]] = [[]]
        for label in labels:
            runs += [[]] if label == -100 else []
            runs[-1] += [] if label == -100 else [label]
        made.append((str(tokenizer.decode(tokens)), [str(tokenizer.decode(run)) for run in runs if run]))
    return made


def from_file(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[str]]]:
    return rows(tokenizer, load_texts(DataArguments(train_file=str(path))).splits["train"][:])


SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    "batch",
    [
        {"messages": [json.dumps(CHAT)]},
        {"messages": [[{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]]},
        {"messages": [[{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in CHAT]]},
        {"messages": [[{**m, "tool_calls": None, "name": None} for m in CHAT]]},
        {"conversations": [[{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in CHAT]]},
        {
            "conversations": [[{"from": SHAREGPT_ROLES[m["role"]], "value": m["content"]} for m in CHAT[1:]]],
            "system": ["Be short."],
        },
        {"conversations": [CHAT]},
    ],
)
def test_forms_of_one_conversation(tokenizer: PreTrainedTokenizerFast, batch: Mapping[str, Any]) -> None:
    whole = str(tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert rows(tokenizer, batch) == [(whole, ["In file 1.<end>", "In file 2.<end>"])]


def test_of_prompt_and_completion_the_prompt_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = str(tokenizer.apply_chat_template(CHAT, tokenize=False))
    assert rows(tokenizer, {"prompt": [CHAT[:4]], "completion": [CHAT[4:]]}) == [(whole, ["In file 2.<end>"])]
    assert rows(tokenizer, {"messages": [CHAT]}, train_on="last") == [(whole, ["In file 2.<end>"])]
    mixed = {"prompt": ["a", CHAT[:4]], "completion": ["b", CHAT[4:]]}
    with pytest.raises(ValueError, match="prompt and completion of row 1 of the data are of two kinds"):
        rows(tokenizer, mixed)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_tool_calls_are_what_was_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    chats: list[Any] = [
        [
            CHAT[1],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            CHAT[2],
        ]
        for call in (CALL, OTHER)
    ]
    path = tmp_path / f"train{suffix}"
    examples = [{"messages": chat, "tools": json.dumps(TOOLS)} for chat in chats]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    elif suffix == ".parquet":
        Dataset.from_list(examples).to_parquet(str(path))
    else:
        Dataset.from_list(examples).save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    made = from_file(path, tokenizer)
    assert [text for text, _ in made] == [
        str(tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False)) for chat in chats
    ]
    assert [runs for _, runs in made] == [
        ['find{"name": "x1"}<end>', "In file 1.<end>"],
        ['count{"depth": 2}<end>', "In file 1.<end>"],
    ]


def test_a_function_call_of_sharegpt(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [
        {"from": "human", "value": "Where is x1?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "In file 1."},
    ]
    ((text, learned),) = rows(tokenizer, {"conversations": [chat], "tools": [json.dumps(TOOLS)]})
    assert learned == ['find{"name": "x1"}<end>', "In file 1.<end>"]
    assert "tool:\n1<end>" in text


def test_what_the_template_reads_besides(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [{"title": "a", "text": "x1 is in file 1."}]
    batch: dict[str, list[Any]] = {
        "messages": [CHAT],
        "documents": [documents],
        "chat_template_kwargs": [{"opening": "", "unset": None}],
    }
    ((text, _),) = rows(tokenizer, batch)
    assert text == tokenizer.apply_chat_template(CHAT, documents=documents, tokenize=False)
    cases: list[tuple[dict[str, Any], dict[str, list[Any]]]] = [
        ({"chat_template_kwargs": '{"closing": 1}'}, {"messages": [CHAT]}),
        ({}, {"messages": [CHAT], "chat_template_kwargs": ['{"closing": 1}']}),
    ]
    for settings, wrong in cases:
        with pytest.raises(ValueError, match=r"closing, for the messages of row 0 .* documents, opening, tools"):
            rows(tokenizer, wrong, **settings)
    tokenizer.chat_template = TEMPLATE.partition("{% for d")[2].partition("{% endfor %}")[2]
    with pytest.raises(ValueError, match="tools, for the messages of row 0 of the data, is nothing that the chat"):
        rows(tokenizer, {"messages": [CHAT], "tools": [TOOLS]})


def test_alpaca(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = {"instruction": ["Add.", "Say x."], "input": ["1 and 2", None], "output": ["3", "x"]}
    (first, learned), (second, other) = rows(tokenizer, batch)
    assert (learned, other) == (["3<end>"], ["x<end>"])
    assert first.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:3<end>")
    assert second.endswith("\n\n### Instruction:\nSay x.\n\n### Response:x<end>")
    assert "further context" in first
    assert "further context" not in second


def test_rows_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}
    encoded = encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments())
    assert encoded == {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]], "labels": [[-100, 6, 7]]}
    with pytest.raises(ValueError, match="labels of row 0 of the data are 2; accepted: 3, one for each of input_ids"):
        encode_for_causal_lm({**batch, "labels": [[6, 7]]}, tokenizer, LanguageModelingArguments())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            r"messages hold a part of type 'image_url' \(message 1 of row 4 of train",
        ),
        (
            {"role": "narrator", "content": "x"},
            "messages of row 4 of train, message 1 is of role 'narrator'; accepted",
        ),
        ({"content": "x"}, "messages of row 4 of train, message 1 is .* accepted: a mapping with role and content"),
        ({"role": "user", "content": 3}, r"messages hold the content 3 \(message 1 of row 4 of train\)"),
        (
            {**CHAT[2], "weight": -1},
            "weight of messages of row 4 of train, message 1, is -1; accepted: a number of at",
        ),
        ({**CHAT[2], "weight": "heavy"}, "message 1, is 'heavy'; accepted: a number of at least 0"),
        ({**CHAT[1], "weight": 2}, "message 1, of the role user, is 2.0; accepted: 0 or 1 there"),
        ({**CHAT[2], "reasoning": "no"}, "row 4 of train, message 1: the chat template leaves out its reasoning"),
    ],
)
def test_refusals_name_column_row_and_message(
    tokenizer: PreTrainedTokenizerFast, message: dict[str, Any], error: str
) -> None:
    tokenizer.chat_template = TEMPLATE.replace("m.reasoning_content", "m.thoughts")
    batch = {"messages": [[CHAT[1], message, CHAT[2]]]}
    with pytest.raises(ValueError, match=error):
        encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(), rows=[4], split="train")


def test_an_answer_to_nothing_is_refused_unless_it_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    with pytest.raises(ValueError, match="messages of row 0 of the data, message 0: an answer to nothing"):
        rows(tokenizer, {"messages": [[greeting, *CHAT[1:3]]]})
    ((text, learned),) = rows(tokenizer, {"messages": [[{**greeting, "weight": 0}, *CHAT[1:3]]]})
    assert learned == ["In file 1.<end>"]
    assert text.startswith("assistant:\nHello.<end>")


def test_weights_are_seen_before_the_first_row_is_made() -> None:
    heavy, plain = [{**CHAT[2], "weight": 2}], [{**CHAT[2], "content": 'the "weights" of it'}]
    for seen, messages in ((True, heavy), (False, plain)):
        for value in (messages, json.dumps(messages)):
            examples = Dataset.from_list([{"messages": value}])
            assert brings_weights(examples, LanguageModelingArguments()) == seen
    assert brings_weights(examples, LanguageModelingArguments(weight_pattern=["a=2"]))


def test_columns_that_only_some_splits_have(tmp_path: Path) -> None:
    for split, example in (("train", {"messages": CHAT, "tools": TOOLS}), ("validation", {"messages": CHAT})):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(example) + "\n", encoding="utf-8")
    files: Any = {f"{split}_file": str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    splits = load_texts(DataArguments(**files)).splits
    assert [splits[split].column_names for split in splits] == [["messages", "tools"], ["messages"]]


def test_rows_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    chats: list[list[dict[str, Any]]] = [CHAT, [], CHAT, [{"role": "user", "content": 3}]]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": json.dumps(chat) if chat else ""}) + "\n" for chat in chats))
    data = load_texts(DataArguments(train_file=str(path)))
    assert data.rows == {"train": [0, 2, 3]}


@pytest.mark.parametrize("split", [True, False])
def test_folders_of_save_to_disk(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, *, split: bool) -> None:
    examples = Dataset.from_list([{"text": "So be it."}])
    (DatasetDict(train=examples) if split else examples).save_to_disk(str(tmp_path / "saved"))
    data = load_texts(DataArguments(dataset_name=str(tmp_path / "saved")))
    assert rows(tokenizer, data.splits["train"][:]) == [("So be it.<end>", ["So be it.<end>"])]


def test_words_of_a_csv_file_that_look_like_nothing(tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "N/A", "NULL", "007", "1e5"]
    path = tmp_path / "train.csv"
    path.write_text(
        "prompt,completion\n" + "".join(f"Say it.,{word}\n" for word in [*words, "", "x"]), encoding="utf-8"
    )
    data = load_texts(DataArguments(train_file=str(path)))
    assert data.splits["train"]["completion"][:] == [*words, "x"]
    assert load_texts(DataArguments(dataset_name=str(tmp_path))).splits["train"][:] == data.splits["train"][:]
    assert data.rows == {"train": [*range(8), 9]}

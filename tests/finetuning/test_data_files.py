"""Data files through the whole recipe: streams, templates from a file, weights, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from hf_temporal.data.language_modeling import LanguageModelingArguments
from hf_temporal.data.loading import DataArguments
from hf_temporal.finetuning.tasks import LanguageModeling
from recipes import finetune_causal_lm
from tests.tiny_run import Tiny
from tests.tiny_summarization import tiny_llama, tiny_tokenizer

TURNS = "{% for m in messages %}{{ m.role + ':\n' + m.content + '<stop>\n' }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
LATEST_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.role + ':\n' + m.content + '<end>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
QUICK = (
    *("--task", "language_modeling", "--do_train", "--max_steps", "3", "--per_device_train_batch_size", "4"),
    *("--learning_rate", "1e-2", "--report_to", "none", "--use_cpu", "--dataloader_pin_memory", "false"),
    *("--save_strategy", "no", "--temporal_power", "2", "--disable_tqdm", "true"),
)


def chat(index: int, *, weight: float | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": f"In file {index}."}
    thanks = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Return it."}]
    return {
        "messages": [
            {"role": "user", "content": f"Where is x{index}?"},
            answer if weight is None else {**answer, "weight": weight},
            *thanks,
        ]
    }


def write(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["--train_file", str(path)]


def trained(tiny: Tiny, folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    finetune_causal_lm.main(["--model_name_or_path", str(tiny.model), *QUICK, *flags, "--output_dir", str(folder)])
    return load_file(folder / "model.safetensors")


def test_a_stream_is_learned_as_the_file_is(tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    rows = [chat(index, weight=2.0 if index % 3 else None) for index in range(11)]
    nothing = {"messages": [{"role": "user", "content": "Only a question."}]}
    file = write(tmp_path / "train.jsonl", [*rows[:3], nothing, *rows[3:], {"messages": []}])
    order = ("--train_sampling_strategy", "sequential")
    whole = trained(tiny, tmp_path / "file", *file, *order)
    streamed = trained(tiny, tmp_path / "stream", *file, "--streaming")
    for name, weight in whole.items():
        torch.testing.assert_close(streamed[name], weight)
    card = (tmp_path / "stream" / "README.md").read_text(encoding="utf-8")
    assert "a stream of train" in card
    assert "Rows of the stream without a target token" in said.text
    assert "train: 1 of 12 rows have no target token" in said.text
    with pytest.raises(ValueError, match="streaming=True without dataset_name or train_file"):
        trained(tiny, tmp_path / "none", "--streaming")
    with pytest.raises(ValueError, match="streaming=True for task='copying'"):
        trained(tiny, tmp_path / "copying", *file, "--streaming", "--task", "copying")


def test_a_template_from_a_file_is_trained_and_saved_with_its_end(
    tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    file = write(tmp_path / "train.jsonl", [chat(index) for index in range(8)])
    flags = ("--tokenizer_name", str(tmp_path / "tokenizer"), "--chat_template", str(tmp_path / "chat.jinja"))
    trained(tiny, tmp_path / "run", *file, *flags)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.chat_template == TEMPLATE
    stops = GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id
    assert saved.convert_tokens_to_ids(["<end>", "<stop>"]) == stops
    assert "The chat template ends answers with '<stop>'" in said.text
    with pytest.raises(ValueError, match=r"chat_template='.*none\.jinja' is no file"):
        trained(tiny, tmp_path / "other", *file, "--chat_template", str(tmp_path / "none.jinja"))


def test_answers_without_an_end_and_rows_that_are_cut_or_more_are_told(
    tiny: Tiny, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "train.jsonl", [chat(index) for index in range(8)])
    (tmp_path / "endless.jinja").write_text(TEMPLATE.replace("<stop>", ""), encoding="utf-8")
    trained(
        tiny, tmp_path / "endless", *file, "--chat_template", str(tmp_path / "endless.jinja"), "--block_size", "30"
    )
    assert "8 of 8 rows are cut: block_size ends them" in said.text
    said.clear()
    trained(tiny, tmp_path / "whole", *file, "--chat_template", str(tmp_path / "endless.jinja"))
    assert "16 of 16 answers end in no special token" in said.text
    (tmp_path / "latest.jinja").write_text(LATEST_ONLY, encoding="utf-8")
    said.clear()
    trained(tiny, tmp_path / "latest", *file, "--chat_template", str(tmp_path / "latest.jinja"))
    assert "train: 8 conversations make 16 rows, 2.00 times as many" in said.text
    said.clear()
    last = ("--train_on", "last")
    trained(tiny, tmp_path / "last", *file, "--chat_template", str(tmp_path / "latest.jinja"), *last)
    assert "conversations make" not in said.text


def test_weights_of_messages_change_what_is_learned_and_are_told(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tiny, tmp_path / "plain", *write(tmp_path / "plain.jsonl", [chat(i) for i in range(8)]))
    ones = trained(tiny, tmp_path / "ones", *write(tmp_path / "ones.jsonl", [chat(i, weight=1) for i in range(8)]))
    capsys.readouterr()
    heavy = trained(tiny, tmp_path / "heavy", *write(tmp_path / "heavy.jsonl", [chat(i, weight=9) for i in range(8)]))
    told = capsys.readouterr().out
    for name, weight in plain.items():
        torch.testing.assert_close(ones[name], weight)
    assert any(not torch.allclose(heavy[name], weight, atol=1e-4) for name, weight in plain.items())
    shares = {line.split("|")[1].strip(): line.split("|")[2:4] for line in told.splitlines() if line.startswith("|")}
    first, second = (shares[f"answer {turn} of a row"] for turn in (1, 2))
    tokens, weights = ([float(each[place].strip(" %")) for each in (first, second)] for place in (0, 1))
    assert sum(tokens) == pytest.approx(100, abs=0.2)
    assert sum(weights) == pytest.approx(100, abs=0.2)
    assert tokens[0] == pytest.approx(50, abs=1)
    assert weights[0] > 55  # 9 x 1/8 of t², against 7/8
    assert {"first token", "last token", "end of turn"} <= {*shares}


# ---- rows that have no effect


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


@pytest.mark.parametrize("task", ["summarization", "language_modeling"])
def test_an_error_names_the_row_of_the_file(task: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% if 'no' in messages[-1].content %}{{ 1 / 0 }}{% endif %}" + TEMPLATE)
    pairs = [["a", "b"], ["", "b"], *[["a", "b"]] * 1200, ["a", "no"]]  # more than one batch
    if task == "summarization":
        rows: list[Any] = [{"article": text, "highlights": summary} for text, summary in pairs]
    else:
        turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": said}] for ask, said in pairs]
        rows = [{"messages": turn if turn[0]["content"] else []} for turn in turns]
    file = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"message 1 of row 1202 of train"):
        trained(tiny, tmp_path / "run", *file, "--task", task, "--chat_template", str(tmp_path / "chat.jinja"))

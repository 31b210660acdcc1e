"""Pairs are loaded, shown to a model, and its summaries generated and scored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from hf_temporal.data import loading as task_data
from hf_temporal.data import summarization
from hf_temporal.data.loading import DataArguments
from hf_temporal.data.small_t5 import train_tokenizer
from hf_temporal.data.summarization import SummarizationArguments, SummaryScores, load_pairs
from hf_temporal.finetuning.generation import generate_completions, prompt_of
from tests.tiny_summarization import PAIRS, tiny_llama, tiny_tokenizer, write_pairs

PAIR = {"text": PAIRS[3]["article"], "summary": PAIRS[3]["highlights"]}


@pytest.fixture
def files(tmp_path: Path) -> DataArguments:
    paths = write_pairs(tmp_path)
    settings: dict[str, Any] = {f"{split}_file": str(path) for split, path in paths.items()}
    return DataArguments(**settings)


@pytest.fixture
def arguments() -> SummarizationArguments:
    return SummarizationArguments(source_prefix="Summarize:\n", max_source_length=64, max_target_length=32)


def encode_for_causal_lm(pair: dict[str, str], *settings: Any) -> dict[str, list[int]]:
    batch = summarization.encode_pairs_for_causal_lm({name: [text] for name, text in pair.items()}, *settings)
    return {name: rows[0] for name, rows in batch.items()}


def encode_for_seq2seq_lm(pair: dict[str, str], *settings: Any) -> dict[str, list[int]]:
    batch = summarization.encode_for_seq2seq_lm({name: [text] for name, text in pair.items()}, *settings)
    return {name: rows[0] for name, rows in batch.items()}


# ---- loading


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_every_file_type_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    rows = Dataset.from_list(PAIRS[:5])
    write = {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, rows.to_json)
    write(path)
    pairs = load_pairs(DataArguments(train_file=str(path)), SummarizationArguments()).splits["train"]
    assert pairs.column_names == ["text", "summary"]
    assert pairs["text"][:] == [pair["article"] for pair in PAIRS[:5]]
    assert pairs["summary"][:] == [pair["highlights"] for pair in PAIRS[:5]]


def test_columns_by_name_and_no_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"id": 1, "short": "A summary.", "long": "A text."}) + "\n")
    columns = SummarizationArguments(text_column="long", summary_column="short")
    pairs = load_pairs(DataArguments(train_file=str(path)), columns).splits["train"]
    assert pairs[0] == {"text": "A text.", "summary": "A summary."}


@pytest.mark.parametrize("name", ["text_column", "summary_column"])
def test_missing_column_names_those_there_are(files: DataArguments, name: str) -> None:
    settings: dict[str, Any] = {name: "body"}
    arguments = SummarizationArguments(**settings)
    with pytest.raises(
        ValueError, match=f"{name}='body' is no column of the train data; accepted: article, highlights"
    ):
        load_pairs(files, arguments)


def test_first_samples_only_and_pairs_without_a_text_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"article": "", "highlights": "x"}, {"article": "a", "highlights": None}, *PAIRS[:9]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs(DataArguments(train_file=str(path), max_train_samples=4), SummarizationArguments()).splits[
        "train"
    ]
    assert pairs["text"][:] == [pair["article"] for pair in PAIRS[:4]]


def test_hash_is_that_of_the_pairs_in_use(files: DataArguments) -> None:
    columns = SummarizationArguments()
    whole = load_pairs(files, columns).sha256
    assert load_pairs(files, columns).sha256 == whole
    assert load_pairs(dataclasses.replace(files, max_eval_samples=3), columns).sha256 != whole
    swapped = SummarizationArguments(text_column="highlights", summary_column="article")
    assert load_pairs(files, swapped).sha256 != whole


def test_a_text_is_not_its_own_summary(files: DataArguments) -> None:
    with pytest.raises(ValueError, match="text_column and summary_column are both 'highlights'"):
        load_pairs(files, SummarizationArguments(text_column="highlights"))


def test_numbers_are_no_summaries(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("article,highlights\nA text.,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="summary_column='highlights' of the train data holds numbers"):
        load_pairs(DataArguments(train_file=str(path)), SummarizationArguments())


def test_a_file_without_examples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.touch()
    with pytest.raises(ValueError, match=r"train_file='.*train\.csv' is empty"):
        DataArguments(train_file=str(path))
    with pytest.raises(ValueError, match=r"validation_file='.*absent\.csv' does not exist"):
        DataArguments(validation_file=str(tmp_path / "absent.csv"))
    path.write_text("article,highlights\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train_file='.*train\.csv' gives no examples"):
        load_pairs(DataArguments(train_file=str(path)), SummarizationArguments())
    path.write_text("article,highlights\n ,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no example of the train split has a value in article and highlights"):
        load_pairs(DataArguments(train_file=str(path)), SummarizationArguments())


def test_what_is_left_out_is_counted(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.csv"
    path.write_text("article,highlights\nA text.,A summary.\nA text.,\n,A summary.\n", encoding="utf-8")
    load_pairs(DataArguments(train_file=str(path)), SummarizationArguments())
    assert "train: 2 of 3 examples have no article or no highlights; left out." in said.text


def test_docstrings_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    for split, path in files.items():
        path.write_text(json.dumps({"package": "p", "body": f"{split} body", "summary": f"{split} summary"}) + "\n")
    files["provenance"] = tmp_path / "provenance.json"
    files["provenance"].write_text(json.dumps({"versions": {"p": "1.0"}}))
    monkeypatch.setattr(task_data, "docstring_files", lambda: dict(files))
    data = load_pairs(DataArguments(), SummarizationArguments())
    assert data.splits["validation"][0] == {"text": "validation body", "summary": "validation summary"}
    assert data.provenance == {"versions": {"p": "1.0"}}
    assert "docstrings" in data.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_train_samples": 0}, "max_train_samples=0"),
        (
            {"train_file": "pairs.txt"},
            r"train_file='pairs.txt'; accepted: a file of type \.csv, \.json, \.jsonl, \.parquet",
        ),
        (
            {"dataset_name": "news", "test_file": "pairs.csv"},
            "dataset_name='news' and test_file='pairs.csv'; accepted: one of them",
        ),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArguments(**given)


@pytest.mark.parametrize("name", ["max_source_length", "max_target_length", "num_beams"])
def test_lengths_are_positive(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        SummarizationArguments(**settings)


# ---- encoding


def test_prompt_is_masked_and_the_end_is_learned(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_for_causal_lm(PAIR, tokenizer, arguments)
    prompt = f"user: Summarize:\n{PAIR['text']}<end>assistant: "
    assert tokenizer.decode(encoded["input_ids"]) == f"{prompt}{PAIR['summary']}<end>"
    assert tokenizer.decode(prompt_of(encoded)) == prompt
    targets = [label for label in encoded["labels"] if label != -100]
    assert tokenizer.decode(targets) == f"{PAIR['summary']}<end>"
    assert targets[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert encoded["labels"][len(prompt_of(encoded)) :] == encoded["input_ids"][len(prompt_of(encoded)) :]


def test_padding_is_no_target_though_it_is_the_end_token(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    short = {"text": "x.", "summary": "y."}
    encoded = [encode_for_causal_lm(pair, tokenizer, arguments) for pair in (PAIR, short)]
    batch = DataCollatorForSeq2Seq(tokenizer)(encoded)
    length = len(encoded[1]["labels"])
    assert length < batch["labels"].shape[1]
    assert (batch["input_ids"][1, length:] == tokenizer.eos_token_id).all()
    assert (batch["labels"][1, length:] == -100).all()
    assert (batch["attention_mask"][1] == 0).sum() == batch["labels"].shape[1] - length
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]


def test_long_texts_are_cut_and_the_template_stays_whole(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_for_causal_lm(PAIR, tokenizer, dataclasses.replace(arguments, max_source_length=7))
    prompt = str(tokenizer.decode(prompt_of(encoded)))
    assert prompt.startswith("user: Summarize:\n")
    assert prompt.endswith("<end>assistant: ")
    kept = prompt.removeprefix("user: Summarize:\n").removesuffix("<end>assistant: ")
    assert PAIR["text"].startswith(kept)
    assert len(tokenizer(kept).input_ids) == 7


def test_a_summary_that_is_cut_has_no_end(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_for_causal_lm(PAIR, tokenizer, dataclasses.replace(arguments, max_target_length=4))
    targets = [label for label in encoded["labels"] if label != -100]
    assert len(targets) == 4
    assert tokenizer.eos_token_id not in targets


def test_without_a_chat_template_the_prompt_is_plain(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    encoded = encode_for_causal_lm(PAIR, tokenizer, arguments)
    expected = f"Summarize:\n{PAIR['text']}\n\nSummary:\n{PAIR['summary']}<end>"
    assert tokenizer.decode(encoded["input_ids"]) == expected


def test_seq2seq_source_and_target_are_closed(arguments: SummarizationArguments) -> None:
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair.values()], 400)
    encoded = encode_for_seq2seq_lm(PAIR, tokenizer, arguments)
    assert tokenizer.decode(encoded["input_ids"]) == f"Summarize:\n{PAIR['text']}</s>"
    assert tokenizer.decode(encoded["labels"]) == f"{PAIR['summary']}</s>"
    cut = encode_for_seq2seq_lm(PAIR, tokenizer, dataclasses.replace(arguments, max_source_length=6))
    assert len(cut["input_ids"]) == 6


# ---- generation and scores


def test_batched_left_padded_generation_equals_one_by_one(arguments: SummarizationArguments) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer)).train()
    texts = [PAIRS[index]["article"][: 10 + 30 * index] for index in (2, 0, 3, 1)]
    encoded = [encode_for_causal_lm({"text": text, "summary": "y"}, tokenizer, arguments) for text in texts]
    prompts = [prompt_of(each) for each in encoded]
    assert len({len(prompt) for prompt in prompts}) > 2
    together = generate_completions(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert model.training
    for prompt, generated in zip(prompts, together, strict=True):
        with torch.no_grad():
            inputs = torch.tensor([prompt])
            alone = model.eval().generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False
            )
        expected = alone[0, len(prompt) :].tolist()
        assert generated[: len(expected)] == expected
        assert set(generated[len(expected) :]) <= {tokenizer.pad_token_id}


def test_scores_count_neither_special_tokens_nor_what_is_no_target() -> None:
    tokenizer = tiny_tokenizer()
    scores = SummaryScores(tokenizer)
    words = tokenizer("Take x3 from file").input_ids
    end = tokenizer.eos_token_id
    labels = np.array([[-100, *words, end]])
    perfect = scores(EvalPrediction(predictions=np.array([[end, *words, -100]]), label_ids=labels))
    assert perfect["rouge1"] == perfect["rougeL"] == 100
    assert perfect["gen_len"] == len(words)
    assert perfect["empty"] == 0
    assert scores.record == {"generated": ["Take x3 from file"], "references": ["Take x3 from file"]}
    nothing = scores.score([[end]], [[*words]])
    assert nothing["rouge1"] == 0
    assert nothing["gen_len"] == 0
    assert nothing["empty"] == 100
    assert scores.record["generated"] == [""]


def test_a_text_that_holds_its_end_gets_no_second_one() -> None:
    tokenizer = tiny_tokenizer()
    closing = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = closing
    batch = {"text": ["So be it.<end>", "So be it."], "summary": ["So.<end>", "So."]}
    encoded = summarization.encode_for_seq2seq_lm(batch, tokenizer, SummarizationArguments())
    for rows in encoded.values():
        assert rows[0] == rows[1]
    assert encoded["labels"][0].count(tokenizer.eos_token_id) == 1

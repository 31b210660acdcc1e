"""Summarization: where the pairs come from, how a model sees them, and how its summaries are made and scored.

Arguments and column names are those of Hugging Face's summarization example; the default data are the docstrings of
this Python environment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub.utils import tqdm
from transformers import BatchEncoding, EvalPrediction, PreTrainedTokenizerBase

from .docstrings import docstring_files

IGNORED = -100  # label of a position that is no target
SPLITS = ("train", "validation", "test")
FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class SummarizationArguments:
    """Which texts are summarized, and how long source and summary may be."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON (Lines) or Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; unset: the first."})
    summary_column: str | None = field(default=None, metadata={"help": "Column of the summary; unset: the second."})
    source_prefix: str = field(default="", metadata={"help": "Put in front of every text."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of the text that are kept."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a summary, its end token included."})
    num_beams: int = field(default=1, metadata={"help": "Beams when summaries are generated; 1 is greedy."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep only the first so many pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same for prediction."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize the data again."})

    def __post_init__(self) -> None:
        for name in ("max_source_length", "max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number of at least 1 is accepted")
        files = [name for name in ("train_file", "validation_file", "test_file") if getattr(self, name)]
        if self.dataset_name and files:
            raise ValueError(f"dataset_name={self.dataset_name!r} and {files[0]} are given: one of them is accepted")
        for name in files:
            if Path(getattr(self, name)).suffix not in FILE_TYPES:
                raise ValueError(f"{name}={getattr(self, name)!r}: {', '.join(FILE_TYPES)} are accepted")


@dataclass(frozen=True)
class SummarizationData:
    """Pairs in the columns "text" and "summary", and what a model card has to say about them.

    `sha256` is that of the pairs in use, split by split; `provenance` holds the package versions of the embedded data.
    """

    splits: DatasetDict
    name: str
    sha256: str
    provenance: dict[str, Any] | None


def load_pairs(arguments: SummarizationArguments) -> SummarizationData:
    """Load the train, validation and test pairs that there are, each cut to its `max_…_samples`.

    Raises ValueError with the columns there are where a column is missing.
    """
    splits, name, provenance = _load_splits(arguments)
    limits = (arguments.max_train_samples, arguments.max_eval_samples, arguments.max_predict_samples)
    chosen: dict[str, Dataset] = {}
    for split, limit in zip(SPLITS, limits, strict=True):
        if split in splits:
            pairs = _two_columns(splits[split], split, arguments, embedded=provenance is not None)
            chosen[split] = pairs.select(range(min(limit, len(pairs)))) if limit is not None else pairs
    return SummarizationData(DatasetDict(chosen), name, _sha256(chosen), provenance)


def _load_splits(arguments: SummarizationArguments) -> tuple[DatasetDict, str, dict[str, Any] | None]:
    download = "force_redownload" if arguments.overwrite_cache else None
    if arguments.dataset_name:
        loaded = load_dataset(arguments.dataset_name, arguments.dataset_config_name, download_mode=download)
        return loaded, arguments.dataset_name, None
    named = (arguments.train_file, arguments.validation_file, arguments.test_file)
    files = {split: Path(name) for split, name in zip(SPLITS, named, strict=True) if name}
    title, provenance = ", ".join(path.name for path in files.values()), None
    if not files:
        files = docstring_files(overwrite=arguments.overwrite_cache)
        provenance = json.loads(files.pop("provenance").read_text(encoding="utf-8"))
        title = "docstrings of the installed Python packages"
    loaded = DatasetDict()
    for split, path in files.items():
        loaded[split] = load_dataset(FILE_TYPES[path.suffix], data_files=str(path), download_mode=download)["train"]
    return loaded, title, provenance


def _two_columns(pairs: Dataset, split: str, arguments: SummarizationArguments, *, embedded: bool) -> Dataset:
    first, second = ("body", "summary") if embedded else (*pairs.column_names, "", "")[:2]
    wanted = {"text": arguments.text_column or first, "summary": arguments.summary_column or second}
    for name, column in wanted.items():
        if column not in pairs.column_names:
            raise ValueError(
                f"{name}_column={column!r} is no column of the {split} data; accepted: {', '.join(pairs.column_names)}"
            )
    if wanted["text"] == wanted["summary"]:
        raise ValueError(f"text_column and summary_column are both {wanted['text']!r}; accepted: two columns")
    pairs = pairs.select_columns([*wanted.values()]).rename_columns({column: name for name, column in wanted.items()})
    return pairs.filter(_is_complete, desc=f"Looking through the {split} pairs")


def _is_complete(pair: dict[str, Any]) -> bool:
    return bool(pair["text"]) and bool(pair["summary"])


def _sha256(splits: dict[str, Dataset]) -> str:
    digest = hashlib.sha256()
    for split, pairs in splits.items():
        for pair in pairs:
            digest.update(json.dumps([split, pair["text"], pair["summary"]]).encode())
    return digest.hexdigest()


def encode_for_causal_lm(
    pair: dict[str, str], tokenizer: PreTrainedTokenizerBase, arguments: SummarizationArguments
) -> dict[str, list[int]]:
    """input_ids = prompt + summary + end token; labels are those of the summary and its end token, else −100.

    The prompt is the user's turn of the tokenizer's chat template where it has one. A summary that is cut at
    `max_target_length` has no end token.
    """
    text = arguments.source_prefix + _first_tokens(pair["text"], tokenizer, arguments.max_source_length)
    if tokenizer.chat_template is None:
        prompt = tokenizer(f"{text}\n\nSummary:\n").input_ids
        if prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
    else:
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    summary = [*tokenizer(pair["summary"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    summary = summary[: arguments.max_target_length]
    return {
        "input_ids": prompt + summary,
        "attention_mask": [1] * (len(prompt) + len(summary)),
        "labels": [IGNORED] * len(prompt) + summary,
    }


def encode_for_seq2seq_lm(
    pair: dict[str, str], tokenizer: PreTrainedTokenizerBase, arguments: SummarizationArguments
) -> dict[str, list[int]]:
    """input_ids of the prefixed text, labels of the summary, each cut to its length and closed by the tokenizer."""
    text = arguments.source_prefix + pair["text"]
    source = tokenizer(text, truncation=True, max_length=arguments.max_source_length)
    target = tokenizer(text_target=pair["summary"], truncation=True, max_length=arguments.max_target_length)
    return {"input_ids": source.input_ids, "attention_mask": source.attention_mask, "labels": target.input_ids}


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(tokens) <= length:
        return text
    return tokenizer.batch_decode([tokens[:length]], clean_up_tokenization_spaces=False)[0].rstrip("\ufffd")


def prompt_of(encoded: dict[str, list[int]]) -> list[int]:
    """The tokens in front of the first target: all that a model may see when it generates."""
    targets = [position for position, label in enumerate(encoded["labels"]) if label != IGNORED]
    return encoded["input_ids"][: targets[0]]


@torch.no_grad()
def generate_summaries(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    **generate_arguments: Any,
) -> list[list[int]]:
    """The tokens with which a decoder-only `model` continues each prompt, end and padding included.

    Batches of similar length, left-padded, no sampling.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    summaries: list[list[int]] = [[]] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), "Generating summaries", leave=False):
        chosen = order[start : start + batch_size]
        batch: BatchEncoding = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        )
        tokens = model.generate(
            **batch.to(model.device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **generate_arguments,
        )
        for index, row in zip(chosen, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            summaries[index] = row
    model.train(was_training)
    return summaries


class SummaryScores:
    """ROUGE-1/2/L/Lsum in percent with 95 % intervals, and `gen_len`, the mean number of tokens of a summary.

    Keeps the texts it scored last. Called with an `EvalPrediction` of generated tokens it is a Trainer's
    `compute_metrics`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rouge = evaluate.load(str(Path(__file__).parent / "metrics" / "rouge"), keep_in_memory=True)
        self.summaries: list[str] = []
        self.references: list[str] = []

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score the generated tokens `prediction.predictions` against `prediction.label_ids`."""
        return self.score(prediction.predictions, prediction.label_ids)

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """Score rows of generated tokens against rows of labels; special and negative ones do not count."""
        tokens = self._without_special_tokens(generated)
        self.summaries, self.references = self._texts(tokens), self._texts(self._without_special_tokens(labels))
        rouge = self.rouge.compute(
            predictions=[_one_sentence_per_line(text) for text in self.summaries],
            references=[_one_sentence_per_line(text) for text in self.references],
        )
        return {name: 100 * value for name, value in rouge.items()} | {"gen_len": float(np.mean([*map(len, tokens)]))}

    def _without_special_tokens(self, rows: Any) -> list[list[int]]:
        special = set(self.tokenizer.all_special_ids)
        return [[int(token) for token in row if token >= 0 and int(token) not in special] for row in rows]

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(rows)]


def _one_sentence_per_line(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text)

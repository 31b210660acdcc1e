"""Summarization: pairs of text and summary, how they are encoded for a model, and how its summaries are scored."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from . import argument, check_counts
from .chat import Conversation, encode_conversations, ends_a_turn
from .loading import HEAD, DataArguments, TaskData, check_column, load_columns
from .rouge import ROUGE_TOKENIZERS, one_sentence_per_line
from .rows import (
    CUT,
    Row,
    as_batch,
    closed_once,
    length_metrics,
    runs_of_targets,
    special_tokens_around,
    texts_of,
    tokens_without,
)
from .tokenizing import rows_of_pairs

Batch = Mapping[str, list[str]]


@dataclass
class SummarizationArguments:
    """Which columns hold the texts, and how long source and summary may be."""

    text_column: str | None = argument(None, "Column of the text; unset: the first.")
    summary_column: str | None = argument(None, "Column of the summary; unset: the second.")
    source_prefix: str = argument("", "Put in front of every text.")
    max_source_length: int = argument(1024, "Tokens of the text that are kept.")
    max_target_length: int = argument(128, "Tokens of a summary, its end token included.")
    num_beams: int = argument(1, "Beams when texts are generated; 1 is greedy.")
    rouge_tokenizer: str = argument(
        "default",
        "default: words, or characters where no spaces stand between words (Chinese, Japanese, Thai and the like); "
        "char: characters everywhere, but whole words of a-z and 0-9, without their stems.",
        ROUGE_TOKENIZERS,
    )

    def __post_init__(self) -> None:
        names = ("max_source_length", "max_target_length", "num_beams")
        check_counts(**{name: getattr(self, name) for name in names})


def load_pairs(data_args: DataArguments, arguments: SummarizationArguments) -> TaskData:
    """Load pairs in the columns "text" and "summary", each split cut to its `max_…_samples`."""

    def choose(splits: dict[str, Dataset], split: str, embedded: bool) -> dict[str, str]:
        examples = splits[split]
        first, second = ("body", "summary") if embedded else (*examples.column_names, "", "")[:2]
        wanted = {"text": arguments.text_column or first, "summary": arguments.summary_column or second}
        for name, column in wanted.items():
            check_column(f"{name}_column", column, examples, split)
            is_csv = split in data_args.files and data_args.files[split].suffix == ".csv"
            if is_csv and not getattr(arguments, f"{name}_column") and all(map(_is_number, examples[column][:HEAD])):
                given = f"{name}_column={column!r} of the {split} data holds numbers"
                raise ValueError(f"{given}; accepted: a column of texts, or this one by its name.")
        if wanted["text"] == wanted["summary"]:
            raise ValueError(f"text_column and summary_column are both {wanted['text']!r}; accepted: two columns.")
        return {column: name for name, column in wanted.items()}

    return load_columns(data_args, choose)


def _is_number(cell: str | None) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def encode_pairs_for_causal_lm(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SummarizationArguments,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    rows: Sequence[int] = (),
    split: str = "the data",
    counted: bool = False,
) -> dict[str, list[Any]]:
    """Rows of prompt, summary and end token; the labels are those of the summary and its end token, −100 before.

    Text and summary are a turn of the user and one of the assistant in the tokenizer's chat template where it has one.
    A summary that is cut at `max_target_length` has no end token. Where `counted`, a column says which pairs are cut.
    `rows` and `split` are what an error calls the pairs, as in `language_modeling.encode_for_causal_lm`.
    """
    texts = [arguments.source_prefix + text for text in _first_tokens(batch["text"], tokenizer, arguments)]
    names = [f"row {row} of {split}" for row in rows or range(len(texts))]
    if tokenizer.chat_template is None:
        prompts = [f"{text}\n\nSummary:\n" for text in texts]
        made = rows_of_pairs(prompts, batch["summary"], names, tokenizer)
    else:
        turns = [
            [{"role": "user", "content": text}, {"role": "assistant", "content": summary}]
            for text, summary in zip(texts, batch["summary"], strict=True)
        ]
        settings = dict(chat_template_kwargs or {})
        conversations = [
            Conversation(turn, {1: 1.0}, settings, "summary", name) for turn, name in zip(turns, names, strict=True)
        ]
        made = [_closed(row, tokenizer) for (row,) in encode_conversations(conversations, tokenizer)]
    short = [_cut_summary(row, arguments) for row in made]
    if not counted:
        return as_batch(short)
    cut = [
        len(less.tokens) < len(row.tokens) or text != arguments.source_prefix + whole
        for less, row, text, whole in zip(short, made, texts, batch["text"], strict=True)
    ]
    return as_batch(short, cut=cut)


def _cut_summary(row: Row, arguments: SummarizationArguments) -> Row:
    runs = runs_of_targets(row.labels)
    return row.cut(runs[0][0] + arguments.max_target_length) if runs else row


def _closed(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """The row up to its last target, and the tokenizer's end token behind it if the chat template puts none there."""
    runs = runs_of_targets(row.labels)
    closed = row.cut(runs[-1][1] if runs else 0)
    if not runs or ends_a_turn(closed.tokens[-1], tokenizer):
        return closed
    return Row([*closed.tokens, tokenizer.eos_token_id], [*closed.labels, tokenizer.eos_token_id])


def encode_for_seq2seq_lm(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SummarizationArguments,
    decoder_start_token_id: int | None = None,
    *,
    counted: bool = False,
) -> dict[str, list[Any]]:
    """input_ids of the text with its prefix, labels of the summary; the tokenizer cuts and closes both.

    The token that the decoder starts with is no label, though BERT's tokenizer puts it in front of a summary, and a
    text that holds its end token already gets no second one. Where `counted`, a column says which pairs are cut.
    """
    # truncation would change the tokenizer's state, which is part of the key in the cache of `datasets`
    tokenizer = copy.deepcopy(tokenizer)
    texts = [arguments.source_prefix + text for text in batch["text"]]
    source = tokenizer(texts, truncation=True, max_length=arguments.max_source_length)
    target = tokenizer(text_target=batch["summary"], truncation=True, max_length=arguments.max_target_length)
    labels = [row[1:] if row[:1] == [decoder_start_token_id] else row for row in target.input_ids]
    (_, closing), (_, closing_target) = (special_tokens_around(tokenizer, target=target) for target in (False, True))
    sources = [closed_once(row, closing) for row in source.input_ids]
    encoded = {
        "input_ids": sources,
        "attention_mask": [[1] * len(row) for row in sources],
        "labels": [closed_once(row, closing_target) for row in labels],
    }
    if not counted:
        return encoded
    pairs = zip(source.encodings or [], target.encodings or [], strict=True)
    return {**encoded, CUT: [any(part.overflowing for part in pair) for pair in pairs]}


def _first_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, arguments: SummarizationArguments
) -> list[str]:
    length, kept = arguments.max_source_length, [*texts]
    for index, tokens in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids):
        if len(tokens) > length:
            first = str(tokenizer.decode(tokens[:length], clean_up_tokenization_spaces=False))
            kept[index] = first.rstrip("\ufffd")  # of a character that is cut in two
    return kept


class SummaryScores:
    """ROUGE-1/2/L/Lsum of generated summaries in percent, with 95 % intervals.

    Beside them `gen_len`, the mean number of tokens of a summary, and `empty`, the summaries without any in percent.
    `record` keeps the texts that were scored last.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rouge_tokenizer: str = "default") -> None:
        self.tokenizer = tokenizer
        self.rouge_tokenizer = rouge_tokenizer
        self.record: dict[str, list[str]] = {}

    @cached_property
    def rouge(self) -> Any:
        import evaluate  # takes as long as all of a recipe's other imports beside transformers

        return evaluate.load(str(Path(__file__).parent / "metrics" / "rouge"), keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.score(prediction.predictions, prediction.label_ids)

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """Score rows of generated tokens against rows of labels; special and negative ones do not count."""
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        tokens = tokens_without(special, generated)
        predictions = texts_of(self.tokenizer, tokens)
        references = texts_of(self.tokenizer, tokens_without(special, labels))
        self.record = {"generated": predictions, "references": references}
        answered, wanted = ([*map(one_sentence_per_line, texts)] for texts in (predictions, references))
        rouge = self.rouge.compute(predictions=answered, references=wanted, tokenizer=self.rouge_tokenizer)
        return {name: 100 * value for name, value in rouge.items()} | length_metrics(tokens)

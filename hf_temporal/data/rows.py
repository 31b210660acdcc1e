"""Rows of tokens: their labels, their texts and lengths, and the interval of a mean over them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from hf_temporal.collator import LOSS_WEIGHTS
from hf_temporal.positions import IGNORE_INDEX

RESAMPLES = 1000
VALUES_AT_ONCE = 1 << 20
COLUMNS = {"input_ids", "attention_mask", "labels"}
CUT = "cut"  # the column that says which rows are longer than they may be


class Row(NamedTuple):
    """Tokens, their labels, and the weights of the labels, 0 off the targets; None where all weigh 1."""

    tokens: list[int]
    labels: list[int]
    weights: list[float] | None = None

    def times(self, weight: float | Sequence[float]) -> Row:
        """The row with its weights multiplied by one number for all, or by one for each token."""
        own = [float(label != IGNORE_INDEX) for label in self.labels] if self.weights is None else self.weights
        factors = [weight] * len(own) if isinstance(weight, float) else weight
        return self._replace(weights=[one * factor for one, factor in zip(own, factors, strict=True)])

    def blocks(self, size: int) -> list[Row]:
        """The row in pieces of at most `size` tokens."""
        starts = range(0, len(self.tokens), size)
        return [self._part(start, start + size) for start in starts]

    def _part(self, start: int, end: int) -> Row:
        return Row(self.tokens[start:end], self.labels[start:end], self.weights and self.weights[start:end])

    def cut(self, size: int, *, from_left: bool = False) -> Row:
        """At most `size` tokens; an answer that has lost its beginning, from which t counts, is no target any more."""
        over = len(self.tokens) - size
        if over <= 0:
            return self
        if not from_left:
            return self._part(0, size)
        tokens, labels, weights = self._part(over, len(self.tokens))
        if self.labels[over - 1] != IGNORE_INDEX:
            lost = next((place for place, label in enumerate(labels) if label == IGNORE_INDEX), size)
            labels = [IGNORE_INDEX] * lost + labels[lost:]
            weights = weights and [0.0] * lost + weights[lost:]
        return Row(tokens, labels, weights)


def runs_of_targets(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each contiguous run of targets."""
    edges = [place for place, pair in enumerate(pairwise([IGNORE_INDEX, *labels, IGNORE_INDEX])) if _is_edge(*pair)]
    return [*zip(edges[::2], edges[1::2], strict=True)]


def _is_edge(label: int, following: int) -> bool:
    return (label == IGNORE_INDEX) != (following == IGNORE_INDEX)


def learned_after(prompt: list[int], completion: list[int]) -> Row:
    """A prompt that is no target, and a completion that is."""
    return Row(prompt + completion, [IGNORE_INDEX] * len(prompt) + completion)


def as_batch(
    rows: Sequence[Row], *, weighted: bool = False, cut: Sequence[bool] | None = None
) -> dict[str, list[Any]]:
    """The columns that a causal language model takes, `loss_weights` if the rows are weighted, and what was `CUT`."""
    batch: dict[str, list[Any]] = {
        "input_ids": [row.tokens for row in rows],
        "attention_mask": [[1] * len(row.tokens) for row in rows],
        "labels": [row.labels for row in rows],
    }
    if weighted:
        batch[LOSS_WEIGHTS] = [
            [float(label != IGNORE_INDEX) for label in row.labels] if row.weights is None else row.weights
            for row in rows
        ]
    return batch if cut is None else {**batch, CUT: [*cut]}


class RowCollator(DataCollatorForSeq2Seq):
    """Pads rows as its base does, and leaves out the work where all are as long as each other.

    The base goes over every token in Python, which takes longer than a small model's optimizer.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        as_set = self.padding is True and self.pad_to_multiple_of is None and return_tensors is None
        makes_more = hasattr(self.model, "prepare_decoder_input_ids_from_labels")
        if not as_set or makes_more or any(row.keys() != COLUMNS for row in features):
            return super().__call__(features, return_tensors)
        columns = {name: [row[name] for row in features] for name in COLUMNS}
        is_table = all(isinstance(row, list) and len(row) == len(rows[0]) for rows in columns.values() for row in rows)
        if not is_table:
            return super().__call__(features, return_tensors)
        return {name: torch.tensor(rows) for name, rows in columns.items()}


def special_tokens_around(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts in front of a text and behind it."""
    name = "text_target" if target else "text"
    for word in ("a", *tokenizer.get_vocab()):
        with suppress(Exception):  # a vocabulary of whole words, without an unknown one
            bare = tokenizer(**{name: word}, add_special_tokens=False).input_ids
            break
    whole = tokenizer(**{name: word}).input_ids
    start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def closed_once(tokens: list[int], closing: list[int]) -> list[int]:
    """The tokens without a second end behind that which the text holds itself."""
    return tokens[: -len(closing)] if closing and tokens[-2 * len(closing) :] == 2 * closing else tokens


def bootstrap_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles of the means of `RESAMPLES` resamples of `values` `[examples, ...]`, seed 0."""
    resamples = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    parts = np.array_split(resamples, min(RESAMPLES, 1 + RESAMPLES * values.size // VALUES_AT_ONCE))
    means = np.concatenate([values[part].mean(axis=1) for part in parts])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def tokens_without(special: Collection[int], rows: Any) -> list[list[int]]:
    """Rows of tokens without special ones and without padding by negative numbers."""
    return [[int(token) for token in row if token >= 0 and int(token) not in special] for row in rows]


def texts_of(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Rows of tokens as texts without white space around them."""
    return [text.strip() for text in tokenizer.batch_decode(rows)]


def length_metrics(rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """`gen_len`, the mean number of tokens of a row, and `empty`, the rows without any in percent."""
    lengths = np.array([*map(len, rows)])
    return {"gen_len": float(lengths.mean()), "empty": 100 * float((lengths == 0).mean())}

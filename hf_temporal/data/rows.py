"""Rows of tokens: their labels, their texts and lengths, and the interval of a mean over them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

RESAMPLES = 1000
Row = tuple[list[int], list[int]]  # input_ids and labels


def learned_after(prompt: list[int], completion: list[int]) -> Row:
    """A prompt that is no target, and a completion that is."""
    return prompt + completion, [IGNORE_INDEX] * len(prompt) + completion


def as_batch(rows: Iterable[Row]) -> dict[str, list[list[int]]]:
    """The columns that a causal language model takes."""
    pairs = [*rows]
    return {
        "input_ids": [tokens for tokens, _ in pairs],
        "attention_mask": [[1] * len(tokens) for tokens, _ in pairs],
        "labels": [labels for _, labels in pairs],
    }


def bootstrap_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles of the means of `RESAMPLES` resamples of `values` `[examples, ...]`, seed 0."""
    resamples = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.array([values[resample].mean(axis=0) for resample in resamples])
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

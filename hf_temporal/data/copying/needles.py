"""Needles in a haystack: pass keys that are told somewhere in a long text and asked for behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_temporal.data.rows import Row

from .arguments import ROOMS, CopyingArguments
from .text import SLOT, PromptedDataset, pieces_of, stream_of


@dataclass(eq=False)
class Needles(PromptedDataset):
    """The prompt is T tokens of text, among which the pass keys of n rooms are told, and asks for q of them.

    Each needle stands at the end of a sentence behind a random depth of the text, and gives the pass key, L random
    digits, of a room of its own. The answer is the q keys with commas between, in the order in which they stand in the
    text: the digits of the k-th key in `recall_by_position` are those of the k-th depth. Scored are the digits; all of
    the answer is learned, and its end token.

    - n = q = 1 is the passkey task of Mohtashami and Jaggi (2023, arXiv:2305.16300), with the texts of the data set in
      place of repeated sentences.
    - n > 1 are the needles of RULER (Hsieh et al., 2024, arXiv:2404.06654): q = 1 with several keys, of which one is
      asked for, and q > 1 with several queries.

    Each digit is one token, the last of those that the tokenizer makes of it alone. Chance is 1/10.
    """

    title: ClassVar = "{num_needles} pass keys of {copy_length} digits in {blank_length} tokens of {texts}"
    verb: ClassVar = "recall"
    from_texts: ClassVar = True
    prompt: ClassVar = (
        f"In the following text the pass keys of some rooms are told. Remember them.\n\n{SLOT}\n\n"
        f"Which are the pass keys of these rooms: {SLOT}? Answer with the pass keys alone, separated by commas."
    )
    characters: ClassVar = "0123456789,"
    opening: ClassVar = "\n\nPass keys:\n"
    needle: ClassVar = f"\nThe pass key of room {SLOT} is {SLOT}.\n"

    texts: InitVar[Sequence[Sequence[int]]]

    def __post_init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[int]]) -> None:
        super().__post_init__(tokenizer)
        self._stream = stream_of(texts)
        T, there = self.arguments.blank_length, len(self._stream)
        if there < T:
            raise ValueError(f"blank_length={T}; accepted: at most {there}, the tokens of the {self.split} texts.")
        self._needle = pieces_of(tokenizer, self.needle)
        full_stops = [token for word, token in tokenizer.get_vocab().items() if word.endswith(".")]
        self._ends = np.isin(self._stream, full_stops)

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        key = [True] * arguments.copy_length
        return (arguments.queries * [*key, False])[:-1]

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:  # noqa: ARG004
        return 1 / 10

    def _example(self, rng: np.random.Generator) -> Row:
        L, T, n = self.arguments.copy_length, self.arguments.blank_length, self.arguments.num_needles
        window = (rng.integers(len(self._stream)) + np.arange(T)) % len(self._stream)
        hay = self._stream[window].tolist()
        ends = np.append(np.flatnonzero(self._ends[window]) + 1, T)
        depths = ends[np.searchsorted(ends, np.sort(rng.integers(T + 1, size=n)))].tolist()
        rooms = rng.permutation(ROOMS)[:n]
        keys = ["".join(map(str, rng.integers(10, size=L))) for _ in range(n)]
        text: list[int] = []
        for room, key, start, end in zip(rooms, keys, [0, *depths], depths, strict=False):
            before, between, after = self._needle
            text += hay[start:end] + before + self._written(str(room)) + between + self._written(key) + after
        text += hay[depths[-1] :]
        asked = np.sort(rng.permutation(n)[: self.arguments.queries])
        question = self._written(",".join(str(rooms[index]) for index in asked))
        return self._prompted([text, question], self._written(",".join(keys[index] for index in asked)))

"""The copying memory problem: ten digits or so, a long blank, and the digits once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_temporal.data.rows import Row

from .arguments import CopyingArguments
from .examples import CopyingDataset

BLANK, CUE = 0, 9  # digits that are not copied: the filling, and the signal to repeat
PAD, END = 10, 11  # tokens beside the digits


@dataclass(eq=False)
class DigitCopies(CopyingDataset):
    """The copying memory problem with digits drawn from 1..8; both sequences have the length T + 2L.

        x = d_1 … d_L, T−1 zeros, L+1 nines        y = T+L zeros, d_1 … d_L

    y[i] is the answer at x[i], so that the t-th target token is y[t−1], t = 1..T+2L; an encoder–decoder is to generate
    T + 2L new tokens. Token ids are those of `digit_tokenizer`. The form is that of Hochreiter and Schmidhuber (1997)
    in the version of Arjovsky et al. (2016, arXiv:1511.06464). Chance is 1/8.
    """

    title: ClassVar = "the copying problem, {copy_length} tokens after {blank_length}"
    rest: ClassVar = "blank_accuracy"

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        L, T = arguments.copy_length, arguments.blank_length
        return [False] * (T + L) + [True] * L

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:  # noqa: ARG004
        return 1 / 8

    @staticmethod
    def tokenizer_of(arguments: CopyingArguments) -> PreTrainedTokenizerFast:  # noqa: ARG004
        return digit_tokenizer()

    def _example(self, rng: np.random.Generator) -> Row:
        L, T = self.arguments.copy_length, self.arguments.blank_length
        digits = rng.integers(BLANK + 1, CUE, L).tolist()
        x = digits + [BLANK] * (T - 1) + [CUE] * (L + 1)
        return self._answered_in_place(x, [BLANK] * (T + L) + digits, END)


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each digit, whose id is the digit itself, and `PAD` and `END`."""
    vocabulary = {str(digit): digit for digit in range(10)} | {"<pad>": PAD, "</s>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")

"""Forms of symbols for models from scratch: selective copying, induction heads, multi-query associative recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_temporal.data.rows import Row
from hf_temporal.positions import IGNORE_INDEX

from .arguments import CopyingArguments
from .examples import CopyingDataset

BLANK = 0  # the filling; the symbols are 1..V


def mark(arguments: CopyingArguments) -> int:
    """The token that says what is asked."""
    return arguments.symbols + 1


def symbol_tokenizer(symbols: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words: "_" is the blank 0, "1" to "V" the symbols, "mark", and tokens for padding and the end."""
    words = ["_", *map(str, range(1, symbols + 1)), "mark", "<pad>", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@dataclass(eq=False)
class SymbolDataset(CopyingDataset):
    """Examples of symbols 1..V, whose token ids are those of `symbol_tokenizer`.

    x is the input and y[i] the answer at x[i], if any. No answer stands in the input.
    """

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:
        return 1 / arguments.symbols

    @staticmethod
    def tokenizer_of(arguments: CopyingArguments) -> PreTrainedTokenizerFast:
        return symbol_tokenizer(arguments.symbols)

    def _example(self, rng: np.random.Generator) -> Row:
        x, y = self._input_and_answers(rng)
        return self._answered_in_place(x.tolist(), y.tolist(), self.arguments.symbols + 3)

    def _input_and_answers(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class SelectiveCopies(SymbolDataset):
    """Selective copying: L symbols stand at random places among T blanks and are repeated in their order.

        x = L symbols among T blanks, L marks        y = nothing in the first T + L places, the L symbols

    The distances between the symbols differ from example to example, so that what is blank has to be told by what it
    is, and not by when it comes. The form is that of Gu and Dao (2023, arXiv:2312.00752, section 4.1.1), after the
    denoising task of Jing et al. (2019, Neural Computation 31): 16 symbols among 4,096 tokens. The symbols are drawn
    uniformly and the loss is that of the answers alone. Chance is 1/V.
    """

    title: ClassVar = "selective copying, {copy_length} of {symbols} symbols among {blank_length} blanks"

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        return [True] * arguments.copy_length

    def _input_and_answers(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        L, T = self.arguments.copy_length, self.arguments.blank_length
        symbols = rng.integers(1, self.arguments.symbols + 1, L)
        context = np.full(T + L, BLANK)
        context[np.sort(rng.permutation(T + L)[:L])] = symbols
        x = np.append(context, np.full(L, mark(self.arguments)))
        return x, np.append(np.full(T + L, IGNORE_INDEX), symbols)


class InductionHeads(SymbolDataset):
    """Induction heads: a mark stands before one of T random symbols, and once more at the end, where that is asked.

        x = T symbols with the mark before one of them, the mark        y = that symbol at the end, nothing before

    The name is that of Olsson et al. (2022, arXiv:2209.11895) for attention that looks up what came after the same
    token; the form with one mark is that of Fu et al. (2023, arXiv:2212.14052), and of Gu and Dao (2023,
    arXiv:2312.00752, section 4.1.2) with 16 symbols over 256 tokens. Chance is 1/V.

    There is one target token, so t = T = 1: every power p gives the same loss.
    """

    title: ClassVar = "induction heads, one of {symbols} symbols asked after {blank_length}"
    verb: ClassVar = "recall"

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:  # noqa: ARG004
        return [True]

    def _input_and_answers(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        T, asked = self.arguments.blank_length, mark(self.arguments)
        symbols = rng.integers(1, self.arguments.symbols + 1, T)
        place = rng.integers(T)
        x = np.append(np.insert(symbols, place, asked), asked)
        return x, np.append(np.full(T + 1, IGNORE_INDEX), symbols[place])


class AssociativeRecall(SymbolDataset):
    """Multi-query associative recall (MQAR): pairs of a key and a value, then keys, each to be answered by its value.

        x = key_1 value_1 … key_K value_K, T tokens: blanks, and keys at Q of their ⌊T/2⌋ odd places
        y = at each of these keys its value, nothing elsewhere

    Keys are drawn from the symbols 1..⌊V/2⌋, values from the others, both without replacement. The i-th of the odd
    places is chosen in proportion to i^(a−1), without replacement, which makes short gaps frequent and long ones rare
    for a small a. Each key is asked for ⌊Q/K⌋ or ⌈Q/K⌉ times. `recall_by_position` counts the queries in their order.
    The form is that of Arora et al. (2023, arXiv:2312.04927): a = 0.01, Q = K from 4 to 64, V = 8,192. Chance is
    1/⌈V/2⌉ among all values; answering with any value that stands in the prompt reaches 1/K.
    """

    title: ClassVar = "multi-query recall, {num_pairs} pairs of {symbols} symbols asked within {blank_length}"
    verb: ClassVar = "recall"
    for_encoder_decoder: ClassVar = False  # the queries stand in the sequence, each answered in its place

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        return [True] * arguments.queries

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:
        return 1 / (arguments.symbols - arguments.symbols // 2)

    def _input_and_answers(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        K, Q, T = self.arguments.num_pairs, self.arguments.queries, self.arguments.blank_length
        half = self.arguments.symbols // 2
        keys = 1 + rng.permutation(half)[:K]
        values = half + 1 + rng.permutation(self.arguments.symbols - half)[:K]
        places = 2 * self._places(rng, T // 2, Q)
        asked = np.resize(rng.permutation(K), Q)
        rng.shuffle(asked)
        tail, answers = np.full(T, BLANK), np.full(T, IGNORE_INDEX)
        tail[places], answers[places] = keys[asked], values[asked]
        pairs = np.stack([keys, values], axis=1).ravel()
        return np.append(pairs, tail), np.append(np.full(2 * K, IGNORE_INDEX), answers)

    def _places(self, rng: np.random.Generator, count: int, chosen: int) -> np.ndarray:
        """`chosen` of 0..count−1, the i-th in proportion to i^(a−1), one after the other without replacement.

        The largest sums of log-probability and Gumbel noise are such a sample, whatever the exponent.
        """
        logits = (self.arguments.gap_exponent - 1) * np.log(np.arange(1, count + 1))
        return np.argsort(-(logits + rng.gumbel(size=count)))[:chosen]

"""The copying problem: what stands in front of a long blank is to be repeated after it; its examples and its scores.

Examples are drawn on the fly: digits, as in the literature, for models from scratch, or passages of text for
pretrained ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_temporal.positions import IGNORE_INDEX

from . import argument, check_counts
from .drawn import DrawnDataset
from .rows import (
    Row,
    bootstrap_interval,
    learned_after,
    length_metrics,
    special_tokens_around,
    texts_of,
    tokens_without,
)

FORMS = ("digits", "text")
BLANK, CUE = 0, 9  # digits that are not copied: the filling, and the signal to repeat
PAD, END = 10, 11  # tokens beside the digits
NO_ANSWER = -1

PASSAGE, DISTRACTOR = "\ue000", "\ue001"  # private characters, in place of the two texts in a rendered prompt
PROMPT = (
    f"Remember this passage:\n\n{PASSAGE}\n\nNow read this other text:\n\n{DISTRACTOR}\n\n"
    "Repeat the passage that you were to remember, word for word, and nothing else."
)
WITHOUT_TEMPLATE = "\n\nPassage:\n"


@dataclass
class CopyingArguments:
    """What is copied, and over which distance."""

    copying_form: str = argument("digits", "Digits after a blank, or a passage of text after another text.", FORMS)
    copy_length: int = argument(10, "Digits, or tokens of the passage, that are copied: L.")
    blank_length: int = argument(100, "Length of the blank, or tokens of the other text: T.")

    def __post_init__(self) -> None:
        if self.copying_form not in FORMS:
            raise ValueError(f"copying_form={self.copying_form!r}; accepted: {', '.join(map(repr, FORMS))}.")
        check_counts(copy_length=self.copy_length, blank_length=self.blank_length)

    @property
    def answer_length(self) -> int:
        """Target tokens of an example without an end token: T + 2L digits, or the L tokens of the passage."""
        blank = self.blank_length + self.copy_length if self.copying_form == "digits" else 0
        return blank + self.copy_length


@dataclass(eq=False)
class CopyingDataset(DrawnDataset[dict[str, list[int]]]):
    """Examples of the copying problem, of two sequences for an encoder–decoder, else of one."""

    arguments: CopyingArguments
    is_encoder_decoder: bool = field(kw_only=True)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        input_ids, labels, _ = self._example(self._generator(index))
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    def _example(self, rng: np.random.Generator) -> Row:
        raise NotImplementedError


class DigitCopies(CopyingDataset):
    """The copying memory problem with digits drawn from 1..8; both sequences have the length T + 2L.

        x = d_1 … d_L, T−1 zeros, L+1 nines        y = T+L zeros, d_1 … d_L

    - Encoder–decoder: input_ids = x, labels = y. There is no end token; generate T + 2L new tokens.
    - Decoder-only: y[i] is the answer at x[i]. The model's own loss compares the logits at i with labels[i+1], so
      labels = −100, y[0], …, y[T+2L−1], and input_ids = x and an end token, which only fills the last place: no answer
      depends on it, and its own is not scored.

    In both, the t-th target token is y[t−1], t = 1..T+2L. Token ids are those of `digit_tokenizer`.
    """

    def _example(self, rng: np.random.Generator) -> Row:
        L, T = self.arguments.copy_length, self.arguments.blank_length
        digits = rng.integers(BLANK + 1, CUE, L).tolist()
        x = digits + [BLANK] * (T - 1) + [CUE] * (L + 1)
        y = [BLANK] * (T + L) + digits
        return Row(x, y) if self.is_encoder_decoder else Row([*x, END], [IGNORE_INDEX, *y])


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each digit, whose id is the digit itself, and `PAD` and `END`."""
    vocabulary = {str(digit): digit for digit in range(10)} | {"<pad>": PAD, "</s>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@dataclass(eq=False)
class TextCopies(CopyingDataset):
    """Copying of text: the prompt has a passage of L tokens, T tokens of other texts, and asks to repeat the passage.

    Passage and distractor are cut from the tokenized texts, and the pieces of the prompt around them are tokenized by
    themselves. So the labels are exactly the tokens in the prompt; where two pieces meet, tokens may differ from those
    of the whole prompt as one text.

    - Decoder-only: input_ids = prompt + passage + end token, labels −100 on the prompt. The prompt is the user's turn
      of the tokenizer's chat template where it has one.
    - Encoder–decoder: input_ids = prompt, labels = passage, each with the special tokens that the tokenizer puts
      around a source and around a target.

    `texts` are those of this split, as `tokenize_texts` returns them. The passage is from one with L tokens or more,
    the distractor from all others.
    """

    texts: InitVar[Sequence[Sequence[int]]]
    tokenizer: InitVar[PreTrainedTokenizerBase]

    def __post_init__(self, texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__post_init__()
        rows = [np.array(row, dtype=np.int64) for row in texts]
        self._stream = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        self._ends = np.cumsum([0, *map(len, rows)])
        lengths = np.diff(self._ends)
        L, T, longest = self.arguments.copy_length, self.arguments.blank_length, int(lengths.max(initial=0))
        others, split = len(self._stream) - longest, self.split
        if longest < L:
            raise ValueError(f"copy_length={L}; accepted: at most {longest}, the tokens of the longest {split} text.")
        if others < T:
            most = f"at most {others}, the tokens of the {split} texts beside the longest"
            raise ValueError(f"blank_length={T}; accepted: {most}.")
        self._candidates = np.flatnonzero(lengths >= L)
        self._pieces = prompt_pieces(tokenizer, is_encoder_decoder=self.is_encoder_decoder)
        around = special_tokens_around(tokenizer, target=True)
        self._answer_around = around if self.is_encoder_decoder else ([], [tokenizer.eos_token_id])

    def _example(self, rng: np.random.Generator) -> Row:
        L, T = self.arguments.copy_length, self.arguments.blank_length
        text = rng.choice(self._candidates)
        start, end = self._ends[text], self._ends[text + 1]
        first = rng.integers(start, end - L + 1)
        passage = self._stream[first : first + L].tolist()
        # from the other texts, which follow this one in a circle
        first = end + rng.integers(len(self._stream) - (end - start) - T + 1)
        distractor = self._stream.take(range(first, first + T), mode="wrap").tolist()
        before, between, after = self._pieces
        prompt = [*before, *passage, *between, *distractor, *after]
        opening, closing = self._answer_around
        answer = [*opening, *passage, *closing]
        return Row(prompt, answer) if self.is_encoder_decoder else learned_after(prompt, answer)


def tokenize_texts(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """The "tokens" of each "text" without special ones."""
    rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
    return {"tokens": tokens_without(set(tokenizer.all_special_ids), rows)}


def prompt_pieces(tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> tuple[list[int], ...]:
    """The tokens of the prompt before the passage, between passage and distractor, and after the distractor."""
    has_template = tokenizer.chat_template is not None and not is_encoder_decoder
    if has_template:
        turns = [{"role": "user", "content": PROMPT}]
        rendered = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    else:
        rendered = PROMPT + WITHOUT_TEMPLATE
    texts = re.split(f"{PASSAGE}|{DISTRACTOR}", rendered)
    if len(texts) != 3:
        raise ValueError(f"chat_template renders as {rendered!r}; accepted: one that shows a user's turn once.")
    before, between, after = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    if not has_template:
        opening, closing = special_tokens_around(tokenizer)
        before, after = opening + before, after + (closing if is_encoder_decoder else [])
    return before, between, after


# ---- scores


class CopyScores:
    """Scores of copying; shares are between 0 and 1.

    - `recall`: the share of the L tokens to be copied that are right at their own position.
    - `recall_low`, `recall_high`: its 95 % interval, bootstrapped over the examples.
    - `exact_match`: the share of the examples with all L tokens right.
    - `blank_accuracy`, for digits: the share of the other T + L target tokens that are right. There is no accuracy
      over all target tokens, because answering blanks alone reaches (T + L)/(T + 2L), 99.0 % at T = 1000, L = 10.
    - `gen_len`, `empty`, for generated text: mean number of its tokens, and the answers without any in percent.

    Of the last scoring, `record` keeps `recall_by_position`, L values, and the texts of the answers, `generated`, and
    of what was to be copied, `references`; for digits those of the L digits alone.

    For digits in a decoder-only model nothing is generated: no target token stands in the input and the nines are the
    same in every example, so the argmax at each position is what free running gives. Everywhere else an argmax is
    teacher-forced: each token is answered with all tokens before it given.

    `generated` says whether an `EvalPrediction` holds what `predict_with_generate` gives, rows that open with the
    decoder's start token, or the argmax of a decoder-only model, which answers labels[i] at i − 1.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: CopyingArguments, *, generated: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.generated = generated
        self._special = set(tokenizer.all_special_ids)
        self.record: dict[str, list[Any]] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score rows of tokens, `prediction.predictions`, as a Trainer's `compute_metrics`."""
        rows, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.generated:
            return self.score(rows[:, 1:], labels)
        first, count = (labels != IGNORE_INDEX).argmax(axis=1) - 1, (labels != IGNORE_INDEX).sum(axis=1)
        answers = [row[start : start + length] for row, start, length in zip(rows, first, count, strict=True)]
        return self._score(answers, labels)

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """Score rows of generated tokens, without prompt or start token, against rows of labels.

        The k-th token answers the k-th label that is not −100. End and padding tokens count as no answer.
        """
        metrics = self._score(generated, labels)
        if self.arguments.copying_form == "text":
            metrics |= length_metrics(tokens_without(self._special, generated))
        return metrics

    def _score(self, answers: Any, labels: Any) -> dict[str, float]:
        L = self.arguments.copy_length
        pairs = [self._aligned(*pair) for pair in zip(answers, labels, strict=True)]
        answered, wanted = np.array(pairs).swapaxes(0, 1)
        right = answered == wanted
        copied = right[:, -L:]
        recall = copied.mean(axis=1)
        low, high = bootstrap_interval(recall)
        metrics = {"recall": recall.mean(), "recall_low": low, "recall_high": high}
        metrics["exact_match"] = copied.all(axis=1).mean()
        if self.arguments.copying_form == "digits":
            metrics["blank_accuracy"] = right[:, :-L].mean()
            answers = answered[:, -L:]
        shown = (answers, wanted[:, -L:])
        given, expected = (texts_of(self.tokenizer, tokens_without(self._special, rows)) for rows in shown)
        recalls = copied.mean(axis=0).tolist()
        self.record = {"generated": given, "references": expected, "recall_by_position": recalls}
        return {name: float(value) for name, value in metrics.items()}

    def _aligned(self, answer: Any, labels: Any) -> tuple[list[int], list[int]]:
        """The answered and the wanted token at each ordinary target token; `NO_ANSWER` behind the answer's end."""
        targets = [int(token) for token in labels if token != IGNORE_INDEX]
        wanted = {place: token for place, token in enumerate(targets) if token not in self._special}
        if len(wanted) != self.arguments.answer_length:
            given = f"labels with {len(wanted)} target tokens beside special ones"
            raise ValueError(f"{given}; accepted: {self.arguments.answer_length}, for {self.arguments}.")
        answered = [int(answer[place]) if place < len(answer) else NO_ANSWER for place in wanted]
        return answered, [*wanted.values()]


def argmax_of_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:  # noqa: ARG001
    """The likeliest token at each position `[batch, time]`: a Trainer's `preprocess_logits_for_metrics`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

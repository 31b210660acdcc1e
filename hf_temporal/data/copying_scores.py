"""How much of what was to be copied stands in the answer, each token at its own position."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .bootstrap import bootstrap_interval
from .copying import CopyingArguments

NO_ANSWER = -1


class CopyScores:
    """`recall`, the share of the L tokens to be copied that are right at their own position, and what is beside it.

    - `recall_low`, `recall_high`: its 95 % interval, bootstrapped over the examples.
    - `exact_match`: the share of the examples with all L tokens right.
    - `blank_accuracy`, for digits: the share of the other T + L target tokens that are right. There is no accuracy
      over all target tokens: answering blanks alone reaches (T + L)/(T + 2L), 99.0 % at T = 1000, L = 10.
    - `gen_len`, `empty`, for generated text: mean number of its tokens, and the answers without any in percent.

    Shares are between 0 and 1. Of the last scoring `record` keeps `recall_by_position`, L values, and the texts of
    what was answered, `generated`, and of what was to be copied, `references`; for digits those of the L digits alone.

    Digits in a decoder-only model: no target token ever stands in the input, the nines are the same in every example,
    so the argmax at each position is what free running gives, and nothing is generated. Everywhere else the argmax is
    teacher-forced, that is, each token is answered with all tokens before it given.

    Args:
        tokenizer: its special tokens are not among those to be copied.
        arguments: of the task.
        generated: whether an `EvalPrediction` holds what `predict_with_generate` gives, rows that open with the
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
        """Score `prediction.predictions`, rows of tokens, as a Trainer's `compute_metrics`."""
        rows, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.generated:
            return self.score(rows[:, 1:], labels)
        first = (labels != IGNORE_INDEX).argmax(axis=1) - 1
        count = (labels != IGNORE_INDEX).sum(axis=1)
        answers = [row[start : start + length] for row, start, length in zip(rows, first, count, strict=True)]
        return self._score(answers, labels)

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """Score rows of generated tokens, without prompt or start token, against rows of labels.

        The k-th token answers the k-th label that is not −100. End and padding tokens count as no answer.
        """
        metrics = self._score(generated, labels)
        if self.arguments.copying_form == "text":
            lengths = np.array([len(self._ordinary(row)) for row in generated])
            metrics |= {"gen_len": float(lengths.mean()), "empty": 100 * float((lengths == 0).mean())}
        return metrics

    def _score(self, answers: Any, labels: Any) -> dict[str, float]:
        L = self.arguments.copy_length
        pairs = [self._aligned(*pair) for pair in zip(answers, labels, strict=True)]
        answered, wanted = np.array(pairs).swapaxes(0, 1)
        right = answered == wanted
        copied = right[:, -L:]
        recall = copied.mean(axis=1)
        low, high = bootstrap_interval(recall)
        metrics = {
            "recall": float(recall.mean()),
            "recall_low": float(low),
            "recall_high": float(high),
            "exact_match": float(copied.all(axis=1).mean()),
        }
        if self.arguments.copying_form == "digits":
            metrics["blank_accuracy"] = float(right[:, :-L].mean())
        self.record = {
            "generated": self._texts(answered[:, -L:] if self.arguments.copying_form == "digits" else answers),
            "references": self._texts(wanted[:, -L:]),
            "recall_by_position": copied.mean(axis=0).tolist(),
        }
        return metrics

    def _aligned(self, answer: Any, labels: Any) -> tuple[list[int], list[int]]:
        """Answered and wanted token at each target token that is no special one; `NO_ANSWER` behind the answer's end.

        Raises ValueError where there are not as many of these as the task has.
        """
        targets = [int(token) for token in labels if token != IGNORE_INDEX]
        wanted = {place: token for place, token in enumerate(targets) if token not in self._special}
        if len(wanted) != self.arguments.answer_length:
            raise ValueError(
                f"labels with {len(wanted)} target tokens beside special ones; accepted: "
                f"{self.arguments.answer_length}, as copy_length={self.arguments.copy_length} and "
                f"blank_length={self.arguments.blank_length} have it"
            )
        given = [int(answer[place]) if place < len(answer) else NO_ANSWER for place in wanted]
        return given, [*wanted.values()]

    def _ordinary(self, row: Any) -> list[int]:
        return [int(token) for token in row if token >= 0 and int(token) not in self._special]

    def _texts(self, rows: Any) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode([self._ordinary(row) for row in rows])]


def argmax_of_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:  # noqa: ARG001
    """The likeliest token at each position `[batch, time]`: a Trainer's `preprocess_logits_for_metrics`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

"""How many of the tokens to be copied stand in the answer, each at its own position."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .copying import CopyingArguments
from .rows import bootstrap_interval, length_metrics, texts_of, tokens_without

NO_ANSWER = -1


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

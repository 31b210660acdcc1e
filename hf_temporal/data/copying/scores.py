"""Scores of the copying task: how much of an answer is right, token by token at its own position."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_temporal.data.rows import bootstrap_interval, length_metrics, texts_of, tokens_without
from hf_temporal.positions import IGNORE_INDEX

from .arguments import CopyingArguments
from .forms import FORMS

NO_ANSWER = -1


class CopyScores:
    """Scores of copying; shares are between 0 and 1.

    - `recall`: the share of the answer's tokens that are right at their own position. These are, of each form, the
      target tokens that its `scored` says: those that are copied, the values that are asked for, the last number.
    - `recall_low`, `recall_high`: its 95 % interval, bootstrapped over the examples.
    - `exact_match`: the share of the examples whose answer is right in every token.
    - `blank_accuracy` for digits, `chain_accuracy` for arithmetic: the share of other target tokens that are right.
      There is no accuracy over all target tokens, because answering blanks alone reaches (T + L)/(T + 2L) of the
      digits, 99.0 % at T = 1000, L = 10.
    - `gen_len`, `empty`, for generated text: mean number of its tokens, and the answers without any in percent.

    Of the last scoring, `record` keeps `recall_by_position`, a value for each of the answer's tokens, and the texts of
    the answers, `generated`, and of what they were to be, `references`; of a form that is not generated, those of the
    scored tokens alone.

    For a form that a decoder-only model does not generate, no target token stands in the input, so the argmax at each
    position is what free running gives. Everywhere else an argmax is teacher-forced: each token is answered with all
    tokens before it given.

    `generated` says whether an `EvalPrediction` holds what `predict_with_generate` gives, rows that open with the
    decoder's start token, or the argmax of a decoder-only model, which answers labels[i] at i − 1.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: CopyingArguments, *, generated: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.generated = generated
        self._form = FORMS[arguments.copying_form]
        self._scored = np.array(self._form.scored(arguments))
        self._special = set(tokenizer.all_special_ids)
        self.record: dict[str, list[Any]] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score rows of tokens, `prediction.predictions`, as a Trainer's `compute_metrics`."""
        rows, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.generated:
            return self.score(rows[:, 1:], labels)
        places = [np.flatnonzero(row != IGNORE_INDEX) - 1 for row in labels]
        return self._score([row[at] for row, at in zip(rows, places, strict=True)], labels)

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """Score rows of generated tokens, without prompt or start token, against rows of labels.

        The k-th token answers the k-th label that is not −100. End and padding tokens count as no answer.
        """
        metrics = self._score(generated, labels)
        if self._form.generates:
            metrics |= length_metrics(tokens_without(self._special, generated))
        return metrics

    def _score(self, answers: Any, labels: Any) -> dict[str, float]:
        lists = ([np.asarray(row).tolist() for row in rows] for rows in (answers, labels))
        pairs = [self._aligned(*pair) for pair in zip(*lists, strict=True)]
        answered, wanted = np.array(pairs).swapaxes(0, 1)
        right = answered == wanted
        copied, others = right[:, self._scored], right[:, ~self._scored]
        recall = copied.mean(axis=1)
        low, high = bootstrap_interval(recall)
        metrics = {"recall": recall.mean(), "recall_low": low, "recall_high": high}
        metrics["exact_match"] = copied.all(axis=1).mean()
        if self._form.rest and others.size:
            metrics[self._form.rest] = others.mean()
        shown = (answers, wanted) if self._form.generates else (answered[:, self._scored], wanted[:, self._scored])
        given, expected = (texts_of(self.tokenizer, tokens_without(self._special, rows)) for rows in shown)
        recalls = copied.mean(axis=0).tolist()
        self.record = {"generated": given, "references": expected, "recall_by_position": recalls}
        return {name: float(value) for name, value in metrics.items()}

    def _aligned(self, answer: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """The answered and the wanted token at each ordinary target token; `NO_ANSWER` behind the answer's end."""
        targets = [token for token in labels if token != IGNORE_INDEX]
        wanted = {place: token for place, token in enumerate(targets) if token not in self._special}
        if len(wanted) != len(self._scored):
            given = f"labels with {len(wanted)} target tokens beside special ones"
            raise ValueError(f"{given}; accepted: {len(self._scored)}, for {self.arguments}.")
        answered = [answer[place] if place < len(answer) else NO_ANSWER for place in wanted]
        return answered, [*wanted.values()]


def argmax_of_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:  # noqa: ARG001
    """The likeliest token at each position `[batch, time]`: a Trainer's `preprocess_logits_for_metrics`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

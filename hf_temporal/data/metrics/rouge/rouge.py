"""ROUGE as an `evaluate` metric that loads from this folder, without the Hub."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from hf_temporal.data.rouge import ROUGE_TOKENIZERS, CharacterTokenizer, WordTokenizer
from hf_temporal.data.rows import bootstrap_interval

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """ROUGE F1 by the `rouge-score` package, for every script."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (F1), with bootstrapped 95 % intervals.",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, ACL workshop, 2004",
            features=datasets.Features({"predictions": text, "references": text}),
            codebase_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(
        self, predictions: list[str], references: list[str], *, tokenizer: str = "default"
    ) -> dict[str, float]:
        """The mean F1, from 0 to 1, of each of `ROUGE_TYPES`, and its interval, `<name>_low` and `<name>_high`.

        Args:
            predictions: texts; for rougeLsum their sentences are separated by newlines.
            references: as many texts.
            tokenizer: "default" for words, and for characters of scripts without spaces between words, such as
                Chinese, Japanese and Thai; ASCII text has `rouge_score`'s own scores, Porter's stems included. "char"
                for characters in every script but a-z and 0-9.
        """
        if tokenizer not in ROUGE_TOKENIZERS:
            raise ValueError(f"tokenizer={tokenizer!r}; accepted: {', '.join(ROUGE_TOKENIZERS)}.")
        scorer = RougeScorer(ROUGE_TYPES, tokenizer=CharacterTokenizer() if tokenizer == "char" else WordTokenizer())
        scores = [scorer.score(*texts) for texts in zip(references, predictions, strict=True)]
        f1 = np.array([[score[name].fmeasure for name in ROUGE_TYPES] for score in scores])
        low, high = bootstrap_interval(f1)
        result: dict[str, float] = {}
        for name, *values in zip(ROUGE_TYPES, f1.mean(axis=0), low, high, strict=True):
            result |= zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True)
        return result

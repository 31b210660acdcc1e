"""ROUGE as an `evaluate` metric that loads from this folder, without the Hub."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from hf_temporal.data.rouge import ROUGE_TOKENIZERS, ROUGE_TYPES, f1_scores
from hf_temporal.data.scoring import bootstrap_interval

_DESCRIPTION = "ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (F1), with bootstrapped 95 % intervals over the examples."
_INPUTS = """
Args:
    predictions: list of texts. For rougeLsum, sentences are separated by newlines.
    references: list of texts.
    use_stemmer: compare Porter stems instead of words; characters have none.
    tokenizer: "default" for words of a-z and 0-9; "char" for single characters, as Chinese and Japanese need it, where
        the default finds no words and every score is 0.
Returns:
    For each of rouge1, rouge2, rougeL, rougeLsum: its mean F1 between 0 and 1, and under `<name>_low` and
    `<name>_high` the ends of its interval.
"""
_CITATION = """
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    pages = "74--81",
}
"""


class Rouge(evaluate.Metric):
    """ROUGE F1 by the `rouge-score` package."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            codebase_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        *,
        use_stemmer: bool = True,
        tokenizer: str = "default",
    ) -> dict[str, float]:
        if tokenizer not in ROUGE_TOKENIZERS:
            raise ValueError(f"tokenizer={tokenizer!r}; accepted: {', '.join(ROUGE_TOKENIZERS)}")
        f1 = np.array(f1_scores(predictions, references, use_stemmer=use_stemmer, tokenizer=tokenizer))
        low, high = bootstrap_interval(f1)
        result: dict[str, float] = {}
        for column, name in enumerate(ROUGE_TYPES):
            result |= {
                name: float(f1[:, column].mean()),
                f"{name}_low": float(low[column]),
                f"{name}_high": float(high[column]),
            }
        return result

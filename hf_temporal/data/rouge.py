"""ROUGE: how texts are split, by words or, for scripts that put no spaces between words, by the character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from .rows import bootstrap_interval

ROUGE_TOKENIZERS = ("default", "char")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_TOKEN = re.compile(r"[a-z0-9]+|[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_LETTER = re.compile(r"(?!\d)[^\W_\u0250-\u1dff\u1f00-\U0010ffff]")


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str], *, tokenizer: str = "default"
) -> dict[str, float]:
    """The mean F1, from 0 to 1, of each of `ROUGE_TYPES`, and its 95 % interval, `<name>_low` and `<name>_high`.

    Args:
        predictions: texts; for rougeLsum their sentences are separated by newlines.
        references: as many texts.
        tokenizer: "default" for the Porter stems of words of a-z and 0-9, or "char" for single characters, as Chinese
            and Japanese need it, where the default finds no words and every score is 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # its import takes long

    if tokenizer not in ROUGE_TOKENIZERS:
        raise ValueError(f"tokenizer={tokenizer!r}; accepted: {', '.join(ROUGE_TOKENIZERS)}.")
    by_character = CharacterTokenizer() if tokenizer == "char" else None
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True, tokenizer=by_character)
    scores = [scorer.score(*texts) for texts in zip(references, predictions, strict=True)]
    f1 = np.array([[score[name].fmeasure for name in ROUGE_TYPES] for score in scores])
    low, high = bootstrap_interval(f1)
    result: dict[str, float] = {}
    for name, *values in zip(ROUGE_TYPES, f1.mean(axis=0), low, high, strict=True):
        result |= zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True)
    return result


class CharacterTokenizer:
    """One token for each letter or digit, but for each run of ASCII ones: "用BERT训练3天" is 用, bert, 训, 练, 3, 天.

    Case and width of a character do not count (lower case, Unicode NFKC); spaces and punctuation are no tokens. For
    ASCII text these are the tokens of rouge-score's own tokenizer without stemming, which finds none in Chinese.
    """

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def needs_characters(texts: Iterable[str]) -> bool:
    """Whether fewer than half of all letters are Latin, so that words of a-z and 0-9 would miss most of the text."""
    normal = unicodedata.normalize("NFKC", "\n".join(texts))
    return 2 * len(_LATIN_LETTER.findall(normal)) < len(_LETTER.findall(normal))

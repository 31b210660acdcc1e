"""ROUGE of pairs of texts, by words or, for scripts that put no spaces between them, by the character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE_TOKENIZERS = ("default", "char")

_TOKEN = re.compile(r"[a-z0-9]+|[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_LETTER = re.compile(r"(?!\d)[^\W_\u0250-\u1dff\u1f00-\U0010ffff]")


class CharacterTokenizer:
    """One token for each letter or digit, but for each run of ASCII ones: "用BERT训练3天" is 用, bert, 训, 练, 3, 天.

    Lower case; full-width and half-width forms are the same (Unicode NFKC); spaces and punctuation are no tokens. So
    ASCII text gives the tokens of rouge-score's own tokenizer without stemming, which finds none in Chinese.
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`."""
        return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def needs_characters(texts: Iterable[str]) -> bool:
    """Whether fewer than half of all letters are Latin: words of a-z and 0-9 would then miss most of the text."""
    letters = latin = 0
    for text in texts:
        normal = unicodedata.normalize("NFKC", text)
        letters += len(_LETTER.findall(normal))
        latin += len(_LATIN_LETTER.findall(normal))
    return 2 * latin < letters


def f1_scores(
    predictions: Sequence[str], references: Sequence[str], *, use_stemmer: bool, tokenizer: str
) -> list[list[float]]:
    """For each pair, in their order, the F1 of `ROUGE_TYPES`."""
    from rouge_score.rouge_scorer import RougeScorer  # and with it all of NLTK, which takes its time

    by_character = CharacterTokenizer() if tokenizer == "char" else None
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=use_stemmer, tokenizer=by_character)
    scores = (scorer.score(*texts) for texts in zip(references, predictions, strict=True))
    return [[score[name].fmeasure for name in ROUGE_TYPES] for score in scores]

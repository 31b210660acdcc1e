"""How ROUGE splits texts: by words, or by the character for scripts that put no spaces between words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

ROUGE_TOKENIZERS = ("default", "char")

_TOKEN = re.compile(r"[a-z0-9]+|[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_LETTER = re.compile(r"(?!\d)[^\W_\u0250-\u1dff\u1f00-\U0010ffff]")


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

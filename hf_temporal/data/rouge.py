"""How ROUGE splits texts of any script: into words, or into characters where no spaces stand between words."""

from __future__ import annotations

import unicodedata
from itertools import groupby

import regex

ROUGE_TOKENIZERS = ("default", "char")

# Line_Break=SA are the letters of South-East Asia between which only a dictionary finds the words.
_UNSPACED = (
    r"[[\p{Han}\p{Ideographic}\p{Hiragana}\p{Katakana}\p{Script_Extensions=Katakana}\p{Bopomofo}\p{Yi}"
    r"\p{Tibetan}\p{Javanese}\p{Balinese}\p{Line_Break=SA}]&&[\p{L}\p{Nl}]]"
)


def _character(letter: str) -> str:
    """A letter with all that is written around it: its grapheme cluster, and vowel signs that Unicode counts apart.

    Those are the vowels of Thai and Lao that stand before or after their consonant, and some of Myanmar.
    """
    before = r"\p{Indic_Positional_Category=Visual_Order_Left}"
    after = rf"[\p{{M}}[\p{{Indic_Syllabic_Category=Vowel_Dependent}}--{before}]]"
    return rf"{before}*(?={letter})\X{after}*"


_WORD = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]*"
_WORD_OR_CHARACTER = regex.compile(f"{_WORD}|{_character(_UNSPACED)}", regex.V1)
_ASCII_OR_CHARACTER = regex.compile("[a-z0-9]+|" + _character(r"[\p{L}\p{N}]"), regex.V1)
# Joiners, soft hyphens and the like, and what Armenian writes over a vowel of the word that is asked or stressed; the
# space of no width does separate.
_INVISIBLE = regex.compile(r"[[\p{Default_Ignorable_Code_Point}՛՜՞]--\u200b]", regex.V1)
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[[\p{Sentence_Break=STerm}།༎]--\p{ASCII}])", regex.V1)


class WordTokenizer:
    """Words of scripts with spaces between them, characters of the others: "用BERT训练3天" is 用, bert, 训, 练, 3, 天.

    A word is a run of letters, digits and their combining marks. Chinese, Japanese, Thai, Lao, Khmer, Myanmar, Tibetan
    and their like are split into characters, each with its marks and vowel signs. Case and Unicode form do not count
    (lower case, NFKC); punctuation is no token. Words of a-z and 0-9 are those of `rouge_score`, with its stems, so
    that ASCII text has `rouge_score`'s tokens.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer  # imports nltk, which is slow

        self.ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for are_ascii, run in groupby(_WORD_OR_CHARACTER.findall(_normalized(text)), str.isascii):
            words = [*run]
            tokens += self.ascii.tokenize(" ".join(words)) if are_ascii else words
        return tokens


class CharacterTokenizer:
    """One token for each character of every script, but for each run of a-z and 0-9, which is not stemmed.

    A character is a letter or digit with its marks and vowel signs. Case and Unicode form do not count (lower case,
    NFKC); spaces and punctuation are no tokens.
    """

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = _ASCII_OR_CHARACTER.findall(_normalized(text))
        return tokens


def one_sentence_per_line(text: str) -> str:
    """Put each sentence on a line of its own, as ROUGE-Lsum wants it.

    Sentences end at . ! ? with a space behind, and at the marks of other scripts (。 ؟ ۔ । ။ ። and the like) without.
    """
    lines: str = _SENTENCE_END.sub("\n", text)
    return lines


def _normalized(text: str) -> str:
    visible: str = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower())
    return visible

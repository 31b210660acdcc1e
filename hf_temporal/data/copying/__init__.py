"""The copying task in its forms: what stood earlier in a sequence is asked for later; its examples and its scores.

Examples are drawn on the fly: symbols, as in the literature, for models from scratch, or prompts for pretrained ones.
"""

from .arguments import CopyingArguments
from .digits import DigitCopies, digit_tokenizer
from .forms import FORMS
from .scores import CopyScores, argmax_of_logits
from .text import TextCopies, tokenize_texts

__all__ = [
    "FORMS",
    "CopyScores",
    "CopyingArguments",
    "DigitCopies",
    "TextCopies",
    "argmax_of_logits",
    "digit_tokenizer",
    "tokenize_texts",
]

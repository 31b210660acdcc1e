"""The forms of the copying task by name."""

from __future__ import annotations

from .digits import DigitCopies
from .examples import CopyingDataset
from .text import TextCopies

FORMS: dict[str, type[CopyingDataset]] = {
    "digits": DigitCopies,
    "text": TextCopies,
}

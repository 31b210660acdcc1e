"""The forms of the copying task by name."""

from __future__ import annotations

from .arithmetic import ArithmeticChains
from .digits import DigitCopies
from .examples import CopyingDataset
from .needles import Needles
from .symbols import AssociativeRecall, InductionHeads, SelectiveCopies
from .text import TextCopies

FORMS: dict[str, type[CopyingDataset]] = {
    "digits": DigitCopies,
    "text": TextCopies,
    "selective": SelectiveCopies,
    "induction": InductionHeads,
    "mqar": AssociativeRecall,
    "needles": Needles,
    "arithmetic": ArithmeticChains,
}

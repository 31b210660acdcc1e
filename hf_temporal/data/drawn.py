"""Data sets whose examples are drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from . import HELD_OUT_SEED, SPLITS, check_counts

Example = TypeVar("Example")


@dataclass(eq=False)
class DrawnDataset(Dataset[Example]):
    """`size` examples; the i-th depends on (seed, split, i) alone, however often and in whichever process it is drawn.

    The seed is that of the run; it changes the training examples alone.
    """

    _: KW_ONLY
    split: str
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}; accepted: {', '.join(map(repr, SPLITS))}.")
        check_counts(size=self.size)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self.size))

    def _generator(self, index: int) -> np.random.Generator:
        """The random numbers of one example; an index out of range raises IndexError, which ends a loop."""
        seed = self.seed if self.split == "train" else HELD_OUT_SEED
        return np.random.default_rng([seed, SPLITS.index(self.split), range(self.size)[index]])

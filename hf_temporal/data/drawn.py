"""Data sets whose examples are drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from . import HELD_OUT_SEED, SPLITS, check_counts

Example = TypeVar("Example")


class DrawnDataset(Dataset[Example]):
    """`size` examples; the i-th depends on (seed, split, i) alone, however often and in whichever process it is drawn.

    Args:
        split: "train", "validation" or "test".
        size: number of examples.
        seed: that of the run; it changes the training examples alone.

    Raises:
        ValueError: an unknown split, `size` below 1.
    """

    def __init__(self, *, split: str, size: int, seed: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}; accepted: {', '.join(map(repr, SPLITS))}.")
        check_counts(size=size)
        self.size = size
        self._seed = [seed if split == "train" else HELD_OUT_SEED, SPLITS.index(split)]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self.size))

    def _generator(self, index: int) -> np.random.Generator:
        """The random numbers of one example; an index out of range raises IndexError, which ends a loop."""
        return np.random.default_rng([*self._seed, range(self.size)[index]])

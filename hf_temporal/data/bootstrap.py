"""How sure a mean over examples is."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000


def bootstrap_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles of the means of `RESAMPLES` resamples of `values` `[examples, ...]`, seed 0."""
    resamples = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.array([values[resample].mean(axis=0) for resample in resamples])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high

"""Memory bias: how much a weighted squared error charges a mistake in the memory function at each lag."""

import torch
from torch import Tensor

from hf_temporal.data import check_counts
from hf_temporal.weighting import TemporalWeighting


def memory_bias(weighting: TemporalWeighting, length: int) -> Tensor:
    """b(s) = Σ_{r=s+1..T} w(r) for s = 0..T − 1, divided by Σ_s b(s); float64 `[length]`.

    A mistake in the memory function at lag s first shows at output time s + 1 and again at every later one. The
    flatter b is, the more long memory counts; it is flat, 1/T, where all weight is on the last time.

    For Σ_t w(t) (y_t − ŷ_t)² of linear functionals, up to the factor of the normalization: b(s) is half the second
    derivative along ρ̂(s) where x_t² = 1; where inputs of different times are uncorrelated and of variance 1, the mean
    gradient along ρ̂(s) is 2 b(s) (ρ̂(s) − ρ(s)).

    w(1), …, w(T) are the float32 `weights` of one document of T = `length` targets.

    Raises:
        ValueError: `length` below 1; a weighting without any weight at 1..T; what `weighting.weights` raises.

    Source: memory bias, Wang & Yan, arXiv 2307.11462, ∫_s^T w(r) dr there; here the sum for 1-based times.
    """
    check_counts(length=length)
    bias = weighting.weights(torch.arange(1, length + 1)).double().flip(0).cumsum(0).flip(0)
    if bias[0] == 0:
        raise ValueError(f"weighting={weighting!r} is 0 at 1..{length}; accepted: weights that are not all 0.")
    return bias / bias.sum()

"""The weights of one optimizer step: its micro-batches with their times become batches with weights, and D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .collator import DOCUMENTS, LOSS_WEIGHTS, POSITIONS, TARGETS, WEIGHTS, Batch
from .weighting import TemporalWeighting, wide_dtype

LARGEST_POWER_WITHOUT_ZEROS = 16.0


@dataclass(frozen=True)
class WeightedStep:
    """What belongs to one optimizer step.

    Attributes:
        batches: its micro-batches, with `temporal_weights` in place of their times.
        denominator: D of the loss Σ wℓ / D, over all of them and all ranks; 1 where there is no target. 0-dim float32.
        power: p in force.
        effective_sample_size: (Σw)²/Σw² as a share of the target tokens; 0-dim float32.
    """

    batches: list[Batch]
    denominator: Tensor
    power: float
    effective_sample_size: Tensor


def weigh_batches(
    batches: list[Batch],
    weighting: TemporalWeighting,
    *,
    gather: Callable[[Tensor], Tensor] | None,
    device: torch.device,
) -> WeightedStep:
    """Put `temporal_weights` in place of the times of the micro-batches of one optimizer step.

    Args:
        batches: as `Timeline.add` returns them; they are changed.
        weighting: at the power in force.
        gather: concatenates a tensor of each rank, where D is that of all ranks; None where it is this rank's.
        device: where the weights are wanted.
    """
    reference = None
    if weighting.normalization == "batch":
        times = torch.stack([weighting.reference_time_of(batch[POSITIONS]).to(device) for batch in batches])
        reference = weighting.reference_time_of(times)
        if gather is not None:
            reference = weighting.reference_time_of(gather(reference))
    has_zeros = weighting.weight_fn is not None or abs(weighting.power) > LARGEST_POWER_WITHOUT_ZEROS
    sums = torch.zeros(4, dtype=wide_dtype(device), device=device)
    for batch in batches:
        positions, own = batch.pop(POSITIONS).to(device), batch.pop(LOSS_WEIGHTS, None)
        documents = batch.pop(DOCUMENTS, None)
        documents = None if documents is None else documents.to(device)
        weights = weighting.weights(positions, document_ids=documents, reference_time=reference)
        if own is not None:
            weights = weights * own.to(weights)
        terms = weighting.denominator_terms(weights, positions, has_loss_weights=own is not None)
        wide = weights.to(sums.dtype)
        sums += torch.stack([terms.sum(), wide.sum(), wide.square().sum(), (positions > 0).sum()])
        batch[WEIGHTS] = weights
        if has_zeros:
            batch.pop(TARGETS, None)  # the list would keep positions of weight 0, which need no logits
    if gather is not None:
        sums = gather(sums).view(-1, len(sums)).sum(0)
    denominator, total, squares, count = sums.float()
    share = total**2 / (squares * count).clamp(min=torch.finfo(torch.float32).tiny)
    return WeightedStep(batches, denominator.where(denominator > 0, 1.0), weighting.power, share)

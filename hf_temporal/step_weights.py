"""The weights of one optimizer step: its micro-batches with their times become weights of their labels, and D."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .collator import DOCUMENTS, LOSS_WEIGHTS, POSITIONS, TARGETS, Batch
from .weighting import TemporalWeighting, wide_dtype

LARGEST_POWER_WITHOUT_ZEROS = 16.0


@dataclass
class WeightedLabels:
    """The labels of a micro-batch and their weights, by which a forward call with these labels is recognised."""

    labels: Tensor  # as they stand in the batch
    weights: Tensor  # of the shape of their first two dimensions, float32 (float64 for float64 weights of one's own)
    denominator: Tensor  # D of this micro-batch alone; 1 where there is no target. 0-dim float32
    targets: Tensor | None  # where in the flattened labels the targets are, where that is known
    version: int  # how often the labels had been changed in place when they were weighted
    is_split: bool = False  # whether ranks have split both in place, and the weights belong to `shift_labels`, if any

    def is_unchanged(self) -> bool:
        return self.is_split or self.labels._version == self.version

    def equal(self, labels: Tensor) -> bool:
        """Whether these are a copy of the labels, as on another device; NaN, which marks no target, equals NaN."""
        if labels.shape != self.labels.shape or not self.is_unchanged():
            return False
        return torch.allclose(labels.to(self.labels), self.labels, rtol=0, atol=0, equal_nan=True)


@dataclass(frozen=True)
class WeightedStep:
    """What belongs to one optimizer step."""

    batches: list[Batch]  # its micro-batches, without their times
    weighted: list[WeightedLabels]  # the weights of their labels
    denominator: Tensor  # D of the loss Σ wℓ / D, over all of them and all ranks; 1 without a target. 0-dim float32
    power: float  # p in force
    effective_sample_size: Tensor  # (Σw)²/Σw² as a share of the target tokens; 0-dim float32

    def find(self, labels: Tensor) -> WeightedLabels | None:
        """The weights of these labels: those of the very tensor if it is among them, else of one that is equal.

        A copy of labels that are weighted in two ways is a `ValueError`.
        """
        for each in self.weighted:
            if each.labels is labels:
                return each if each.is_unchanged() else None
        equal = [each for each in self.weighted if each.equal(labels)]
        if any(not torch.equal(each.weights, equal[0].weights) for each in equal[1:]):
            raise ValueError(
                "two micro-batches of an optimizer step have the same labels and other weights, and the labels were "
                "copied since; accepted: a data loader that puts batches on the device itself, as accelerate's do."
            )
        return equal[0] if equal else None


def weigh_batches(
    batches: list[Batch],
    weighting: TemporalWeighting,
    *,
    gather: Callable[[Tensor], Tensor] | None,
    device: torch.device,
) -> WeightedStep:
    """Make weights of the times of an optimizer step's micro-batches, which are as `Timeline.add` returns them.

    The batches are changed. `weighting` is that at the power in force. `gather` concatenates a tensor of each rank,
    where D is that of all ranks; None where it is this rank's.
    """
    reference = None
    if weighting.normalization == "batch":
        times = torch.stack([weighting.reference_time_of(batch[POSITIONS]).to(device) for batch in batches])
        reference = weighting.reference_time_of(times)
        if gather is not None:
            reference = weighting.reference_time_of(gather(reference))
    has_zeros = weighting.weight_fn is not None or abs(weighting.power) > LARGEST_POWER_WITHOUT_ZEROS
    sums = torch.zeros(4, dtype=wide_dtype(device), device=device)
    weighted = []
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
        targets = batch.pop(TARGETS, None)
        batch.pop("document_ids", None)
        labels = batch["labels"]
        weighted.append(
            WeightedLabels(
                labels,
                weights,
                _not_zero(terms.sum().float()),
                None if has_zeros else targets,  # the list would keep positions of weight 0, which need no logits
                labels._version,
            )
        )
    if gather is not None:
        sums = gather(sums).view(-1, len(sums)).sum(0)
    denominator, total, squares, count = sums.float()
    share = total**2 / (squares * count).clamp(min=torch.finfo(torch.float32).tiny)
    return WeightedStep(batches, weighted, _not_zero(denominator), weighting.power, share)


def _not_zero(denominator: Tensor) -> Tensor:
    return denominator.where(denominator > 0, 1.0)

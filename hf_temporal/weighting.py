"""The weight of a target token as a function of its time, w(t) = t^p, and how it is normalised."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .positions import ORIGINS, check_choice, check_integers, check_shape, document_starts

WEIGHTING_NAME = "temporal_weighting.json"
NORMALIZATIONS = ("sequence", "batch", "tokens")
REGRESSION_LOSSES = ("squared", "absolute")

WeightFunction = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TemporalWeighting:
    """Weight each target token by its time in the document: w = t^p.

    - `normalization="sequence"`: w = (t/T)^p rescaled to mean 1 over the target tokens of its document, T being
      the document's largest t. The loss is Σ wℓ divided by the number of target tokens.
    - `"batch"`: w = t^p, and the loss is Σ wℓ / Σ w over the whole accumulated batch of all ranks.
    - `"tokens"`: w = t^p, and the loss is Σ wℓ divided by the number of target tokens, (1/T) Σ_t t^p ℓ_t.

    With a `mixture` of λ, w is (1 − λ) + λ·w: the mean of the usual loss and the weighted one, which leaves no target
    token with less than 1 − λ of its usual weight.

    Args:
        power: p, any float but NaN and −inf. 0 is the usual loss; `inf` puts all weight on the last target token of
            each document (under `"batch"` on the tokens of globally largest t).
        origin: where t starts, see `target_positions`.
        weight_fn: `weight_fn(t, T) -> w`, a shape of one's own in place of t^p: called with float64 tensors of one
            value per target token, returns finite weights ≥ 0 of the same shape. `power` then has no effect.
        regression_loss: the error of float labels, `"squared"` or `"absolute"`.
        mixture: λ, from 0 (the usual loss) to 1; less than 1 under `"sequence"` alone, whose weights have mean 1.

    Raises:
        ValueError, TypeError: a field whose value is not accepted; the message names it.

    Source: temporally rescaled errors, Wang & Yan, arXiv 2307.11462.
    """

    power: float = 1.0
    origin: str = "target"
    normalization: str = "sequence"
    weight_fn: WeightFunction | None = None
    regression_loss: str = "squared"
    mixture: float = 1.0

    def __post_init__(self) -> None:
        for name, accepted in (("power", "any float but NaN and -inf"), ("mixture", "a float from 0 to 1")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r} is not a number; accepted: {accepted}.")
        if isinstance(self.power, int) and abs(self.power) > sys.float_info.max:
            raise ValueError("power is an integer that is no float any more; accepted: any float but NaN and -inf.")
        if math.isnan(self.power) or self.power == -math.inf:
            raise ValueError(f"power={self.power!r} is out of range; accepted: any float but NaN and -inf.")
        if not 0 <= self.mixture <= 1:
            raise ValueError(f"mixture={self.mixture!r} is out of range; accepted: 0 to 1.")
        check_choice("origin", self.origin, ORIGINS)
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        check_choice("regression_loss", self.regression_loss, REGRESSION_LOSSES)
        if self.mixture < 1 and self.normalization != "sequence":
            raise ValueError(
                f"mixture={self.mixture!r} with normalization={self.normalization!r}: weights whose mean is not 1 "
                "cannot be mixed with the usual ones; accepted: normalization='sequence', or mixture=1."
            )
        if self.weight_fn is not None and not callable(self.weight_fn):
            raise TypeError(f"weight_fn={self.weight_fn!r} is not callable; accepted: a function (t, T) -> w.")

    def at(self, power: float) -> TemporalWeighting:
        return self if power == self.power else dataclasses.replace(self, power=power)

    def weights(
        self, positions: Tensor, *, document_ids: Tensor | None = None, reference_time: Tensor | None = None
    ) -> Tensor:
        """The weight of each target token, 0 off the targets; float32 of the shape of `positions`.

        t^p is computed as exp(p·(log t − log t*)), where t* is the time of the largest weight, so that nothing
        overflows and no sum is zero. Each document has its own t* under `"sequence"`; under `"batch"` all have one,
        so that weights are t^p up to a common factor; under `"tokens"` it is 1.

        Args:
            positions: `[batch, time]` or `[time]` integers as `target_positions` returns them.
            document_ids: of the same shape for packed rows; without it each row is one document.
            reference_time: t* under `"batch"`, broadcastable, where calls have to agree; see `reference_time_of`.

        Raises:
            ValueError, TypeError: positions or `document_ids` of another shape or type; `"tokens"` where t^p is no
                normal float32; weights of `weight_fn` that are negative, not finite or of another shape.
        """
        check_integers("positions", positions)
        if document_ids is not None:
            check_shape("document_ids", document_ids, positions.shape)
            check_integers("document_ids", document_ids)
        if positions.numel() == 0:
            return torch.zeros_like(positions, dtype=torch.float32)
        target = positions > 0
        segments = None if document_ids is None else _segments(target, document_ids)
        raw = self._raw(positions, target, segments, reference_time)
        if self.normalization == "sequence":
            total = _segment_sum(raw, segments)
            raw = raw * (_segment_sum(target.to(raw.dtype), segments) / total.where(total > 0, 1))
        if self.mixture < 1:
            raw = (1 - self.mixture) * target + self.mixture * raw
        return raw.float()

    def denominator_terms(self, weights: Tensor, positions: Tensor, *, has_loss_weights: bool) -> Tensor:
        """What each token adds to the D of the loss Σ wℓ / D, in the weights' shape: 1 for each target.

        Its weight under `"batch"`, and under `"sequence"` with a data set's own weights, whose mean is not 1.
        """
        by_weight = self.normalization == "batch" or (has_loss_weights and self.normalization == "sequence")
        return (weights if by_weight else positions > 0).to(wide_dtype(weights.device))

    def reference_time_of(self, positions: Tensor, *, by_row: bool = False) -> Tensor:
        """The largest t, or the smallest where p < 0: 0-dim, or `[batch, 1]` by row; 0 if there is no target."""
        if positions.numel() == 0:
            return positions.new_zeros((len(positions), 1) if by_row else ())
        dims = (-1,) if by_row else tuple(range(positions.dim()))
        if self.power >= 0:
            return positions.amax(dims, keepdim=by_row)
        far = torch.iinfo(positions.dtype).max
        smallest = positions.where(positions > 0, far).amin(dims, keepdim=by_row)
        return smallest.where(smallest != far, 0)

    def _raw(
        self, positions: Tensor, target: Tensor, segments: Tensor | None, reference_time: Tensor | None
    ) -> Tensor:
        if self.weight_fn is not None:
            return self._own(positions, segments)
        if self.normalization == "sequence":
            if self.power >= 0:
                reference = _segment_max(positions, segments)
            else:
                reference = -_segment_max(-positions.where(target, positions.amax()), segments)
        elif self.normalization == "batch":
            reference = self.reference_time_of(positions) if reference_time is None else reference_time
        else:
            self._check_range(positions)
            reference = torch.ones((), dtype=positions.dtype, device=positions.device)
        time = positions.where(target, reference)
        if math.isinf(self.power):
            return ((time == reference) & target).to(wide_dtype(positions.device))
        ratio = time.clamp(min=1).to(wide_dtype(positions.device)) / reference.clamp(min=1)
        return torch.exp(self.power * ratio.log()) * target

    def _own(self, positions: Tensor, segments: Tensor | None) -> Tensor:
        target, time = positions > 0, positions.to(wide_dtype(positions.device))
        largest = _segment_max(positions, segments).to(time.dtype).expand_as(time)
        own = self.weight_fn(time[target], largest[target])  # type: ignore[misc]
        if not isinstance(own, Tensor) or own.shape != time[target].shape:
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"weight_fn returned {shape}; accepted: a tensor of shape {tuple(time[target].shape)}.")
        check_weights("weight_fn's result", own)
        return torch.zeros_like(time).masked_scatter(target, own.to(time.dtype))

    def _check_range(self, positions: Tensor) -> None:
        latest = int(positions.max())
        exponent = self.power * math.log(max(latest, 1))
        limits = torch.finfo(torch.float32)
        if math.isinf(self.power) or not math.log(limits.tiny) <= exponent <= math.log(limits.max):
            raise ValueError(
                f"power={self.power!r} leaves float32 at t = {latest} under normalization='tokens'; accepted: powers "
                "whose t^p is a normal float32, or normalization='sequence' or 'batch', which work with ratios."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: an infinite power as `"inf"`, `weight_fn` as its qualified name."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.power):
            fields["power"] = "inf"
        if self.weight_fn is not None:
            name = getattr(self.weight_fn, "__qualname__", type(self.weight_fn).__qualname__)
            fields["weight_fn"] = f"{getattr(self.weight_fn, '__module__', '')}.{name}"
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TemporalWeighting:
        """The inverse of `to_dict`; a `ValueError` names an unknown field, or a `weight_fn`, which is only a name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"{', '.join(unknown)}: unknown; accepted: {', '.join(sorted(known))}.")
        if fields.get("weight_fn") is not None:
            raise ValueError(
                f"weight_fn={fields['weight_fn']!r} is only a name in a file; accepted: a TemporalWeighting made "
                "with the function itself."
            )
        return cls(**{**fields, "power": float(fields.get("power", cls.power))})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `temporal_weighting.json` into a folder, making it if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTING_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TemporalWeighting:
        """Read `temporal_weighting.json` from a folder, for instance a checkpoint."""
        return cls.from_dict(json.loads((Path(folder) / WEIGHTING_NAME).read_text(encoding="utf-8")))


def check_weights(name: str, weights: Tensor) -> None:
    """Raise a `ValueError` where a weight is negative, infinite or NaN."""
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        raise ValueError(f"{name} holds {weights[bad][0].item()}; accepted: finite numbers ≥ 0.")


def document_max(values: Tensor, document_ids: Tensor | None) -> Tensor:
    """The largest integer in each token's document, broadcastable to the `[batch, time]` values."""
    return _segment_max(values, None if document_ids is None else _segments(values > 0, document_ids))


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _segments(target: Tensor, document_ids: Tensor) -> Tensor:
    starts = document_starts(target, document_ids)
    return (starts.flatten().cumsum(0) - 1).view(starts.shape)


def _segment_sum(values: Tensor, segments: Tensor | None) -> Tensor:
    """The sum over each token's document, broadcastable to `values`."""
    if segments is None:
        return values.sum(-1, keepdim=True)
    flat = segments.flatten()
    sums = values.new_zeros(values.numel()).index_add_(0, flat, values.flatten())
    return sums.index_select(0, flat).view(values.shape)


def _segment_max(values: Tensor, segments: Tensor | None) -> Tensor:
    """The largest integer in each token's document, broadcastable to `values`.

    Running maxima from both ends, kept apart by adding a multiple of the values' range to each document, are much
    faster on a CPU than a scatter.
    """
    if segments is None:
        return values.amax(-1, keepdim=True)
    flat = values.flatten()
    rising = segments.flatten() * (flat.amax() - flat.amin() + 1)
    ahead = (flat + rising).cummax(0).values - rising
    behind = (flat - rising).flip(0).cummax(0).values.flip(0) + rising
    return ahead.maximum(behind).view(values.shape)

"""Loss by position: what an evaluation adds to the trainer's own metrics, and the file that keeps it."""

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import check_vocabulary, token_regression_loss
from .positions import IGNORE_INDEX, shift_left, target_positions
from .tables import write_json
from .weighting import TemporalWeighting, document_max

PROFILE_NAME = "loss_by_position.json"
BINS = 10
ENDS = ("first_token", "last_token", "head", "tail")
WEIGHTED = ("sum", "denominator", "reference_time")
LOGITS_AT_ONCE = {"cpu": 1 << 20}  # 4 MiB in float32, which caches hold; for less, the cores would wait for each other
LOGITS_AT_ONCE_ELSEWHERE = 1 << 26


class TokenBatch(NamedTuple):
    """The losses of a batch's target tokens, 0 off the targets, and what goes with them; all `[batch, time]`."""

    losses: Tensor
    correct: Tensor | None  # whether the model ranks the token first; None for float labels
    positions: Tensor  # t of each label, 0 off the targets
    document_ids: Tensor | None  # for packed rows
    loss_weights: Tensor | None  # a data set's own


def token_losses(
    logits: Tensor, labels: Tensor, target: Tensor, *, shifts_labels: bool, regression_loss: str
) -> tuple[Tensor, Tensor | None]:
    """`losses` and `correct` of a `TokenBatch`, with its own logits `[batch, time, V]` or predictions.

    `target` tells which labels are targets, and `shifts_labels` whether the logits at i answer the label at i + 1.
    """
    if labels.is_floating_point():
        return token_regression_loss(logits, labels, kind=regression_loss), None
    answered = shift_left(target, False) if shifts_labels else target
    of_targets, correct_targets = losses_and_hits(logits, answered, labels[target])
    losses, correct = of_targets.new_zeros(labels.shape), torch.zeros_like(target)
    losses[target], correct[target] = of_targets, correct_targets
    return losses, correct


@torch.no_grad()
def losses_and_hits(logits: Tensor, answered: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax(logits_i)[labels_i], and whether argmax(logits_i) = labels_i, at each of the positions answered.

    Computed in float32 (float64 for float64 logits), a few positions at a time, so that their logits stay in a CPU's
    cache from one pass over them to the next. No gradients are kept. On the CPU, a label out of the vocabulary is a
    `ValueError`.

    Args:
        logits: `[batch, time, V]`.
        answered: `[batch, time]` booleans, n of them true.
        labels: `[n]`, in the order of rows, as the two results are.
    """
    logits = logits.flatten(0, 1)
    vocabulary = logits.shape[-1]
    check_vocabulary(labels, vocabulary)
    rows = answered.flatten().nonzero()[:, 0]
    at_once = max(1, LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE_ELSEWHERE) // vocabulary)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scratch = logits.new_empty(min(at_once, len(rows)), vocabulary, dtype=dtype)
    losses, hits = [], []
    for some, wanted in zip(rows.split(at_once), labels.long()[:, None].split(at_once), strict=True):
        log_p, at = scratch[: len(some)], some.tolist()
        ends = [place for place in range(1, len(at)) if at[place] != at[place - 1] + 1]
        for start, end in pairwise([0, *ends, len(at)] if at else []):  # neighbours are read where they lie
            run = logits[at[start] : at[end - 1] + 1]
            torch.log_softmax(run, -1, dtype=dtype, out=log_p[start:end])
        own = log_p.gather(1, wanted)
        others = log_p.scatter_(1, wanted, -torch.inf).amax(-1, keepdim=True)
        tied = (own == others).nonzero()[:, 0]
        losses.append(-own[:, 0])
        hits.append((own > others)[:, 0])
        hits[-1][tied] = logits[some[tied]].argmax(-1) == wanted[tied, 0]  # of equals, argmax is the first
    return torch.cat(losses), torch.cat(hits)


class PositionProfile:
    """The weighted loss over a data set's target tokens; loss and accuracy by decile of t/T, and loss at both ends.

    Sums are gathered by example, so that `gather` (`Accelerator.gather_for_metrics`) can drop the examples that only
    fill up the last batch of a process: every token counts once on any number of processes.

    - weighted loss: Σ wℓ / D as in training, at the weighting given;
    - head and tail loss: mean ℓ over the first and the last ⌈T/4⌉ target tokens of each document;
    - first and last token loss: mean ℓ over the first and the last target token of each document;
    - bin k: the target tokens with k/10 < t/T ≤ (k + 1)/10.
    """

    def __init__(self, weighting: TemporalWeighting, gather: Callable[[Tensor], Tensor], *, batch_size: int) -> None:
        self.weighting, self._gather, self._batch_size = weighting, gather, batch_size
        self._sums: Tensor | None = None
        self._weighted: list[Tensor] = []
        self._has_accuracy = True

    def add(self, batch: TokenBatch) -> None:
        losses, correct, positions, document_ids, _ = batch
        self._has_accuracy = correct is not None
        correct = torch.zeros_like(losses) if correct is None else correct
        target = positions > 0
        rank = target_positions(torch.where(target, 0, IGNORE_INDEX), document_ids=document_ids)
        last_rank, last_time = (document_max(values, document_ids) for values in (rank, positions))
        quarter = (last_rank + 3) // 4
        bins = (positions * BINS - 1).div(last_time.clamp(min=1), rounding_mode="floor").clamp(min=0)
        ends = torch.stack([rank == 1, rank == last_rank, rank <= quarter, rank > last_rank - quarter], dim=-1)
        deciles = bins[..., None] == torch.arange(BINS, device=bins.device)
        parts = torch.cat([ends, deciles], dim=-1) & target[..., None]
        values = torch.stack([losses, correct.to(losses), target.to(losses)], dim=-1)
        reference = self.weighting.reference_time_of(positions, by_row=True)
        weighted = self._weighted_terms(batch, reference)
        example = self._examples(positions, document_ids)
        terms = torch.cat([(parts[..., None] * values[..., None, :]).flatten(-2), weighted], dim=-1).flatten(0, 1)
        sums = terms.new_zeros(int(example.max()) + 1, terms.shape[-1])
        sums.index_add_(0, example.flatten(), terms)
        times = torch.zeros_like(sums[:, :1])
        times[example.flatten(), 0] = reference.expand_as(example).flatten().to(times)
        gathered = self._gather(torch.cat([sums, times], dim=-1))
        unweighted = gathered[:, : -len(WEIGHTED)].sum(0)
        self._sums = unweighted if self._sums is None else self._sums + unweighted
        self._weighted.append(gathered[:, -len(WEIGHTED) :])

    def _examples(self, positions: Tensor, document_ids: Tensor | None) -> Tensor:
        """The example that each token belongs to, as an index: its row, or its document in flattened batches."""
        rows = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
        if document_ids is None or len(positions) == self._batch_size:
            return rows
        documents = document_ids + (document_ids[:, -1:] + 1).cumsum(0) - document_ids[:, -1:] - 1
        return documents if int(documents[-1, -1]) + 1 == self._batch_size else rows

    def _weighted_terms(self, batch: TokenBatch, reference: Tensor) -> Tensor:
        """wℓ of each token and what it adds to D; a row's largest weight is that at its `reference` time."""
        losses, _, positions, document_ids, loss_weights = batch
        weights = self.weighting.weights(positions, document_ids=document_ids, reference_time=reference).to(losses)
        if loss_weights is not None:
            weights = weights * loss_weights.to(losses)
        terms = self.weighting.denominator_terms(weights, positions, has_loss_weights=loss_weights is not None)
        return torch.stack([weights * losses, terms.to(losses)], dim=-1)

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>_temporal_loss`, and `<prefix>_<end>_loss` for each of `ENDS`; nothing without a target token."""
        if self._sums is None or float(self._sums[2]) == 0:
            return {}
        sums, counts, times = torch.cat(self._weighted).unbind(-1)
        if self.weighting.normalization == "batch" and self.weighting.weight_fn is None:
            factors = self.weighting.weights(times.long()[None])[0].to(sums)
            sums, counts = sums * factors, counts * factors
        ends = self._sums[: 3 * len(ENDS)].view(-1, 3)
        return {f"{prefix}_temporal_loss": _ratio(sums.sum(), counts.sum())} | {
            f"{prefix}_{end}_loss": _ratio(loss, count) for end, (loss, _, count) in zip(ENDS, ends, strict=True)
        }

    def bins(self) -> list[dict[str, Any]]:
        """The ten bins of the profile, in the schema of `save_profile`."""
        sums = [] if self._sums is None else self._sums[3 * len(ENDS) :].view(BINS, 3).tolist()
        return [
            {
                "from": index / BINS,
                "to": (index + 1) / BINS,
                "loss": loss / count if count else None,
                "accuracy": right / count if count and self._has_accuracy else None,
                "count": int(count),
            }
            for index, (loss, right, count) in enumerate(sums)
        ]


def save_profile(path: str | os.PathLike[str], *, split: str, step: int, bins: list[dict[str, Any]]) -> None:
    """Add one evaluation's profile to a JSON file, replacing those of the same split at this or a later step.

    Schema: `{"version": 1, "profiles": [{"split": "eval", "step": 0, "bins": [{"from": 0.0, "to": 0.1, "loss": 3.1,
    "accuracy": 0.4, "count": 123}, …]}, …]}` with ten bins: the target tokens with from < t/T ≤ to, their mean
    unsmoothed, unweighted loss, the share of them that the model ranks first and their number. `loss` and `accuracy`
    are null where `count` is 0, `accuracy` also for float labels. The file is replaced as a whole, never half written.
    """
    path = Path(path)
    known = load_profiles(path) if path.exists() else []
    kept = [profile for profile in known if profile["split"] != split or profile["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": 1, "profiles": [*kept, {"split": split, "step": step, "bins": bins}]}
    write_json(path, content, line_by_line="profiles")


def load_profiles(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the profiles in a file that `save_profile` wrote, oldest first; any other content is a `ValueError`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise KeyError("version")
        return list(content["profiles"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a {PROFILE_NAME} of version 1 ({error!r}).") from None


def evaluation_profiles(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the profiles of the evaluation split in a run's folder, oldest first; none if there is no file."""
    path = Path(folder) / PROFILE_NAME
    return [each for each in load_profiles(path) if each["split"] == "eval"] if path.is_file() else []


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total / count) if float(count) > 0 else 0.0

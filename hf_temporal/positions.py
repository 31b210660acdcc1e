"""The time t of each target token, from the labels (−100, padding, prompts, turns, packed documents)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
SIGNED_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
ORIGINS = ("target", "sequence", "turn")


def is_target(labels: Tensor) -> Tensor:
    """Whether each label is a target: an integer other than −100, or floats of which none is NaN; of `time_shape`."""
    if labels.is_floating_point():
        mask = ~labels.isnan()
        return mask.flatten(2).all(-1) if mask.dim() > 2 else mask
    return labels != IGNORE_INDEX


def time_shape(labels: Tensor) -> torch.Size:
    """`labels.shape` without the trailing dimensions that float labels may have: `[batch, time]` or `[time]`."""
    return labels.shape[:2] if labels.is_floating_point() else labels.shape


def target_positions(
    labels: Tensor, *, origin: str = "target", document_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """The 1-based time t of each target token, 0 where there is no target; `t[i]` belongs to `labels[i]`.

    `origin="target"`: t counts the target tokens of a document, so the k-th of them has t = k.
    `origin="sequence"`: t is the token's column in its document, prompt included, left padding excluded.
    `origin="turn"`: as `"target"`, starting at 1 again with every contiguous run of targets.

    Args:
        labels: `[batch, time]` or `[time]` integers, −100 where there is no target; or floats `[batch, time, ...]`,
            NaN where there is no target.
        origin: one of `"target"`, `"sequence"`, `"turn"`.
        document_ids: `[batch, time]` integers, which change where a document starts; without it each row is one.
        attention_mask: `[batch, time]`, whose leading zeros are the left padding; only `"sequence"` needs it.

    Raises:
        ValueError, TypeError: an unknown `origin`, labels of another shape or type, or a shape other than theirs.
    """
    check_choice("origin", origin, ORIGINS)
    if not (isinstance(labels, Tensor) and labels.is_floating_point()):
        check_integers("labels", labels)
    if labels.dim() == 0 or (labels.dim() > 2 and not labels.is_floating_point()):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; accepted: [batch, time] or [time], and floats with more behind."
        )
    target = is_target(labels)
    for name, tensor in (("document_ids", document_ids), ("attention_mask", attention_mask)):
        if tensor is not None:
            check_shape(name, tensor, target.shape)
    if document_ids is not None:
        check_integers("document_ids", document_ids)
    if target.numel() == 0:
        return torch.zeros_like(target, dtype=torch.long)
    starts = document_starts(target, document_ids)
    if origin == "sequence":
        column = torch.arange(1, target.shape[-1] + 1, device=target.device).expand(target.shape)
        before = torch.where(starts, column - 1, 0).cummax(-1).values
        if attention_mask is not None:
            before = before.maximum((attention_mask != 0).int().cumsum(-1).eq(0).sum(-1, keepdim=True))
        return (column - before).clamp(min=0) * target
    if origin == "turn":
        starts = starts | (target & ~target.roll(1, -1))
    count = target.long().cumsum(-1)
    before = torch.where(starts, count - target.long(), 0).cummax(-1).values
    return (count - before) * target


def check_choice(name: str, value: Any, accepted: Sequence[str]) -> None:
    """Raise a `ValueError` where the value of an argument is none of those that are accepted."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not known; accepted: {', '.join(map(repr, accepted))}.")


def check_integers(name: str, values: Any) -> None:
    """Raise a `TypeError` where an argument is no tensor, a `ValueError` where it is none of signed integers.

    Unsigned ones cannot hold −100, and PyTorch takes 156 for it.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} of type {type(values).__name__}; accepted: a tensor of integers.")
    if values.dtype not in SIGNED_INTEGERS:
        raise ValueError(f"{name} of dtype {values.dtype}; accepted: signed integers.")


def check_shape(name: str, values: Any, shape: torch.Size) -> None:
    """Raise a `TypeError` where an argument is no tensor, a `ValueError` where its shape is not that of the labels."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} of type {type(values).__name__}; accepted: a tensor of shape {tuple(shape)}.")
    if values.shape != shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; accepted: {tuple(shape)}, that of the labels.")


def document_starts(target: Tensor, document_ids: Tensor | None) -> Tensor:
    """Whether each token is the first of its document; booleans of the shape of `target`."""
    starts = torch.zeros_like(target, dtype=torch.bool)
    starts[..., 0] = True
    if document_ids is not None:
        starts[..., 1:] = document_ids[..., 1:] != document_ids[..., :-1]
    return starts


def shift_left(tensor: Tensor, fill: float) -> Tensor:
    """Move each row one place to the left, so that what belongs to label i + 1 stands at i, as its logits do."""
    return torch.nn.functional.pad(tensor[..., 1:], (0, 1), value=fill)


def document_ids_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The index of each token's document, 0, 1, … from the left of its row; None if rows are not packed.

    It is read from the first of these that a data collator's batch has: `document_ids`, `seq_idx`, `cu_seq_lens_q`,
    `position_ids` (a document starts where `position_ids[i] ≠ position_ids[i−1] + 1` among unmasked tokens). `labels`
    or `input_ids` give the shape `[batch, time]`.

    Raises:
        ValueError, TypeError: a 4-D `attention_mask` without any of the four keys, since it may hide documents; a key
            without integers or of another shape; `cu_seq_lens_q` that do not rise from 0 to the number of tokens.
    """
    reference = batch["labels"] if batch.get("labels") is not None else batch.get("input_ids")
    if reference is None or reference.dim() < 2:
        return None
    mask = batch.get("attention_mask")
    for key in ("document_ids", "seq_idx"):
        if batch.get(key) is not None:
            ids = _as_rows(key, batch[key], reference)
            return _run_index(ids[:, 1:] != ids[:, :-1])
    if batch.get("cu_seq_lens_q") is not None:
        columns = torch.arange(reference.shape[0] * reference.shape[1], device=reference.device)
        ends = _document_ends(batch["cu_seq_lens_q"], len(columns)).to(reference.device)
        ids = torch.searchsorted(ends, columns, right=True).view(reference.shape[:2])
        return _run_index(ids[:, 1:] != ids[:, :-1])
    if batch.get("position_ids") is not None:
        ids = _as_rows("position_ids", batch["position_ids"], reference)
        starts = ids[:, 1:] != ids[:, :-1] + 1
        if mask is not None and mask.dim() == 2:
            starts &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        return _run_index(starts)
    if mask is not None and mask.dim() == 4:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: a 4-D mask may pack several documents into a row, and "
            "t starts anew with each. Accepted beside it: document_ids, seq_idx, cu_seq_lens_q or position_ids."
        )
    return None


def _document_ends(bounds: Tensor, tokens: int) -> Tensor:
    check_integers("cu_seq_lens_q", bounds)
    bounds = bounds.flatten().long()
    if bounds.device.type == "cpu":  # elsewhere it would cost a device sync
        found = bounds.tolist()
        if not found or found[0] != 0 or found[-1] > tokens or found != sorted(found):
            raise ValueError(
                f"cu_seq_lens_q={found} for {tokens} tokens; accepted: 0 and then the end of each document, rising to "
                "at most the number of tokens."
            )
    return bounds[1:]


def _as_rows(key: str, ids: Tensor, reference: Tensor) -> Tensor:
    check_integers(key, ids)
    rows = ids[0] if ids.dim() == 3 else ids
    if rows.dim() != 2 or rows.shape[0] not in (1, reference.shape[0]) or rows.shape[1] != reference.shape[1]:
        raise ValueError(
            f"{key} has shape {tuple(ids.shape)}; accepted: {tuple(reference.shape[:2])}, that of the labels."
        )
    return rows.expand(reference.shape[:2])


def _run_index(starts: Tensor) -> Tensor:
    """How many runs have started in a row before and at each token; `starts` begins at the second token."""
    return torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0))

"""Gives each batch its times, in a wrapper around any data collator."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)

from ._trl import is_sft_collator
from .losses import check_vocabulary
from .positions import (
    IGNORE_INDEX,
    check_shape,
    document_ids_of,
    document_starts,
    is_target,
    target_positions,
    time_shape,
)
from .weighting import check_weights

POSITIONS = "temporal_positions"
DOCUMENTS = "temporal_document_ids"
LOSS_WEIGHTS = "loss_weights"
KEPT_COLUMNS = (LOSS_WEIGHTS, "document_ids")
TARGETS = "temporal_targets"
TIMES = (POSITIONS, DOCUMENTS, TARGETS)
OWN_KEYS = (*TIMES, *KEPT_COLUMNS)

PADDING_COLLATORS = (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
)

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Adds `temporal_positions` (t of each label) and, for packed rows, `temporal_document_ids` to a batch.

    If `shifts_labels`, the model's loss compares the logits at i with the label at i + 1, and the first real token of
    a row or document never is a target. If `lists_targets`, batches also get `temporal_targets`, the places of targets
    in the flattened labels, computed on the CPU to avoid a device sync; not for a loader that cuts batches into rows.
    """

    origin: str  # see `target_positions`
    shifts_labels: bool
    encoder_decoder: bool  # whether labels belong to a decoder
    takes_position_ids: bool  # whether left-padded rows are given `position_ids` that start after the padding
    takes_packed_rows: bool  # whether the model keeps the documents of a row apart
    ranks_per_row: int  # how many ranks a row is split between by context parallelism
    vocabulary: int | None  # labels have to lie below it; None where it is not known
    pad_token_id: int | None  # what the decoder is fed on padding; None where it is not known
    lists_targets: bool = False

    def add(self, batch: Mapping[str, Any], *, pads_left: bool = False) -> Batch:
        """Add its times to a batch of a data collator, unless it has them, or has no labels over time.

        `pads_left` tells whether the collator is known to pad rows on the left.

        Raises:
            ValueError: packed rows with a 2-D `attention_mask` (attention would cross documents), one of another shape
                than the tokens, packed or left-padded rows of an encoder–decoder model, labels outside the vocabulary,
                `loss_weights` that are negative, not finite or of another shape than the labels; and what
                `document_ids_of` raises.
        """
        batch = dict(batch)
        labels = batch.get("labels")
        if POSITIONS in batch or not has_time(labels):
            return batch
        assert labels is not None
        if self.vocabulary is not None and not labels.is_floating_point():
            check_vocabulary(labels, self.vocabulary)
        shape, mask = time_shape(labels), batch.get("attention_mask")
        has_tokens = self.shifts_labels and getattr(batch.get("input_ids"), "shape", None) == shape
        if has_tokens and isinstance(mask, Tensor) and mask.dim() == 2:
            check_shape("attention_mask", mask, shape)
        mask = mask if isinstance(mask, Tensor) and mask.shape == shape else None
        if self.encoder_decoder:
            self._check_seq2seq(batch, labels)
            documents = mask = None
        else:
            documents = self._documents(batch)
        if self.ranks_per_row > 1:
            self._check_split(labels, documents, mask)
        targets = self._without_first_tokens(labels, documents, mask)
        batch[POSITIONS] = target_positions(targets, origin=self.origin, document_ids=documents, attention_mask=mask)
        if not self.encoder_decoder:  # in every batch, since a dispatching loader takes the keys of its first
            batch[DOCUMENTS] = torch.zeros_like(batch[POSITIONS]) if documents is None else documents
        needs_position_ids = self.takes_position_ids and "position_ids" not in batch
        if needs_position_ids and mask is not None and (pads_left or _is_left_padded(mask)):
            batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        weighted = batch[POSITIONS] > 0
        if batch.get(LOSS_WEIGHTS) is not None:
            own = batch[LOSS_WEIGHTS] = torch.as_tensor(batch[LOSS_WEIGHTS])
            check_shape(LOSS_WEIGHTS, own, weighted.shape)
            check_weights(LOSS_WEIGHTS, own)
            weighted &= own != 0
        if self.lists_targets and labels.device.type == "cpu" and not labels.is_floating_point():
            batch[TARGETS] = weighted.flatten().nonzero().squeeze(1)
        return batch

    def _documents(self, batch: Batch) -> Tensor | None:
        documents = document_ids_of(batch)
        if documents is None or not documents.any():
            return None
        mask = batch.get("attention_mask")
        if not self.takes_packed_rows and (mask is None or mask.dim() < 4):
            raise ValueError(
                "several documents in a row, which this model does not keep apart: prompt tuning, and a model that "
                "does not read where position_ids start again (ALiBi, a recurrence, a convolution), let one document "
                "depend on those before it. Accepted: one document per row (no packing)."
            )
        if mask is not None and mask.dim() == 2:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} with several documents in a row: attention would cross "
                "documents. Accepted: packed rows without attention_mask (position_ids keep documents apart), or with "
                "a 4-D one."
            )
        return documents

    def _check_split(self, labels: Tensor, documents: Tensor | None, mask: Tensor | None) -> None:
        split = f"rows split between {self.ranks_per_row} ranks (cp_size)"
        accepted = "accepted: rows of one document, padded on the right, for a decoder-only model"
        if self.encoder_decoder:
            raise ValueError(f"an encoder-decoder model, whose attention is not causal, on {split}; {accepted}.")
        if documents is not None or (mask is not None and _is_left_padded(mask)):
            what = "several documents in a row" if documents is not None else "attention_mask padded on the left"
            raise ValueError(f"{what}, on {split}: their attention knows no mask; {accepted}.")
        length = time_shape(labels)[1]
        if length % (2 * self.ranks_per_row):
            raise ValueError(
                f"labels of length {length}, on {split}; accepted: multiples of {2 * self.ranks_per_row}, such as a "
                "collator with pad_to_multiple_of makes."
            )

    def _without_first_tokens(self, labels: Tensor, documents: Tensor | None, mask: Tensor | None) -> Tensor:
        if not self.shifts_labels or labels.is_floating_point():
            return labels
        first = document_starts(is_target(labels), documents)
        if mask is not None:
            real = mask != 0
            first = first | (real & (real.long().cumsum(-1) == 1))
        return labels.masked_fill(first, IGNORE_INDEX)

    def _check_seq2seq(self, batch: Batch, labels: Tensor) -> None:
        packed = [key for key in ("document_ids", "seq_idx", "cu_seq_lens_q") if batch.get(key) is not None]
        if packed:
            raise ValueError(f"{packed[0]}: packed rows of an encoder-decoder model; accepted: one document per row.")
        fed = batch.get("decoder_input_ids")
        padding = ~is_target(labels[:, :1])
        if fed is not None and fed.shape[1] > 1:
            padding = fed[:, 1:2] == self.pad_token_id
        decoder = torch.cat([is_target(labels[:, :1]) | ~padding, is_target(labels[:, 1:])], dim=-1)
        for name, real in (("labels", decoder), ("attention_mask", batch.get("attention_mask"))):
            if isinstance(real, Tensor) and real.dim() == 2 and _is_left_padded(real):
                raise ValueError(
                    f"{name} padded on the left, for an encoder-decoder model; accepted: padding on the right "
                    "(tokenizer.padding_side='right')."
                )


@dataclasses.dataclass
class TimelineCollator:
    """A data collator that adds the times to the batch that another one returns.

    The columns `loss_weights` and `document_ids` are carried around transformers' own collators, which would raise on
    them or drop them: padded as the `PADDING_COLLATORS` pad, concatenated for `DataCollatorWithFlattening`. Any other
    collator has to return `loss_weights`: one that drops them, or rows of them of another length than the labels', are
    a `ValueError`. A `document_ids` column without a list for each row is left out.
    """

    collator: Callable[[list[Any]], Any]
    timeline: Timeline

    def __call__(self, features: list[Any]) -> Any:
        first = features[0] if len(features) and isinstance(features[0], Mapping) else {}
        known = isinstance(self.collator, (*PADDING_COLLATORS, DataCollatorWithFlattening)) or is_sft_collator(
            self.collator
        )
        columns = {key: [row[key] for row in features] for key in KEPT_COLUMNS if key in first}
        if not all(isinstance(row, (list, tuple, Tensor)) for row in columns.get("document_ids", ())):
            del columns["document_ids"]
            features = [without(row, ["document_ids"]) for row in features]
        batch = self.collator([without(row, columns) for row in features] if known else features)
        if not isinstance(batch, Mapping):
            return batch
        batch = dict(batch)
        if known and batch.get("labels") is not None:
            batch |= {key: self._collated(key, rows, features, batch["labels"]) for key, rows in columns.items()}
        if LOSS_WEIGHTS in columns and LOSS_WEIGHTS not in batch and not known:
            name = getattr(self.collator, "__name__", type(self.collator).__name__)
            ours = ", ".join(kind.__name__ for kind in (*PADDING_COLLATORS, DataCollatorWithFlattening))
            raise ValueError(
                f"{name} dropped the column {LOSS_WEIGHTS}; accepted: a collator that returns it in the shape of the "
                f"labels, or {ours}."
            )
        return self.timeline.add(batch, pads_left=self._pads_left)

    def __getattr__(self, name: str) -> Any:
        """What a trainer asks of its data collator, asked of the inner one."""
        if name.startswith("__") or name in ("collator", "timeline"):  # as while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("collator", "timeline")
        object.__setattr__(self if own else self.collator, name, value)

    @property
    def _pads_left(self) -> bool:
        return getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right") == "left"

    def _collated(self, key: str, rows: list[Any], features: list[Any], labels: Tensor) -> Tensor:
        dtype = torch.float32 if key == LOSS_WEIGHTS else torch.long
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        for index, (row, feature) in enumerate(zip(tensors, features, strict=True)):
            tokens = feature["labels"] if feature.get("labels") is not None else feature["input_ids"]
            if len(row) != len(tokens):
                raise ValueError(
                    f"{key} of row {index} of the batch has {len(row)} values; accepted: {len(tokens)}, one per label."
                )
        if isinstance(self.collator, DataCollatorWithFlattening):
            if key == LOSS_WEIGHTS:
                return torch.cat(tensors)[None]
            starts = [torch.cat([row.new_ones(1), (row[1:] != row[:-1]).long()]) for row in tensors]
            return torch.cat(starts).cumsum(0)[None]
        padded = []
        for row in tensors:
            missing, end = time_shape(labels)[1] - len(row), row[:1] if self._pads_left else row[-1:]
            padding = row.new_zeros(missing) if key == LOSS_WEIGHTS else end.expand(missing)
            padded.append(torch.cat([padding, row] if self._pads_left else [row, padding]))
        return torch.stack(padded)


def without(batch: Any, keys: Collection[str]) -> Any:
    """A batch or row, if it is a mapping, without these keys."""
    if not isinstance(batch, Mapping) or not any(key in batch for key in keys):
        return batch
    return {key: value for key, value in batch.items() if key not in keys}


def has_time(labels: Any) -> bool:
    """Whether labels have a time dimension to weight: integers `[batch, time]` or floats `[batch, time, ...]`."""
    return isinstance(labels, Tensor) and (labels.dim() == 2 or (labels.dim() > 2 and labels.is_floating_point()))


def _is_left_padded(mask: Tensor) -> bool:
    real = mask != 0
    return bool((~real[:, 0] & real.any(-1)).any())

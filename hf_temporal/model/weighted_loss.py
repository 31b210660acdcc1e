"""Σ wℓ / D as a model's own loss: computed around its forward call, by the fused head or from the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_temporal import _trl
from hf_temporal._peft import described
from hf_temporal.collator import Batch, without
from hf_temporal.linear_cross_entropy.head import TokenStatistics, statistics_of
from hf_temporal.losses import weighted_cross_entropy, weighted_regression_loss
from hf_temporal.positions import IGNORE_INDEX, shift_left
from hf_temporal.step_weights import WeightedLabels

from .fused_head import FusedHead, HeadCall, answer_logits
from .model_loss import ModelLoss, logits_of, missing_decoder_inputs

logger = logging.get_logger(__name__)

SMALLEST_VOCABULARY_TO_FUSE = 1024
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Share:
    """What one forward call adds to the loss of its optimizer step."""

    weighted: WeightedLabels  # the weights of its labels
    scale: Tensor | float  # 1 / D, with what the trainer will multiply or divide the model's loss by undone
    auxiliary_scale: float  # the same for a mixture-of-experts auxiliary loss, its coefficient included
    items: Tensor | int | None = None  # what the trainer divides a sum over the labels by, where it does that itself


@dataclass(eq=False)
class WeightedForward:
    """While it is `around` a model, each forward call with `labels` returns Σ_i w_i ℓ_i / D as the model's loss.

    Calls without labels stay as they are, and so do all other outputs of a call; where the fused head is in use there
    are no logits.
    """

    root: nn.Module  # the model inside any wrapper of accelerate's, a `PeftModel` included
    own: ModelLoss  # how the model makes its own loss of logits and labels
    share_of: Callable[[Batch], Share]  # of a call's keyword arguments
    on_backward: Callable[[Tensor], None]  # called once the gradient of such a loss is asked for
    fused_head: FusedHead | None  # None to compute the loss from the logits
    label_smoothing: float  # ε
    regression_loss: str  # the error of float labels
    _call: _Call | None = None
    _fused: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @contextlib.contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """`model` is what the trainer calls: the root, or what wraps it."""
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        with before, model.register_forward_hook(self._after), self._fused:
            yield

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Batch) -> tuple[tuple[Any, ...], Batch] | None:
        labels = kwargs.get("labels")
        if not isinstance(labels, Tensor):
            return None
        share = self.share_of(kwargs)
        # The weights are divided instead of the loss: gradients that are made in the forward pass are then final.
        weights, targets = share.weighted.weights * share.scale, share.weighted.targets
        shifted = kwargs.get("shift_labels")
        inputs = without(kwargs, ("labels", "shift_labels", "num_items_in_batch", _trl.FUSED_HEAD))
        if labels.is_floating_point():
            self._call = _Call(labels, weights, share, has_own_loss=True)
            return args, {**inputs, "labels": labels}
        inputs |= {"labels": labels} if self.own.needs_labels else missing_decoder_inputs(self.root, inputs, labels)
        if share.weighted.is_split and shifted is not None:
            labels = shifted
        elif self.own.shifts_labels:
            labels, weights = shift_left(labels, IGNORE_INDEX), shift_left(weights, 0.0)
            targets = None if targets is None else targets - 1
        call = self._call = _Call(labels, weights, share, has_own_loss=self.own.needs_labels)
        if kwargs.get(_trl.FUSED_HEAD):  # what is measured is that of all labels, of weight 0 as well
            targets = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
            size = labels.numel()
            call.statistics = TokenStatistics(weights.new_zeros(size), targets.new_zeros(size, dtype=torch.bool))
        else:
            call.labels = labels.masked_fill(weights == 0, IGNORE_INDEX)
        if self.fused_head is not None:
            head = HeadCall(self.root, call.labels, weights, targets, self.label_smoothing, call.statistics)
            call.loss_of = self._fused.enter_context(self.fused_head.computing(head))
        return args, inputs

    def _after(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return None
        self._fused.close()
        loss = call.loss_of(outputs) if call.loss_of is not None else self._from_logits(call, outputs)
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if auxiliary is not None and call.share.auxiliary_scale and call.statistics is None:
            loss = loss + call.share.auxiliary_scale * auxiliary.to(loss.device)
        if loss.requires_grad:
            loss.register_hook(self.on_backward)
        if call.statistics is not None:
            mask = call.labels != IGNORE_INDEX
            divisor = torch.as_tensor(mask.sum() if call.share.items is None else call.share.items).clamp(min=1)
            return OutputsWithoutLogits(
                loss=loss,
                log_probs=-loss * divisor,  # which the trainer adds up and divides
                entropy=call.statistics.entropy.view(mask.shape),
                is_top1=call.statistics.is_top1.view(mask.shape),
                label_mask=mask,
                aux_loss=auxiliary,
            )
        if call.loss_of is not None:
            return OutputsWithoutLogits({**outputs, "loss": loss})
        if not isinstance(outputs, Mapping):
            return (loss, *outputs[1:]) if call.has_own_loss else (loss, *outputs)
        kind: Any = type(outputs)
        return kind(loss=loss, **without(outputs, ["loss"]))

    def _from_logits(self, call: _Call, outputs: Any) -> Tensor:
        logits = logits_of(outputs, call.labels)
        if call.labels.is_floating_point():
            total, _ = weighted_regression_loss(logits, call.labels, call.weights, kind=self.regression_loss)
            return total
        logits = answer_logits(self.root, logits, call.labels.shape[1])
        if call.statistics is not None:
            at = (call.labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
            for some in at.split(max(1, LOGITS_AT_ONCE // logits.shape[-1])):
                found = statistics_of(logits.detach().flatten(0, 1)[some], call.labels.flatten()[some])
                call.statistics.entropy[some], call.statistics.is_top1[some] = found.entropy, found.is_top1
        total, _ = weighted_cross_entropy(logits, call.labels, call.weights, label_smoothing=self.label_smoothing)
        return total


@dataclass
class _Call:
    """One forward call: `labels` aligned with the logits, and how its loss is read where the head was fused."""

    labels: Tensor
    weights: Tensor
    share: Share
    has_own_loss: bool
    statistics: TokenStatistics | None = None
    loss_of: Callable[[Mapping[str, Any]], Tensor] | None = None


class OutputsWithoutLogits(dict[str, Any]):
    """A model's outputs where the fused head took the place of the logits."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(
            f"the model's outputs have no {name}: the fused head leaves {', '.join(self)} alone. "
            "Accepted: temporal_fused_head='off' for a trainer that looks at the logits."
        )


def chosen_fused_head(root: nn.Module, own: ModelLoss, mode: str) -> FusedHead | None:
    """The fused head, where it is exact for the model and pays (`"auto"`), or is asked for (`"on"`, else an error)."""
    if mode == "off":
        return None
    head = own.fused_head
    if isinstance(head, FusedHead) and head.is_known():
        return head if mode == "on" or head.vocabulary >= SMALLEST_VOCABULARY_TO_FUSE else None
    why = "its adapter is not a plain LoRA now" if isinstance(head, FusedHead) else head
    problem = f"the LM head of {described(root)} cannot be fused exactly with the loss ({why})"
    if mode == "on":
        raise ValueError(f"temporal_fused_head='on', but {problem}; accepted here: 'auto' or 'off'.")
    if (own.vocabulary or 0) >= SMALLEST_VOCABULARY_TO_FUSE:
        logger.warning_once(f"The loss is computed from the full logits: {problem}.")
    return None

"""Σ wℓ of a batch, in place of the model's own mean: through the fused head, or from the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_temporal._peft import base_model
from hf_temporal.collator import OWN_KEYS, TARGETS, WEIGHTS, Batch
from hf_temporal.losses import weighted_cross_entropy, weighted_regression_loss
from hf_temporal.positions import IGNORE_INDEX, shift_left

from .fused_head import FusedHead, answer_logits
from .model_loss import ModelLoss, decoder_inputs, logits_of

logger = logging.get_logger(__name__)

SMALLEST_VOCABULARY_TO_FUSE = 1024


def weighted_sum(
    model: nn.Module,
    root: nn.Module,
    own: ModelLoss,
    inputs: Batch,
    *,
    is_shifted: bool,
    fused_head: FusedHead | None,
    label_smoothing: float,
    regression_loss: str,
) -> tuple[Tensor, Any]:
    """Σ_i w_i ℓ_i over the target tokens of a batch, and the model's outputs.

    Args:
        model: what is called, `root` or what wraps it.
        root: the model inside any wrapper of accelerate's, a `PeftModel` included.
        own: how the model makes its own loss of logits and labels.
        inputs: a batch with `labels` and `temporal_weights`.
        is_shifted: whether the weights are shifted already and belong to its `shift_labels`, as where rows are split
            between ranks.
        fused_head: None to compute the loss from the logits, which are then among the outputs.
        label_smoothing: ε.
        regression_loss: the error of float labels.
    """
    labels, weights, shifted = inputs["labels"], inputs[WEIGHTS], inputs.get("shift_labels")
    targets = inputs.get(TARGETS)
    inputs = {key: value for key, value in inputs.items() if key not in (*OWN_KEYS, "labels", "shift_labels")}
    if labels.is_floating_point():
        outputs = model(**inputs, labels=labels)
        total, _ = weighted_regression_loss(logits_of(outputs, labels), labels, weights, kind=regression_loss)
        return total, outputs
    inputs |= {"labels": labels} if own.needs_labels else missing_decoder_inputs(root, inputs, labels)
    if is_shifted and shifted is not None:
        labels = shifted
    elif own.shifts_labels:
        labels, weights = shift_left(labels, IGNORE_INDEX), shift_left(weights, 0.0)
        targets = None if targets is None else targets - 1
    labels = labels.masked_fill(weights == 0, IGNORE_INDEX)
    if fused_head is not None:
        computing = fused_head.computing(root, labels, weights, targets=targets, label_smoothing=label_smoothing)
        with computing as loss_of:
            outputs = model(**inputs)
            return loss_of(outputs), outputs
    outputs = model(**inputs)
    logits = answer_logits(root, logits_of(outputs, labels), labels.shape[1])
    total, _ = weighted_cross_entropy(logits, labels, weights, label_smoothing=label_smoothing)
    return total, outputs


def missing_decoder_inputs(root: nn.Module, inputs: Batch, labels: Tensor) -> Batch:
    """What an encoder–decoder model is to be given beside `inputs`, since it does not get the labels."""
    base = base_model(root)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return {}
    if any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds")):
        return {}
    return {key: value for key, value in decoder_inputs(base, labels).items() if inputs.get(key) is None}


def chosen_fused_head(root: nn.Module, own: ModelLoss, mode: str) -> FusedHead | None:
    """The fused head, where it is exact for the model and pays, or where it is asked for.

    Args:
        root: the model.
        own: how the model makes its own loss.
        mode: `"auto"`, `"on"` or `"off"`.

    Raises:
        ValueError: `"on"`, and the model's head cannot be fused exactly.
    """
    if mode == "off":
        return None
    head = own.fused_head
    if isinstance(head, FusedHead) and head.is_known():
        return head if mode == "on" or head.vocabulary >= SMALLEST_VOCABULARY_TO_FUSE else None
    why = "its adapter is not a plain LoRA now" if isinstance(head, FusedHead) else head
    problem = f"the LM head of {type(base_model(root)).__name__} cannot be fused exactly with the loss ({why})"
    if mode == "on":
        raise ValueError(f"temporal_fused_head='on', but {problem}; accepted here: 'auto' or 'off'.")
    if (own.vocabulary or 0) >= SMALLEST_VOCABULARY_TO_FUSE:
        logger.warning_once(f"The loss is computed from the full logits: {problem}.")
    return None

"""What a model's own loss is, read off the model: shift, auxiliary loss, `num_items_in_batch`, head."""

import contextlib
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import EncoderDecoderModel, PreTrainedModel
from transformers.utils import logging

from hf_temporal._peft import base_model, is_prompt_learner
from hf_temporal._transformers import shifts_by_class
from hf_temporal.losses import token_cross_entropy, token_regression_loss
from hf_temporal.positions import IGNORE_INDEX, shift_left
from hf_temporal.weighting import REGRESSION_LOSSES

from .fused_head import FusedHead, answer_logits, config_number
from .undisturbed import undisturbed

logger = logging.get_logger(__name__)

PROBE_LABELS = (IGNORE_INDEX, 1, 0, 0, 1, 1, 0, 1, 0)


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """How a model turns its logits and `labels` into its own loss."""

    shifts_labels: bool  # whether the logits at i are compared with the label at i + 1
    counts_items: bool  # whether the model divides by `num_items_in_batch` where it is given
    auxiliary_coefficient: float  # factor of the output's `aux_loss` (mixture of experts), 0 where there is none
    fused_head: FusedHead | str  # the head's stand-in, or why there is none that is exact for this model
    unsupported: str = ""  # why the model's own loss is not the cross-entropy of its logits; empty where it is
    vocabulary: int | None = None  # the number of logits, None where it is not known
    needs_labels: bool = False  # whether the model's forward cannot do without labels, or returns other logits then
    needs_position_ids: bool = (
        False  # whether `position_ids` that start after left padding leave the logits as they are
    )
    keeps_documents_apart: bool = (
        True  # whether what precedes a document in a packed row leaves its logits as they are
    )
    is_read: bool = True  # False where this is only presumed, from the model's class

    def in_words(self) -> str:
        facts = {
            "loss": self.unsupported or ("cross-entropy" if self.is_read else "not tried out yet"),
            "labels": "shifted by the model" if self.shifts_labels else "aligned with the logits",
            "num_items_in_batch": "counted" if self.counts_items else "ignored",
            "fused head": self.fused_head if isinstance(self.fused_head, str) else "exact",
            "position_ids for left padding": "needed" if self.needs_position_ids else "left to the model",
            "packed documents": "kept apart" if self.keeps_documents_apart else "not kept apart",
        }
        return "; ".join(f"{name}: {found}" for name, found in facts.items())


def read_model_loss(model: nn.Module, *, can_run: bool = True) -> ModelLoss:
    """Find out what a model's own loss is by running nine tokens through it, without gradients, in eval mode.

    The loss that the model reports is compared with the cross-entropy of its logits, aligned and shifted, with its
    auxiliary loss, and with `num_items_in_batch` doubled; the head's stand-in with the logits themselves; and for a
    causal model the logits with those of the same tokens behind padding, and behind another document: at most five
    forward passes. A model that cannot be run on tokens alone is presumed, until `read_on_batch`.

    Args:
        model: the unwrapped model, a `PeftModel` included; sharded by FSDP2, it is run by all ranks at once.
        can_run: False where the weights are not at hand: the class of the loss function then tells the shift, and no
            stand-in for the head is made.

    Raises:
        ValueError: FSDP2 cannot shard the model.
    """
    base = base_model(model)
    sharded = isinstance(model, FSDPModule)
    presumed = ModelLoss(
        shifts_labels=shifts_by_class(base, default=sharded or not can_run),
        counts_items=not _is_encoder_decoder(base),
        auxiliary_coefficient=_auxiliary_coefficient(base),
        needs_position_ids=_takes_flat_position_ids(base),
        fused_head="it could not be tried out" if can_run else "its weights are sharded",
        is_read=not can_run,
    )
    parameters = inspect.signature(base.forward).parameters
    if not can_run or not {"input_ids", "labels"} <= set(parameters) or not hasattr(base, "get_input_embeddings"):
        return presumed
    if not isinstance(matrix := getattr(base.get_input_embeddings(), "weight", None), Tensor):
        return presumed
    labels = torch.tensor([PROBE_LABELS], device=next(base.parameters()).device)
    tokens = (torch.arange(labels.numel(), device=labels.device) * 3 + 5)[None] % len(matrix)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if "use_cache" in parameters:
        inputs["use_cache"] = False  # as in training; with a cache, packed rows are not told apart
    try:
        with undisturbed(model):
            found, logits = _probe(model, presumed, inputs, labels)
            if logits is not None and not _is_encoder_decoder(base) and not is_prompt_learner(model):
                found = _probe_rows(model, found, inputs, labels, logits.float())
    except Exception as error:  # a model may raise anything on inputs that are not its own
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if sharded and frame.f_globals["__name__"].startswith("torch.distributed.fsdp"):
            raise ValueError(f"{type(base).__name__} cannot be run under FSDP2: {error} Accepted: DDP.") from error
        log = logger.warning if sharded else logger.info
        log(f"{type(base).__name__} cannot be run on nine tokens: {type(error).__name__}: {error}")
        return presumed
    return _as_presumed(found, presumed) if sharded else found  # data loaders were made before it was sharded


def read_on_batch(model: nn.Module, presumed: ModelLoss, batch: Mapping[str, Any]) -> ModelLoss:
    """The same on a batch of its own, for a model that could not be run on nine tokens."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with undisturbed(model):
        found, _ = _probe(model, presumed, inputs, labels)
        return _as_presumed(found, presumed)


def _as_presumed(found: ModelLoss, presumed: ModelLoss) -> ModelLoss:
    """What was found; unsupported where times were made already, for another shift."""
    if found.shifts_labels != presumed.shifts_labels and not found.unsupported:
        return dataclasses.replace(found, unsupported="a shift of the labels that its class does not tell")
    return found


def regression_problem(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Why a model's own loss on float labels is neither mean squared nor mean absolute error; empty where it is."""
    labels = batch["labels"].where(~batch["labels"].isnan(), 0.0)
    with undisturbed(model):
        outputs = model(**{**batch, "labels": labels})
    own, logits = (outputs.get(key) if isinstance(outputs, Mapping) else None for key in ("loss", "logits"))
    if own is None or logits is None:
        return "no logits"
    for kind in REGRESSION_LOSSES:
        try:
            mean = token_regression_loss(logits, labels, kind=kind).mean()
        except ValueError:
            return f"logits of shape {tuple(logits.shape)} for float labels of shape {tuple(labels.shape)}"
        if torch.isclose(own.float(), mean.float(), rtol=1e-3, atol=1e-6):
            return ""
    return "an own loss on float labels that is neither their mean squared nor their mean absolute error"


def _probe(
    model: nn.Module, presumed: ModelLoss, inputs: dict[str, Any], labels: Tensor
) -> tuple[ModelLoss, Tensor | None]:
    """What is found, and the logits; without them where the loss is unsupported."""
    base = base_model(model)
    outputs = model(**inputs, labels=labels)
    logits, own, auxiliary = (
        outputs.get(key) if isinstance(outputs, Mapping) else None for key in ("logits", "loss", "aux_loss")
    )
    if logits is None or own is None or logits.dim() != 3:
        what = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        return dataclasses.replace(presumed, unsupported=f"{what} for labels of shape {tuple(labels.shape)}"), None
    try:
        answers = answer_logits(model, logits, labels.shape[1])
    except ValueError:  # as in speech recognition, whose labels are fewer than the frames
        what = f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}"
        return dataclasses.replace(presumed, unsupported=what), None
    extra = presumed.auxiliary_coefficient * auxiliary if isinstance(auxiliary, Tensor) else 0.0
    tolerance = 16 * torch.finfo(own.dtype).eps

    def target_losses(shifts: bool) -> Tensor:
        aligned = shift_left(labels, IGNORE_INDEX) if shifts else labels
        return token_cross_entropy(answers, aligned)[aligned != IGNORE_INDEX]

    for shifts in (presumed.shifts_labels, not presumed.shifts_labels):
        losses = target_losses(shifts)
        if torch.isclose(own.float(), losses.mean() + extra, rtol=tolerance, atol=tolerance):
            break
    else:
        unsupported = "an own loss that is not the cross-entropy of its logits"
        return dataclasses.replace(presumed, unsupported=unsupported), None
    counts_items = False
    if _takes_items(base) and not (shifts and "position_ids" in inspect.signature(base.forward).parameters):
        items = 2 * len(losses)
        outputs = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(items, device=own.device))
        counts_items = _divides_by(items, outputs, losses, presumed.auxiliary_coefficient)
    fused_head = _exact_stand_in(model, base, inputs, labels, logits)
    found = dataclasses.replace(
        presumed,
        shifts_labels=shifts,
        counts_items=counts_items,
        fused_head=fused_head,
        vocabulary=logits.shape[-1],
        needs_labels=isinstance(fused_head, str)
        and not _can_do_without_labels(model, inputs, labels, logits),  # which a stand-in has done already
        is_read=True,
    )
    return found, logits


def _divides_by(items: int, outputs: Any, losses: Tensor, auxiliary_coefficient: float) -> bool:
    """Whether a model's loss is the sum of its targets' losses divided by so many items, rather than their mean."""
    auxiliary = outputs.get("aux_loss")
    own = outputs["loss"] - (auxiliary_coefficient * auxiliary if isinstance(auxiliary, Tensor) else 0.0)
    return bool((own - losses.sum() / items).abs() < (own - losses.mean()).abs())


def _probe_rows(
    model: nn.Module, found: ModelLoss, inputs: dict[str, Any], labels: Tensor, alone: Tensor
) -> ModelLoss:
    """What a causal model makes of tokens that stand behind padding, and behind another document of a packed row.

    The packed row is also given twice the number of its items.
    """
    base, tokens = base_model(model), inputs["input_ids"]
    before, device = tokens.flip(-1)[:, :4], tokens.device
    row = {"input_ids": torch.cat([before, tokens], dim=1)}
    row |= {key: value for key, value in inputs.items() if key == "use_cache"}
    tolerance = max(1e-3, 4 * torch.finfo(alone.dtype).eps) * float(alone.abs().max())

    def is_same(logits: Tensor) -> bool:
        return torch.allclose(logits[:, -tokens.shape[1] :].float(), alone, rtol=0, atol=tolerance)

    if found.shifts_labels and found.needs_position_ids and "attention_mask" in inputs:
        mask = torch.cat([torch.zeros_like(before), inputs["attention_mask"]], dim=1)
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        needs_position_ids = is_same(model(**row, attention_mask=mask, position_ids=counted)["logits"])
        found = dataclasses.replace(found, needs_position_ids=needs_position_ids)
    row["position_ids"] = torch.cat([torch.arange(part.shape[1], device=device) for part in (before, tokens)])[None]
    parameters = inspect.signature(base.forward).parameters
    if "position_ids" not in parameters:
        keeps_apart = False
        if any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            with contextlib.suppress(Exception):  # what is inside need not take them
                keeps_apart = is_same(model(**row)["logits"])
        return dataclasses.replace(found, keeps_documents_apart=keeps_apart)
    row["labels"] = torch.cat([torch.full_like(before, IGNORE_INDEX), labels], dim=1)
    if not found.shifts_labels:
        return dataclasses.replace(found, keeps_documents_apart=is_same(model(**row)["logits"]))
    aligned = shift_left(row["labels"], IGNORE_INDEX)
    items = 2 * int((aligned != IGNORE_INDEX).sum())
    if _takes_items(base):
        row["num_items_in_batch"] = torch.tensor(items, device=device)
    outputs = model(**row)
    losses = token_cross_entropy(outputs["logits"], aligned)[aligned != IGNORE_INDEX]
    return dataclasses.replace(
        found,
        counts_items=_takes_items(base) and _divides_by(items, outputs, losses, found.auxiliary_coefficient),
        keeps_documents_apart=is_same(outputs["logits"]),
    )


def _can_do_without_labels(model: nn.Module, inputs: dict[str, Any], labels: Tensor, logits: Tensor) -> bool:
    try:
        outputs = model(**inputs, **missing_decoder_inputs(model, inputs, labels))
    except Exception:  # noqa: BLE001  whatever a forward raises that was written for training alone
        return False
    found = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return found is not None and found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-3, atol=1e-5)


def _takes_items(base: Any) -> bool:
    parameters = inspect.signature(base.forward).parameters.values()
    return getattr(base, "accepts_loss_kwargs", any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters))


def _is_encoder_decoder(base: Any) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def _exact_stand_in(
    model: nn.Module, base: Any, inputs: dict[str, Any], labels: Tensor, logits: Tensor
) -> FusedHead | str:
    """A `FusedHead` for the model if its replay gives the model's own logits, else why not."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None or "forward" in head.__dict__:
        return "it has none, or one whose forward is replaced already"
    fused = FusedHead(head, base)
    try:
        replayed = fused.replay(model, inputs | missing_decoder_inputs(model, inputs, labels))
    except (TypeError, RuntimeError, ValueError) as error:
        if "meta" in str(error):
            return "its forward computes with what the head returns more than a scale, a soft cap and a bias"
        return str(error)
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    if replayed.shape != logits.shape or not torch.allclose(
        replayed, logits.float(), rtol=tolerance, atol=tolerance * float(logits.abs().max())
    ):
        return "its logits are more than scale, bias and soft cap of what it returns"
    return fused


def _takes_flat_position_ids(base: Any) -> bool:
    """Whether a model takes `position_ids` [batch, time] that count from 0.

    RoBERTa's count from its padding index on; models of images and text (M-RoPE) make three for each token.
    """
    offset = any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in base.named_modules()
    )
    makes_own = any(hasattr(module, "get_rope_index") for module in base.modules())
    return not offset and not makes_own and "position_ids" in inspect.signature(base.forward).parameters


def missing_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """What an encoder–decoder's own forward makes of `labels` for its decoder, beside `inputs` without them.

    Empty for other models, and where the model has no function of the usual names for that.
    """
    base = base_model(model)
    if not _is_encoder_decoder(base):
        return {}
    if any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds")):
        return {}
    labels, module = labels.long(), sys.modules[type(base).__module__]
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        ids = base.prepare_decoder_input_ids_from_labels(labels=labels)
    elif hasattr(module, "shift_tokens_right"):
        config = base.config
        if getattr(config, "decoder_start_token_id", None) is None:
            config = config.get_text_config()
        ids = module.shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    elif hasattr(base, "_shift_right"):
        ids = base._shift_right(labels)
    else:
        return {}
    made = {"decoder_input_ids": ids}
    if isinstance(base, EncoderDecoderModel) and inputs.get("decoder_attention_mask") is None:
        made["decoder_attention_mask"] = (ids != base.config.pad_token_id).to(ids.dtype)
    return made


def logits_of(outputs: Any, labels: Tensor) -> Tensor:
    """The logits of a model's output, a mapping or a tuple with or without a loss in front, or a `ValueError`."""
    if isinstance(outputs, Mapping):
        values = [outputs.get("logits")]
    else:
        values = [value for value in outputs if isinstance(value, Tensor) and value.dim() >= labels.dim()]
    if not values or values[0] is None:
        raise ValueError(
            f"the model returned no logits for labels of shape {tuple(labels.shape)}; accepted: outputs with them."
        )
    return values[0]


def _auxiliary_coefficient(base: Any) -> float:
    config = base.config.get_text_config() if isinstance(base, PreTrainedModel) else None
    named = config_number(config, "router_aux_loss_coef", config_number(config, "aux_loss_coef", 0.0))
    return float(getattr(base, "router_aux_loss_coef", named))

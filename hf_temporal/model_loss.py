"""What a model's own loss is, read off the model: shift, auxiliary loss, `num_items_in_batch`, head."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EncoderDecoderModel, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import logging

from .lm_head import FusedHead, config_number
from .losses import token_cross_entropy
from .timeline import IGNORE_INDEX, shift_left

logger = logging.get_logger(__name__)

PROBE_LABELS = (1, 0, 0, 1, 1, 0, 1, 0)


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """How a model turns its logits and `labels` into its own loss.

    Args:
        shifts_labels: whether the logits at i are compared with the label at i + 1.
        counts_items: whether the model divides by `num_items_in_batch` where it is given.
        auxiliary_coefficient: factor of the output's `aux_loss` (mixture of experts), 0 where there is none.
        fused_head: the head's stand-in, or why there is none that is exact for this model.
        unsupported: why the model's own loss is not the cross-entropy of its logits; empty where it is.
        vocabulary: the number of logits, None where it is not known.
    """

    shifts_labels: bool
    counts_items: bool
    auxiliary_coefficient: float = 0.0
    fused_head: FusedHead | str = "it could not be tried out"
    unsupported: str = ""
    vocabulary: int | None = None


def read_model_loss(model: nn.Module, *, can_run: bool = True) -> ModelLoss:
    """Find out what a model's own loss is by running eight tokens through it, without gradients, in eval mode.

    The loss that the model reports is compared with the cross-entropy of its logits, aligned and shifted, with and
    without its auxiliary loss, and with `num_items_in_batch` doubled; the head's stand-in with the logits
    themselves. The state of the random number generators is left as it was.

    Args:
        model: the unwrapped model, a `PeftModel` included.
        can_run: False where the weights are sharded, so that eight tokens cannot be run: the class of the loss
            function then tells the shift, and no stand-in for the head is made.
    """
    base = base_model(model)
    encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    named = LOSS_MAPPING.get(getattr(base, "loss_type", None), ForCausalLMLoss)  # type: ignore[arg-type]
    presumed = ModelLoss(
        shifts_labels=isinstance(base, PreTrainedModel) and not encoder_decoder and named is ForCausalLMLoss,
        counts_items=not encoder_decoder,
    )
    parameters = inspect.signature(base.forward).parameters
    if not can_run:
        return dataclasses.replace(presumed, fused_head="its weights are sharded")
    if not {"input_ids", "labels"} <= set(parameters) or not _takes_tokens(base):
        return presumed
    takes_items = getattr(
        base, "accepts_loss_kwargs", any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    )
    with _undisturbed(model):
        try:
            return _probe(model, base, presumed, takes_items=takes_items, encoder_decoder=encoder_decoder)
        except Exception as error:  # noqa: BLE001  a model may raise anything on inputs that are not its own
            logger.warning(
                f"{type(base).__name__} could not be run on eight tokens to read its loss ({type(error).__name__}: "
                f"{error}); its labels are taken to be {'shifted' if presumed.shifts_labels else 'aligned'}, and the "
                "loss is computed from the full logits."
            )
            return presumed


def _probe(model: nn.Module, base: Any, presumed: ModelLoss, *, takes_items: bool, encoder_decoder: bool) -> ModelLoss:
    parameter = next(base.parameters())
    labels = torch.tensor([PROBE_LABELS], device=parameter.device)
    rows = base.get_input_embeddings().weight.shape[0]
    input_ids = (torch.arange(labels.numel(), device=parameter.device) * 3 + 5)[None] % rows
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        del inputs["attention_mask"]
    outputs = model(**inputs, labels=labels)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if logits is None or own is None or logits.dim() != 3:
        shape = None if logits is None else tuple(logits.shape)
        return dataclasses.replace(presumed, unsupported=f"logits of shape {shape} for labels {tuple(labels.shape)}")
    answered = logits[:, -labels.shape[1] :] if _lengthens_logits(model) else logits
    auxiliary = outputs.get("aux_loss")
    coefficient = _auxiliary_coefficient(base) if isinstance(auxiliary, Tensor) else 0.0
    extra = coefficient * auxiliary if coefficient else 0.0
    tolerance = 16 * torch.finfo(own.dtype).eps

    def mean_loss(shifts: bool) -> Tensor:
        aligned = shift_left(labels, IGNORE_INDEX) if shifts else labels
        return token_cross_entropy(answered, aligned).sum() / (aligned != IGNORE_INDEX).sum()

    for shifts in (presumed.shifts_labels, not presumed.shifts_labels):
        if torch.isclose(own.float(), mean_loss(shifts) + extra, rtol=tolerance, atol=tolerance):
            break
    else:
        return dataclasses.replace(
            presumed, unsupported="the model's own loss is not the cross-entropy of its logits, plus its aux_loss"
        )
    counts_items = False
    if takes_items:
        items = labels.numel() - int(shifts)
        halved = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(2 * items, device=own.device))["loss"]
        counts_items = bool(torch.isclose((halved - extra) * 2, own - extra, rtol=4 * tolerance, atol=tolerance))
    return ModelLoss(
        shifts_labels=shifts,
        counts_items=counts_items,
        auxiliary_coefficient=coefficient,
        fused_head=_exact_stand_in(model, base, inputs, labels, logits, encoder_decoder=encoder_decoder),
        vocabulary=logits.shape[-1],
    )


def _exact_stand_in(
    model: nn.Module,
    base: Any,
    inputs: dict[str, Tensor],
    labels: Tensor,
    logits: Tensor,
    *,
    encoder_decoder: bool,
) -> FusedHead | str:
    """A `FusedHead` for the model if its replay gives the model's own logits, else why not."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None or "forward" in head.__dict__:
        return "it has none, or one whose forward is replaced already"
    fused = FusedHead(head, base)
    if encoder_decoder:
        inputs = {**inputs, **decoder_inputs(base, labels)}
    try:
        replayed = fused.replay(model, inputs)
    except (TypeError, RuntimeError, ValueError) as error:
        return str(error)
    tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    if replayed.shape != logits.shape or not torch.allclose(
        replayed, logits.float(), rtol=tolerance, atol=tolerance * float(logits.abs().max())
    ):
        return "its logits are more than scale, bias and soft cap of what it returns"
    return fused


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_inputs(base: Any, labels: Tensor) -> dict[str, Tensor]:
    """What an encoder-decoder model's own forward makes of `labels` for its decoder where it is given nothing else."""
    ids = base.prepare_decoder_input_ids_from_labels(labels=labels)
    inputs = {"decoder_input_ids": ids}
    if isinstance(base, EncoderDecoderModel):
        inputs["decoder_attention_mask"] = (ids != base.config.pad_token_id).to(ids.dtype)
    return inputs


def logits_of(outputs: Any, labels: Tensor) -> Tensor:
    """The logits of a model's output, a mapping or a tuple with or without a loss in front.

    Raises:
        ValueError: there are none.
    """
    if isinstance(outputs, Mapping):
        values = [outputs.get("logits")]
    else:
        values = [value for value in outputs if isinstance(value, Tensor) and value.dim() >= labels.dim()]
    if not values or values[0] is None:
        raise ValueError(
            f"the model returned no logits for labels of shape {tuple(labels.shape)}; accepted: outputs with them."
        )
    return values[0]


def answer_logits(model: nn.Module, logits: Tensor, length: int) -> Tensor:
    """The logits of the tokens of the batch: without those that prompt tuning puts in front of them.

    Raises:
        ValueError: logits and labels of different length.
    """
    if logits.shape[1] == length:
        return logits
    if logits.shape[1] > length and _lengthens_logits(model):
        return logits[:, -length:]
    raise ValueError(
        f"labels have length {length} and logits {logits.shape[1]}; accepted: equal lengths. "
        f"Does the collator cut the labels of {type(model).__name__}?"
    )


def _lengthens_logits(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _takes_tokens(base: Any) -> bool:
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    return isinstance(getattr(embeddings, "weight", None), Tensor)


def _auxiliary_coefficient(base: Any) -> float:
    config = base.config.get_text_config() if hasattr(base, "config") else None
    return float(getattr(base, "router_aux_loss_coef", config_number(config, "router_aux_loss_coef", 0.0)))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags and random states are restored."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

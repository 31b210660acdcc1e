"""What a model's own loss is, read off the model, and how its LM head is replaced for one forward call."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import logging

from .fused_head import weighted_linear_cross_entropy_terms
from .losses import token_cross_entropy
from .timeline import IGNORE_INDEX

logger = logging.get_logger(__name__)

PROBE_LABELS = (1, 0, 0, 1, 1, 0, 1, 0)


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """How a model turns its logits and `labels` into its own loss.

    Args:
        shifts_labels: whether the logits at i are compared with the label at i + 1.
        counts_items: whether the model divides by `num_items_in_batch` where it is given.
        auxiliary_coefficient: factor of the output's `aux_loss` (mixture of experts), 0 where there is none.
        fused_head: the head's stand-in where it is exact for this model, else None.
        unsupported: why the model's own loss is not the cross-entropy of its logits; empty where it is.
        vocabulary: the number of logits, None where it is not known.
    """

    shifts_labels: bool
    counts_items: bool
    auxiliary_coefficient: float = 0.0
    fused_head: FusedHead | None = None
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
    presumed = ModelLoss(
        shifts_labels=not encoder_decoder and LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss,
        counts_items=not encoder_decoder,
    )
    parameters = inspect.signature(base.forward).parameters
    if not can_run or not {"input_ids", "labels"} <= set(parameters) or not _takes_tokens(base):
        return presumed
    takes_items = getattr(
        base, "accepts_loss_kwargs", any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    )
    with _undisturbed(model):
        try:
            return _probe(model, base, presumed, takes_items=takes_items, encoder_decoder=encoder_decoder)
        except Exception as error:
            logger.warning(
                f"{type(base).__name__} could not be run on eight tokens to read its loss ({type(error).__name__}: {error}); "
                f"its labels are taken to be {'shifted' if presumed.shifts_labels else 'aligned'}, and the loss is computed "
                "from the full logits."
            )
            return presumed


def _probe(
    model: nn.Module, base: nn.Module, presumed: ModelLoss, *, takes_items: bool, encoder_decoder: bool
) -> ModelLoss:
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
    base: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    logits: Tensor,
    *,
    encoder_decoder: bool,
) -> FusedHead | None:
    """A `FusedHead` for the model if its replay gives the model's own logits, else None."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None or "forward" in head.__dict__:
        return None
    fused = FusedHead(head, base)
    if encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels)}
    try:
        replayed = fused.replay(model, inputs)
    except (TypeError, RuntimeError, NotImplementedError, ValueError):
        return None
    tolerance = 64 * torch.finfo(logits.dtype).eps
    if replayed.shape != logits.shape or not torch.allclose(
        replayed, logits.float(), rtol=tolerance, atol=tolerance * float(logits.abs().max())
    ):
        return None
    return fused


class FusedHead:
    """Stands in for a model's LM head during one forward call, which then returns Σ wℓ in place of the logits.

    The head's `forward` is replaced by one that computes the weighted loss at once, from the hidden states that it is
    given, and returns an empty tensor of the logits' shape on the `meta` device, so that the model's own code runs on
    unchanged; a forward hook then puts the loss into the output, inside the wrapped module's forward, where the
    hooks of DDP and FSDP see it. Nothing stays on the model after the call.

    Known heads: `nn.Linear`, a LoRA layer around one (its factors stay factors), a `modules_to_save` copy of one.
    Scale, soft cap and bias come from the configuration and `final_logits_bias`.
    """

    def __init__(self, head: nn.Module, base: nn.Module) -> None:
        self.head = head
        config = base.config.get_text_config() if hasattr(base, "config") else None
        self.logit_scale = (
            _number(config, "logit_scale", 1.0)
            * _number(config, "lm_head_multiplier", 1.0)
            / _number(config, "logits_scaling", 1.0)
        )
        self.softcap = _number(config, "final_logit_softcapping", None)
        self.base = base
        self._stand_in = self._forward
        self._hidden: Tensor | None = None
        self._task: tuple[Tensor, Tensor, float] | None = None
        self._loss: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]  # type: ignore[union-attr, return-value]

    def is_known(self) -> bool:
        """Whether the head, in the state that it is in now, is one of those that can be replayed."""
        return _known_layer(self.head) is not None

    @contextlib.contextmanager
    def computing(
        self, model: nn.Module, labels: Tensor, weights: Tensor, *, label_smoothing: float
    ) -> Iterator[None]:
        """While inside, one call of the model (the unwrapped root, or what wraps it) returns `{"loss": Σ wℓ}`.

        Args:
            model: the module whose output shall hold the loss: the root inside any DDP or FSDP wrapper.
            labels: `[batch, time]`, aligned with the logits, −100 where there is no target.
            weights: `[batch, time]`.
        """
        self._task = (labels, weights, label_smoothing)
        hook = model.register_forward_hook(self._hand_over, prepend=True)
        try:
            with self._swapped():
                yield
        finally:
            hook.remove()
            self._task = self._loss = None

    @torch.no_grad()
    def replay(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The logits as the stand-in sees them, in float32, to be compared with the model's own."""
        with self._swapped():
            model(**inputs)
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("the model's forward does not call its output embeddings")
        terms, bias = self._terms(hidden.reshape(-1, hidden.shape[-1]))
        logits = sum(x.float() @ weight.float().T for x, weight in terms)
        logits = self.logit_scale * (logits + (0.0 if bias is None else bias.float()))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.view(*hidden.shape[:-1], -1)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        self.head.forward = self._stand_in  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.head.forward

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._meet(hidden)
        return torch.empty(*hidden.shape[:-1], self.vocabulary, dtype=hidden.dtype, device="meta")

    @torch.compiler.disable
    def _meet(self, hidden: Tensor) -> None:
        if self._task is None:
            self._hidden = hidden
            return
        labels, weights, label_smoothing = self._task
        if hidden.shape[1] != labels.shape[1]:
            hidden = hidden[:, -labels.shape[1] :]
        terms, bias = self._terms(hidden.reshape(-1, hidden.shape[-1]))
        self._loss = weighted_linear_cross_entropy_terms(
            terms,
            labels.reshape(-1),
            weights.reshape(-1),
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            label_smoothing=label_smoothing,
        )

    def _hand_over(self, module: nn.Module, args: Any, output: Any) -> dict[str, Any]:
        if self._loss is None:
            raise RuntimeError(f"{type(module).__name__} did not call its LM head; set temporal_fused_head='off'.")
        auxiliary = output.get("aux_loss") if isinstance(output, Mapping) else None
        return {"loss": self._loss} | ({} if auxiliary is None else {"aux_loss": auxiliary})

    def _terms(self, hidden: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        layer = _known_layer(self.head)
        if layer is None:
            raise TypeError(f"head of type {type(self.head).__name__} is not known")
        linear = layer.base_layer if isinstance(layer, LoraLinear) else layer
        terms = [(hidden, linear.weight)]
        if isinstance(layer, LoraLinear):
            for name in _applied_adapters(layer):
                down, up = layer.lora_A[name], layer.lora_B[name]
                low = down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))
                terms.append((low * layer.scaling[name], up.weight))
        bias = linear.bias
        if (final := getattr(self.base, "final_logits_bias", None)) is not None:
            bias = final.flatten() if bias is None else bias + final.flatten()
        return terms, bias


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shift_left(tensor: Tensor, fill: float) -> Tensor:
    """Each row moved one place to the left: what belongs to label i + 1 stands at i, where its logits are."""
    return nn.functional.pad(tensor[..., 1:], (0, 1), value=fill)


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


def _known_layer(head: nn.Module) -> nn.Module | None:
    """The `nn.Linear` or LoRA layer that a head amounts to, None where it is another kind or in another state."""
    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or not head.active_adapters:
            head = head.original_module
        else:
            head = head.modules_to_save[head.active_adapters[0]]
    if _is_plain_linear(head):
        return head
    if type(head).forward is LoraLinear.forward and _is_plain_linear(head.base_layer):
        if head.merged != head.disable_adapters:
            return head.base_layer
        if head.merged:
            return None
        plain = all(
            name not in head.lora_variant and head.lora_B[name].bias is None for name in _applied_adapters(head)
        )
        return head if plain else None
    return None


def _applied_adapters(layer: LoraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not module._forward_hooks


def _takes_tokens(base: nn.Module) -> bool:
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    return isinstance(getattr(embeddings, "weight", None), Tensor)


def _auxiliary_coefficient(base: nn.Module) -> float:
    config = base.config.get_text_config() if hasattr(base, "config") else None
    return float(getattr(base, "router_aux_loss_coef", _number(config, "router_aux_loss_coef", 0.0)))


def _number(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, default)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default


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

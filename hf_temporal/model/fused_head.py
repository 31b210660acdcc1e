"""The LM head and its loss in place of the model's LM head, during one forward call: the logits are never made."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_temporal._peft import adapter_terms, is_lora, is_prompt_learner, known_layer
from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms
from hf_temporal.linear_cross_entropy.head import TokenStatistics

FINAL_BIAS = "final_logits_bias"


@dataclasses.dataclass
class HeadCall:
    """One call of the model: what the stand-in is given for it, and what it finds."""

    root: nn.Module  # whose output shall hold the loss: the model inside any DDP or FSDP wrapper
    labels: Tensor | None = None  # [batch, time], −100 off the targets, aligned with the logits; None: find `hidden`
    weights: Tensor | None = None  # [batch, time]
    targets: Tensor | None = None  # where in the flattened labels the targets are, where that is known
    label_smoothing: float = 0.0  # ε
    statistics: TokenStatistics | None = None  # of the flattened labels, filled at the targets
    loss: Tensor | None = None  # Σ wℓ, once the head was called
    hidden: Tensor | None = None  # what the head was given


class FusedHead:
    """Stands in for a model's LM head during one forward call, which then returns Σ wℓ in place of the logits.

    The head's `forward` is replaced by one that computes the weighted loss at once, from the hidden states that it is
    given, and returns an empty tensor of the logits' shape on the `meta` device, so that the model's own code runs on
    unchanged; a forward hook then puts the loss into the output, inside the wrapped module's forward, where the
    hooks of DDP and FSDP see it. Nothing stays on the model after the call.

    Known heads: `nn.Linear`, a LoRA layer around one (its factors stay factors), a `modules_to_save` copy of one.
    Scale, soft cap and bias come from the configuration and `final_logits_bias`.
    """

    def __init__(self, head: Any, base: Any) -> None:
        self.head = head
        config = base.config.get_text_config() if hasattr(base, "config") else None
        self.logit_scale = (
            config_number(config, "logit_scale", 1.0)
            * config_number(config, "lm_head_multiplier", 1.0)
            / config_number(config, "logits_scaling", 1.0)
        )
        self.softcap = config_number(config, "final_logit_softcapping", None)
        self.base = base
        self._stand_in = self._forward  # one object, which compiled graphs recognise
        self._call: HeadCall | None = None  # None but during a call of the model
        self._final_bias: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    def is_known(self) -> bool:
        """Whether the head, in the state that it is in now, is one of those that can be replayed."""
        return known_layer(self.head, _is_plain_linear) is not None

    @contextlib.contextmanager
    def computing(self, call: HeadCall) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        """While inside, one call of the model (the unwrapped root, or what wraps it) returns `{"loss": Σ wℓ}`.

        Yields:
            A function from the outputs to Σ wℓ in float32: FSDP2 rounds what a module returns to its `output_dtype`.
        """

        def loss_of(outputs: Mapping[str, Any]) -> Tensor:
            return call.loss if call.loss is not None and isinstance(call.root, FSDPModule) else outputs["loss"]

        with call.root.register_forward_hook(self._return_loss, prepend=True), self._standing_in(call):
            yield loss_of

    @torch.no_grad()
    def replay(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The logits as the stand-in sees them, in float32, to be compared with the model's own."""
        call = HeadCall(model)
        with self._standing_in(call):
            model(**inputs)
        if (hidden := call.hidden) is None:
            raise RuntimeError("the model's forward does not call its output embeddings")
        terms, bias = self._terms(hidden.reshape(-1, hidden.shape[-1]))
        logits = sum(x.float() @ weight.float().T for x, weight in terms)
        logits = self.logit_scale * (logits + (0.0 if bias is None else bias.float()))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.view(*hidden.shape[:-1], -1)

    @contextlib.contextmanager
    def _standing_in(self, call: HeadCall) -> Iterator[None]:
        buffers = getattr(self.base, "_buffers", {})
        bias = buffers.get(FINAL_BIAS)
        self._call, self.head.forward = call, self._stand_in
        self._final_bias = bias
        if bias is not None:  # Marian, Pegasus and mBART add it to logits that are on the meta device then
            buffers[FINAL_BIAS] = bias.to("meta")
        try:
            yield
        finally:
            del self.head.forward
            self._call = None
            if bias is not None:
                buffers[FINAL_BIAS] = bias

    def _forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self._compute(hidden)
        return torch.empty(*hidden.shape[:-1], self.vocabulary, dtype=hidden.dtype, device="meta")

    @torch.compiler.disable
    def _compute(self, hidden: Tensor) -> None:
        call = self._call
        assert call is not None
        if call.labels is None or call.weights is None:
            call.hidden = hidden
            return
        hidden = answer_logits(call.root, hidden, call.labels.shape[1])
        terms, bias = self._terms(hidden.reshape(-1, hidden.shape[-1]))
        call.loss = weighted_linear_cross_entropy_terms(
            terms,
            call.labels.reshape(-1),
            call.weights.reshape(-1),
            positions=call.targets,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            label_smoothing=call.label_smoothing,
            statistics=call.statistics,
        )

    def _return_loss(self, module: nn.Module, _: Any, output: Any) -> dict[str, Any]:
        loss = None if self._call is None else self._call.loss
        if loss is None:
            raise RuntimeError(f"{type(module).__name__} did not call its LM head; set temporal_fused_head='off'.")
        lost = torch.is_grad_enabled() and not loss.requires_grad
        if lost and any(each.requires_grad for each in module.parameters()):
            raise RuntimeError(
                f"the LM head of {type(module).__name__} ran without gradients, as inside a reentrant checkpoint; "
                "accepted: gradient_checkpointing_kwargs={'use_reentrant': False}, or temporal_fused_head='off'."
            )
        auxiliary = output.get("aux_loss") if isinstance(output, Mapping) else None
        return {"loss": loss} | ({} if auxiliary is None else {"aux_loss": auxiliary})

    def _terms(self, hidden: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        layer = known_layer(self.head, _is_plain_linear)
        if layer is None:
            raise TypeError(f"a {type(self.head).__name__} is not a linear layer, or one with a plain LoRA adapter")
        adapted = is_lora(layer)
        linear: Any = layer.base_layer if adapted else layer
        terms = [(hidden, linear.weight), *(adapter_terms(layer, hidden) if adapted else [])]
        bias = linear.bias
        if (final := self._final_bias) is not None:
            bias = final.flatten() if bias is None else bias + final.flatten()
        return terms, bias


def answer_logits(model: nn.Module, logits: Tensor, length: int) -> Tensor:
    """The logits without those that prompt tuning puts in front; another length than the labels' is a `ValueError`."""
    if logits.shape[1] == length:
        return logits
    if logits.shape[1] > length and is_prompt_learner(model):
        return logits[:, -length:]
    raise ValueError(
        f"labels have length {length} and logits {logits.shape[1]}; accepted: equal lengths. "
        f"Does the collator cut the labels of {type(model).__name__}?"
    )


def _is_plain_linear(module: nn.Module) -> bool:
    """Hooks of FSDP2 gather the weights; others there were when the head was compared with the model's logits."""
    hooked = bool(module._forward_hooks) and not isinstance(module, FSDPModule)
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not hooked


def config_number(config: Any, name: str, default: Any) -> Any:
    """A number in a configuration, `default` where there is none of that name."""
    value = getattr(config, name, default)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default

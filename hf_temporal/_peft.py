"""What this package asks of PEFT, which is loaded only where a model needs it: the layers that LoRA makes of a head.

PEFT is not imported here. A model can be a PEFT model only once PEFT is loaded, so `sys.modules` is asked. The inside
of its layers (`lora_A`, `lora_B`, `lora_dropout`, `scaling`, `lora_variant`, `merged`, `disable_adapters`,
`active_adapters`, `ModulesToSaveWrapper`) is not documented, and needed because the loss is computed from the head's
matrices, without its forward. `tests/test_private_interfaces.py` has a test for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


def is_peft_model(model: Any) -> TypeGuard[PeftModel]:
    """Whether a model is a `PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_prompt_learner(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens in front of the input."""
    return is_peft_model(model) and bool(model.active_peft_config.is_prompt_learning)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a `PeftModel` or a `PeftMixedModel`, or the model itself."""
    if is_peft_model(model):
        return model.get_base_model()
    peft = sys.modules.get("peft")
    return model.base_model.model if peft is not None and isinstance(model, peft.PeftMixedModel) else model


def described(model: nn.Module) -> str:
    """The class of a model and the kinds of the adapters on it, for errors."""
    name = type(base_model(model)).__name__
    adapters = getattr(model, "peft_config", None) if base_model(model) is not model else None
    kinds = sorted({str(getattr(each.peft_type, "value", each.peft_type)) for each in (adapters or {}).values()})
    return f"{name} with {', '.join(kinds)}" if kinds else name


def check_merged_head(model: nn.Module) -> None:
    """Raise a `ValueError` where an adapter was merged into an LM head that is the embedding as well."""
    base = base_model(model)
    if base is model or not hasattr(base, "get_output_embeddings"):
        return
    head = base.get_output_embeddings()
    if getattr(head, "merged", False) and head.get_base_layer().weight is base.get_input_embeddings().weight:
        raise ValueError(
            f"the adapter on the LM head of {described(model)} was merged (merge_adapter) into weights that the "
            "embedding shares, which it has changed as well. Accepted: unmerge_adapter() before training."
        )


def adapter_names(model: Any) -> list[str]:
    """The adapters of a model; PEFT before 0.19 leaves `peft_config` on a model that adapters were merged into."""
    adapted = is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False)
    return list(model.peft_config) if adapted else []


def known_layer(head: Any, is_plain_linear: Callable[[nn.Module], bool]) -> Any:
    """The linear or LoRA layer that a head amounts to, None where it is another kind or in another state."""
    peft = sys.modules.get("peft.utils.other")
    if peft is not None and isinstance(head, peft.ModulesToSaveWrapper):
        if head.disable_adapters or not head.active_adapters:
            head = head.original_module
        else:
            head = head.modules_to_save[head.active_adapters[0]]
    if is_plain_linear(head):
        return head
    if is_lora(head) and is_plain_linear(head.base_layer):
        if head.merged != head.disable_adapters:
            return head.base_layer
        if head.merged:
            return None
        plain = all(
            name not in head.lora_variant and head.lora_B[name].bias is None for name in _applied_adapters(head)
        )
        return head if plain else None
    return None


def is_lora(layer: Any) -> bool:
    """Whether a layer is a LoRA adapter around a linear one, with PEFT's own forward."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and type(layer).forward is peft.Linear.forward


def adapter_terms(layer: Any, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs (x, weight) whose products x weightᵀ a LoRA layer adds to those of the layer that it is around."""
    terms = []
    for name in _applied_adapters(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        low = down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))
        terms.append((low * layer.scaling[name], up.weight))
    return terms


def _applied_adapters(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]

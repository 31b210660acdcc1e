"""LoRA adapters: put on a model, added to a copy of its weights to generate, and merged into it after training."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_temporal._peft import is_lora

from .models import NEW_IN_A_DECODER, ModelArguments, Seq2SeqModelArguments

logger = logging.get_logger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def add_adapter(model: PreTrainedModel, arguments: ModelArguments, task_type: str) -> PeftModel:
    """Wrap the model in a LoRA adapter; `task_type` is CAUSAL_LM or SEQ_2_SEQ_LM.

    In a warm-started pair the attention between the two, random so far, is trained in full.
    """
    names = arguments.lora_target_modules
    everywhere = names == ["all-linear"]
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for name in [] if everywhere else names:  # PEFT accepts one that matches nothing, as long as another one does
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            accepted = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            raise ValueError(f"lora_target_modules={names!r}: {name!r} is no module here; accepted: {accepted}")
    full = []
    if isinstance(arguments, Seq2SeqModelArguments) and arguments.encoder_model_name_or_path:
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        full = [name for name in NEW_IN_A_DECODER if name in present]
    config = LoraConfig(
        task_type=task_type,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if everywhere else names,
        modules_to_save=full or None,
    )
    adapted = get_peft_model(model, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    expected = [f".{name}.modules_to_save." for name in full] + [f".{name}.lora_" for name in names if not everywhere]
    for part in expected:
        if not any(part in parameter for parameter in trained):
            raise ValueError(f"lora_target_modules={names!r}: nothing with {part!r} in its name would be trained")
    return adapted


def check_mergeable(trainer: Any) -> None:
    """Check before training that the adapter can be added to the weights afterwards: no engine shards them."""
    for engine, sharded in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if sharded:
            raise ValueError(
                f"merge_adapter=True under {engine}, which shards the weights; accepted: merge_adapter=False, and "
                "PeftModel.merge_and_unload() on the saved adapter in one process"
            )


def merge_adapter(trainer: Any) -> None:
    """Make `trainer.model` the plain model with the adapter added to its weights: what is saved from here on.

    Adapter files leave the top of `output_dir`, where `from_pretrained` would follow them; checkpoints keep theirs.
    """
    check_mergeable(trainer)
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    if trainer.args.should_save:
        for name in FILES:
            (Path(trainer.args.output_dir) / name).unlink(missing_ok=True)


# ---- generation


@contextmanager
def adapter_added(model: nn.Module) -> Iterator[None]:
    """Let a model compute with its LoRA adapter added to a copy of the weights it is on.

    x (W + s B A)ᵀ is one matrix product, where the adapter beside the weight makes it three. The trained weights are
    put aside and put back as they were, also after an error. Where the sum would not give the same answers or finds no
    room, the adapter stays where it is. One line of the log, at level `info`, says which.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not module.merged and not module.disable_adapters
    ]
    if not layers:
        yield
        return
    problem = _problem(model, layers)
    bases = [layer.get_base_layer() for layer in layers]
    trained = [(parameter, parameter.data) for base in bases for parameter in base.parameters()]

    def restore() -> None:
        for parameter, data in trained:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()

    try:
        if not problem:
            try:
                for layer in layers:
                    layer.merge(safe_merge=True)  # makes new tensors, which the parameters hold from then on
            except (ValueError, RuntimeError) as error:
                problem = str(error)
                restore()
        if problem:
            logger.info(f"Answers are generated with the adapter beside the weights: {problem}.")
        else:
            size = f"{_size(bases) / 2**20:,.1f} MiB"
            logger.info(f"Answers are generated with the adapter added to a copy of the weights, which takes {size}.")
        yield
    finally:
        restore()


def _problem(model: nn.Module, layers: list[Any]) -> str:
    """Why adapters cannot be added to a copy of the weights, or not without other answers; empty where they can."""
    bases = [layer.get_base_layer() for layer in layers]
    for layer, base in zip(layers, bases, strict=True):
        if not is_lora(layer) or not isinstance(base, nn.Linear | Conv1D):
            return f"{type(base).__name__} is no plain linear layer with a LoRA adapter"
        if any(name in layer.lora_variant for name in layer.active_adapters):
            return "the adapter is a variant of LoRA"
        if type(base.weight.data) is not Tensor or base.weight.is_meta or hasattr(base.weight, "ds_id"):
            return "the weights are sharded, quantized or elsewhere"
        if base.weight.dtype not in (torch.float32, torch.float64):
            return f"it would be rounded in weights of {str(base.weight.dtype).removeprefix('torch.')}"
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(uses[id(base.weight)] > 1 for base in bases):
        return "one of its weights is shared, such as a tied LM head's, and adding to it would change the other layer"
    size, free = _size(bases), _free_memory(bases[0].weight.device)
    if 2 * size > free:
        return f"the copy takes {size / 2**20:,.1f} MiB, more than half of the {free / 2**20:,.1f} MiB that are free"
    return ""


def _size(bases: list[Any]) -> int:
    return sum(base.weight.nbytes for base in bases)


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, for each of this machine's processes where they share them."""
    if device.type in ("cuda", "xpu"):
        own: Any = torch.get_device_module(device)
        return int(own.mem_get_info(device)[0] + own.memory_reserved(device) - own.memory_allocated(device))
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

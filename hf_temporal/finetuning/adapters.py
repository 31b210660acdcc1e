"""LoRA adapters: put on a model, and merged into it after training."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .models import NEW_IN_A_DECODER, ModelArguments, Seq2SeqModelArguments

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

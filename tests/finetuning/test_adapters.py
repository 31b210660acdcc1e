"""LoRA adapters are put where they are asked for, and merged into the plain model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainingArguments

from hf_temporal.finetuning.adapters import add_adapter, check_mergeable, merge_adapter
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm, load_seq2seq_lm
from hf_temporal.trainer import TemporalWeightTrainer
from tests.finetuning.tiny_checkpoints import pair_of, seq2seq_logits
from tests.tiny_models import PadCollator, causal_examples, tiny_model

# ---- adapters


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mt5", "bart", "encoder_decoder"])
def test_everywhere_is_every_linear_layer_but_the_head(name: str) -> None:
    model = tiny_model(name)
    encoder_decoder = model.config.is_encoder_decoder
    adapted = add_adapter(
        model, ModelArguments(use_peft=True, lora_r=2), "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    )
    trained = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in key for key in trained)
    assert not any("lm_head" in key or "predictions.decoder" in key for key in trained)
    layers = {re.sub(r"\.lora_.*", "", key) for key in trained}
    assert len(layers) >= (20 if encoder_decoder else 8)
    if encoder_decoder:
        assert any("encoder" in key for key in layers)
        assert any("decoder.bert" in key or "decoder.layers" in key or "decoder.block" in key for key in layers)


def test_adapter_modules_by_name() -> None:
    arguments = ModelArguments(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "down_proj"])
    adapted = add_adapter(tiny_model("llama"), arguments, "CAUSAL_LM")
    layers = {re.findall(r"(\w+)\.lora_", key)[0] for key, _ in adapted.named_parameters() if "lora_" in key}
    assert layers == {"q_proj", "down_proj"}
    arguments.lora_target_modules = ["q_proj", "qkv"]
    with pytest.raises(ValueError, match=r"'qkv' is no module here; accepted: .*down_proj.*q_proj"):
        add_adapter(tiny_model("llama"), arguments, "CAUSAL_LM")


@pytest.mark.parametrize("names", [["all-linear"], ["query", "value"]])
def test_the_new_attention_of_a_pair_is_trained_in_full(bert: Path, tmp_path: Path, names: list[str]) -> None:
    arguments = pair_of(bert, use_peft=True, merge_adapter=True, lora_target_modules=names)
    model, tokenizer = load_seq2seq_lm(arguments)
    adapted = add_adapter(model, arguments, "SEQ_2_SEQ_LM")
    trained = {key: parameter for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    full = [key for key in trained if "crossattention.modules_to_save" in key]
    new = [key for key, _ in model.named_parameters() if "crossattention.original_module" in key]
    assert len(full) == len(new) > 0
    assert any("encoder.encoder.layer.0.attention.self.query.lora_A" in key for key in trained)
    assert all("crossattention" in key or "lora_" in key for key in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) / 4)
    expected = seq2seq_logits(adapted, tokenizer)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(seq2seq_logits(again, tokenizer), expected, rtol=1e-4, atol=1e-4)


# ---- merging


def trained_adapter(folder: Path, base: Path, **settings: Any) -> TemporalWeightTrainer:
    model, tokenizer = load_causal_lm(ModelArguments(model_name_or_path=str(base), use_peft=True))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        **settings,
    )  # fmt: skip
    trainer = TemporalWeightTrainer(
        add_adapter(model, ModelArguments(use_peft=True), "CAUSAL_LM"),
        arguments,
        train_dataset=causal_examples(),
        data_collator=PadCollator(),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def test_merged_is_the_plain_model_with_the_adapters_logits(llama: Path, tmp_path: Path) -> None:
    trainer = trained_adapter(tmp_path, llama)
    ids = torch.arange(3, 40).view(1, -1)
    model: Any = trainer.model
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(llama)(input_ids=ids).logits
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").exists()
    merge_adapter(trainer)
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.startswith("adapter_")]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert b"lora" not in (tmp_path / "model.safetensors").read_bytes()
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = again(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (merged - base).abs().max() > 0.01
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]

    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "checkpoint-2")
    with torch.no_grad():
        torch.testing.assert_close(fresh(input_ids=ids).logits, adapted)


def test_sharded_weights_are_not_merged(llama: Path, tmp_path: Path) -> None:
    trainer = trained_adapter(tmp_path, llama)
    check_mergeable(trainer)
    for engine, flag in (("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")):
        flags = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | {flag: True}
        sharded = SimpleNamespace(model=trainer.model, args=trainer.args, **flags)
        with pytest.raises(ValueError, match=f"merge_adapter=True under {engine}, which shards the weights"):
            merge_adapter(sharded)
        assert isinstance(sharded.model, PeftModel)

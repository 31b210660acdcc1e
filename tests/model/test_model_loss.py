"""What is read off a model: with how many forward passes, and what a trainer then does or refuses."""

from __future__ import annotations

import logging as standard_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from packaging.version import Version
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from hf_temporal.model.fused_head import FusedHead
from hf_temporal.model.model_loss import read_model_loss
from tests.tiny_models import VOCABULARY, PadCollator, causal_examples, tiny_model

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
_LAYERS: dict[str, Any] = _SMALL | {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
_TRANSLATOR: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.2,
}  # fmt: skip
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
CROSSING: dict[str, Callable[[], Any]] = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_SMALL, ffn_dim=24, num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=97, d_model=16, n_layers=2, n_heads=2, max_seq_len=64)),
    "falcon with ALiBi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SMALL, num_attention_heads=2, alibi=True)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**_SMALL, state_size=4)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_LAYERS, layer_types=["conv", "full_attention"])),
    "bart's decoder": lambda: hf.BartForCausalLM(hf.BartConfig(**_DECODER)),
    "trocr": lambda: hf.TrOCRForCausalLM(hf.TrOCRConfig(**_DECODER)),
    "xlnet": lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=97, d_model=16, n_layer=2, n_head=2, d_inner=24)),
}
APART: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: tiny_model(name) for name in ("llama", "gpt2", "gemma2", "qwen3")},  # type: ignore[misc]
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_SMALL, intermediate_size=24, num_attention_heads=2, max_position_embeddings=64)
    ),
}
if Version(hf.__version__) >= Version("5.24"):  # whose mask keeps the documents apart; ALiBi counts distances alone
    APART["falcon with ALiBi"] = CROSSING.pop("falcon with ALiBi")


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "t5", "bart", "encoder_decoder"])
def test_a_model_is_read_in_five_passes_and_left_as_it_was(name: str) -> None:
    model = tiny_model(name).train()
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    passes: list[Any] = []
    with torch.no_grad():
        handle = model.register_forward_pre_hook(lambda *call: passes.append(call), prepend=True)
        found = read_model_loss(model)
    handle.remove()
    assert found.is_read
    assert 3 <= len(passes) <= 5
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for before, after in zip(buffers, model.buffers(), strict=True):
        assert torch.equal(before, after)


def test_what_was_found_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = standard_logging.getLogger("hf_temporal.timeline_hooks")
    logger.addHandler(caplog.handler)
    logger.setLevel(standard_logging.INFO)
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    TemporalWeightTrainer(tiny_model("gpt2"), args, train_dataset=causal_examples(4)).get_train_dataloader()
    logger.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records if "fused head" in record.getMessage()}
    assert line == (
        "GPT2LMHeadModel: loss: cross-entropy; labels: shifted by the model; num_items_in_batch: counted; "
        "fused head: exact; position_ids for left padding: needed; packed documents: kept apart"
    )


# ---- padding and packing


class CountsFromElsewhere(hf.LlamaForCausalLM):
    """Makes more of `position_ids` than the place of a token."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids**2
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    forward.__signature__ = __import__("inspect").signature(hf.LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_position_ids_that_do_not_undo_left_padding_are_not_given() -> None:
    model = tiny_model("llama")
    assert read_model_loss(model).needs_position_ids
    assert not read_model_loss(CountsFromElsewhere(model.config)).needs_position_ids


def test_what_a_first_forward_fixes_is_left_to_the_first_batch() -> None:
    model = hf.NllbMoeForConditionalGeneration(
        hf.NllbMoeConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=2, encoder_sparse_step=1,
            decoder_sparse_step=1, pad_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip
    router: Any = next(module for name, module in model.named_modules() if name.endswith("router"))
    before = router.expert_capacity
    assert read_model_loss(model).is_read
    assert router.expert_capacity == before
    assert all(module.training for module in model.modules())


def packed_loss(model: Any, folder: Path, before: list[int]) -> float:
    rows = [
        {"input_ids": before, "labels": [-100] * len(before)},
        {"input_ids": [20, 21, 22, 23], "labels": [20, 21, 22, 23]},
    ]
    args = TemporalTrainingArguments(str(folder), **SETTINGS, learning_rate=0.0)
    trainer = TemporalWeightTrainer(model, args, train_dataset=rows, data_collator=DataCollatorWithFlattening())
    return trainer.train().training_loss


@pytest.mark.parametrize("name", [*APART, *CROSSING])
def test_packed_documents_are_kept_apart_or_refused(name: str, tmp_path: Path) -> None:
    model = made({**APART, **CROSSING}[name]).eval()
    if name in CROSSING:
        with pytest.raises(ValueError, match="several documents in a row, which this model does not keep apart"):
            packed_loss(model, tmp_path, [5, 6, 7])
    else:
        losses = [packed_loss(model, tmp_path, before) for before in ([5, 6, 7], [50, 51, 52])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- decoders that shift their labels themselves


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_TRANSLATOR)),
        lambda: hf.BlenderbotForConditionalGeneration(hf.BlenderbotConfig(**_TRANSLATOR)),
        lambda: hf.BlenderbotSmallForConditionalGeneration(hf.BlenderbotSmallConfig(**_TRANSLATOR)),
        lambda: hf.MarianMTModel(hf.MarianConfig(**_TRANSLATOR)),
        lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_TRANSLATOR)),
        lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**_TRANSLATOR)),
    ],
)
@pytest.mark.parametrize("fused", ["on", "off"])
def test_translators(make: Callable[[], Any], fused: str, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [8 + i, 9, 10 + i, 2][: 3 + i % 2]} for i in range(4)]
    logged: dict[Any, Any] = {}
    for power in (None, 0.0, 2.0):
        model = made(make)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias = torch.linspace(-1, 1, VOCABULARY)[None]
        own: dict[str, Any] = {} if power is None else {"temporal_power": power, "temporal_fused_head": fused}
        args = (TrainingArguments if power is None else TemporalTrainingArguments)(str(tmp_path), **SETTINGS, **own)
        trainer = (Trainer if power is None else TemporalWeightTrainer)(
            model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate
        )
        if power == 2.0:
            expected = reference(model.eval(), rows)
        trainer.train()
        logged[power] = trainer.state.log_history[0]
        assert "eval_loss" in trainer.evaluate()
    for key in ("loss", "grad_norm"):
        assert logged[0.0][key] == pytest.approx(logged[None][key], rel=1e-5)
    assert logged[2.0]["loss"] == pytest.approx(expected, rel=1e-5)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows]), "labels": torch.tensor(labels)}


@torch.no_grad()
def reference(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Σ wℓ / D at p = 2, from the logits that the model makes with labels."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits[0].double()
        losses = F.cross_entropy(logits, labels[0], reduction="none")
        weights = torch.arange(1, len(losses) + 1).double() ** 2
        total += float((weights * losses).sum() * len(losses) / weights.sum())
        count += len(losses)
    return total / count


# ---- adapters and sizes


def test_a_merged_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**_LAYERS, pad_token_id=0, tie_word_embeddings=True)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tie"):
        model = get_peft_model(hf.LlamaForCausalLM(config), adapter)
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with LORA was merged.*unmerge_adapter\(\)"):
        TemporalWeightTrainer(model, args, train_dataset=causal_examples(4), data_collator=PadCollator()).train()
    model.unmerge_adapter()
    TemporalWeightTrainer(model, args, train_dataset=causal_examples(4), data_collator=PadCollator()).train()


def test_a_mixed_adapter_is_read_like_its_model() -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    found = read_model_loss(get_peft_model(tiny_model("llama"), adapter, mixed=True))
    assert (found.is_read, found.shifts_labels, found.counts_items) == (True, True, True)
    assert isinstance(found.fused_head, FusedHead)


def test_an_adapter_with_a_loss_of_its_own_is_named(tmp_path: Path) -> None:
    adapter = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=2)
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="LlamaForCausalLM with ADALORA with an own loss"):
        TemporalWeightTrainer(
            get_peft_model(tiny_model("llama"), adapter), args, train_dataset=causal_examples(4),
            data_collator=PadCollator(),
        ).train()  # fmt: skip


def test_the_trainer_follows_resized_embeddings(tmp_path: Path) -> None:
    model = tiny_model("llama")
    rows = causal_examples(4)
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    trainer = TemporalWeightTrainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=PadCollator())
    trainer.evaluate()
    model.resize_token_embeddings(VOCABULARY + 8)
    trainer.train_dataset = [{**row, "labels": [*row["labels"][:-1], VOCABULARY + 1]} for row in rows]
    trainer.train()
    rows[0]["labels"][-1] = VOCABULARY + 8
    with pytest.raises(ValueError, match=f"labels hold {VOCABULARY + 8}; accepted: token ids from 0 to"):
        trainer.evaluate(rows)  # type: ignore[arg-type]

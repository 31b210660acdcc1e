"""Answers are generated with the adapter added to a copy of the weights: the same answers, and no weight changed."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from hf_temporal.finetuning import adapters, generation, trainers
from hf_temporal.finetuning.adapters import adapter_added, add_adapter
from hf_temporal.finetuning.generation import generate_completions, make_batches
from hf_temporal.finetuning.models import ModelArguments
from hf_temporal.finetuning.trainers import Answers, CausalTrainer
from tests.finetuning.generated import some_prompts, with_adapter
from tests.tiny_models import tiny_model
from tests.tiny_summarization import tiny_llama, tiny_tokenizer

IDS = torch.arange(3, 43).view(2, 20)


def kept(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Where each parameter lies, and its bits."""
    return {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in model.named_parameters()}


def assert_kept(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = kept(model)
    assert after.keys() == before.keys()
    for name, (place, values) in before.items():
        assert after[name][0] == place, name
        assert torch.equal(after[name][1], values), name
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(adapters.logger, "propagate", True)
    caplog.set_level(logging.INFO, adapters.logger.name)
    return caplog


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_answers_are_those_of_the_adapter_beside_the_weights(
    num_beams: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_llama(len(tokenizer)))
    prompts = some_prompts(24)

    def answers() -> list[list[int]]:
        settings = {"max_new_tokens": 12, "num_beams": num_beams, "batch_size": batch_size}
        rows = generate_completions(model, tokenizer, prompts, **settings)  # type: ignore[arg-type]
        end = tokenizer.eos_token_id
        return [row[: row.index(end)] if end in row else row for row in rows]

    before, found = kept(model), answers()
    assert_kept(model, before)
    assert model.training
    monkeypatch.setattr(generation, "adapter_added", lambda _: nullcontext())
    monkeypatch.setattr(generation, "prefix_cache", lambda *_: None)
    monkeypatch.setattr(generation, "make_batches", lambda lengths, _: make_batches(lengths, lambda _: batch_size))
    assert found == answers()
    with model.disable_adapter():
        assert found != answers()
    assert len({tuple(row) for row in found}) > 12


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_the_sum_computes_what_the_adapter_does_and_leaves_no_trace(name: str, log: pytest.LogCaptureFixture) -> None:
    model = with_adapter(tiny_model(name)).eval()
    before = kept(model)
    with torch.no_grad():
        beside = model(input_ids=IDS).logits
        with adapter_added(model):
            assert any(module.merged for module in model.modules() if hasattr(module, "merged"))
            added = model(input_ids=IDS).logits
        torch.testing.assert_close(added, beside, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(input_ids=IDS).logits, beside)
    assert_kept(model, before)
    size = sum(layer.base_layer.weight.nbytes for layer in model.modules() if hasattr(layer, "lora_A")) / 2**20
    assert f"a copy of the weights, which takes {size:,.1f} MiB" in log.text


def test_the_weights_are_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_llama(len(tokenizer)))
    before = kept(model)
    base = model.get_base_model()
    forward, calls = base.model.forward, []

    def fails_at_the_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base.model, "forward", fails_at_the_third)
    with pytest.raises(RuntimeError, match="no memory"):
        generate_completions(model, tokenizer, some_prompts(4), max_new_tokens=6)
    assert_kept(model, before)


def tied_head() -> Any:
    model = tiny_model("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return with_adapter(model, target_modules=["q_proj", "lm_head"])


def quantized() -> Any:
    """A layer with a forward of its own, as of PEFT's layers around those of bitsandbytes."""
    model = with_adapter(tiny_model("llama"))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    plain = type(layer)
    layer.__class__ = type("Linear4bit", (plain,), {"forward": lambda *given: plain.forward(*given)})
    return model


def on_meta() -> Any:
    model = with_adapter(tiny_model("llama"))
    layer = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    return model


def broken() -> Any:
    model = with_adapter(tiny_model("llama"))
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tied_head, "shared, such as a tied LM head's"),
        (lambda: with_adapter(tiny_model("llama"), use_dora=True), "a variant of LoRA"),
        (lambda: with_adapter(tiny_model("llama").bfloat16()), "would be rounded in weights of bfloat16"),
        (lambda: with_adapter(tiny_model("mixtral"), target_modules=["embed_tokens"]), "Embedding is no plain linear"),
        (quantized, "Linear is no plain linear layer with a LoRA adapter"),
        (on_meta, "sharded, quantized or elsewhere"),
        (broken, "NaNs detected"),
    ],
    ids=["tied head", "DoRA", "bfloat16", "embedding", "quantized", "meta", "not finite"],
)
def test_the_adapter_stays_beside_the_weights_where_the_sum_would_not_be_the_same(
    make: Any, reason: str, log: pytest.LogCaptureFixture
) -> None:
    model = make()
    before = kept(model)
    with adapter_added(model):
        assert {name: place for name, (place, _) in kept(model).items()} == {
            name: place for name, (place, _) in before.items()
        }
        assert not any(getattr(module, "merged", False) for module in model.modules())
    assert log.messages[-1].startswith("Answers are generated with the adapter beside the weights: ")
    assert reason in log.text


def test_a_scaled_adapter_is_added_too(log: pytest.LogCaptureFixture) -> None:
    model = with_adapter(tiny_model("llama"), use_rslora=True).eval()
    with torch.no_grad():
        beside = model(input_ids=IDS).logits
        with adapter_added(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, beside, rtol=1e-4, atol=1e-5)
    assert "added to a copy" in log.text


@pytest.mark.parametrize(("share", "processes", "fits"), [(2.5, 1, True), (1.5, 1, False), (2.5, 2, False)])
def test_a_copy_takes_half_of_the_free_memory_at_most(
    share: float, processes: int, fits: bool, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(tiny_model("llama"))
    size = sum(layer.base_layer.weight.nbytes for layer in model.modules() if hasattr(layer, "lora_A"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=share * size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with adapter_added(model):
        pass
    assert ("added to a copy" in log.text) is fits
    assert ("MiB, more than half of the" in log.text) is not fits


def test_a_disabled_or_merged_adapter_is_left_alone(log: pytest.LogCaptureFixture) -> None:
    model = with_adapter(tiny_model("llama")).eval()
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=IDS).logits
        with adapter_added(model):
            assert torch.equal(model(input_ids=IDS).logits, plain)
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapter_added(model):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with adapter_added(tiny_model("llama")):
        pass
    assert not log.messages


def test_sharded_weights_are_neither_copied_nor_batched_unevenly(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    model: Any = add_adapter(tiny_llama(len(tokenizer)), ModelArguments(use_peft=True), "CAUSAL_LM")
    monkeypatch.setattr(generation, "adapter_added", lambda _: pytest.fail("an adapter was added"))
    rows: list[int] = []

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        rows.append(len(input_ids))
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(generation, "is_read_alone", lambda *_, **__: True)
    generate_completions(model, tokenizer, some_prompts(10), max_new_tokens=2, batch_size=4, synced_gpus=True)
    assert rows == [4, 4, 2]


# ---- an evaluation


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_adds_the_adapter_once_for_losses_and_answers(
    bf16: bool, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast for the answers alone."""
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_llama(len(tokenizer)))
    trainer = CausalTrainer(
        model,
        TrainingArguments(str(tmp_path), bf16=bf16, use_cpu=True, report_to=[], disable_tqdm=True),
        eval_dataset=Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in some_prompts(10)]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        answers=Answers(Mock(score=lambda generated, _: {"tokens": str(generated)}), 4, 1),
    )
    before, merged = kept(model), []
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "adapter_added", lambda _: nullcontext())
        beside = trainer.evaluate()
    log.clear()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda layer, *_: merged.append(layer.merged))
    found = trainer.evaluate()
    assert_kept(model, before)
    assert log.text.count("added to a copy") == 1
    assert merged[0] is not bf16
    assert merged[-1]
    assert found["eval_tokens"] == beside["eval_tokens"]
    for name in ("eval_loss", "eval_temporal_loss"):
        assert found[name] == pytest.approx(beside[name], rel=1e-5)

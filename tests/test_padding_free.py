"""Padding-free batches: the attention that runs document by document, and training with it against padded rows."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer, padding_free
from hf_temporal.padding_free import ATTENTION, document_attention, document_mask, use_padding_free
from tests.tiny_models import END, IGNORE, PAD, START, VOCABULARY, Example, PadCollator, examples, tiny_model
from tests.tiny_training import Steps, distance, train

LENGTHS = (5, 1, 13, 13, 1, 1, 9, 30)


# ---- the attention alone


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    return (key <= query) & (query - key < (window or math.inf))


def block_diagonal(window: int | None) -> Tensor:
    """`[time, time]` booleans: which keys a query sees, itself and those before it in its document."""
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    return (documents[:, None] == documents) & sees(place[:, None], place, window)


def mask_settings(window: int | None, **changed: Any) -> dict[str, Any]:
    """What transformers asks a mask for, for one row of documents."""
    allowed = block_diagonal(window)
    settings: dict[str, Any] = {
        "batch_size": 1, "q_length": len(allowed), "kv_length": len(allowed), "q_offset": 0, "kv_offset": 0,
        "cache_position": torch.arange(len(allowed)),
        "mask_function": lambda _batch, _head, query, key: allowed[query, key], "attention_mask": None,
        "allow_is_causal_skip": False, "local_size": window, "use_vmap": False, "device": torch.device("cpu"),
    }  # fmt: skip
    return settings | changed


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 7, 30, 100])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_each_document_attends_to_itself(key_heads: int, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    heads, time, size = 4, sum(LENGTHS), 8
    inputs = [torch.randn(1, count, time, size, dtype=torch.float64) for count in (heads, key_heads, key_heads)]
    upstream = torch.randn(1, time, heads, size, dtype=torch.float64)
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    mask = document_mask(**mask_settings(window))
    assert mask is not None
    assert mask.flatten().tolist() == (([0, 0, *LENGTHS]) if window is None else [window, 0, *LENGTHS]) or window == 1

    q, k, v = (each.clone().requires_grad_() for each in inputs)
    found, _ = document_attention(module, q, k, v, mask, scaling=0.3, softcap=softcap)
    found.backward(upstream)

    rq, rk, rv = (each.clone().requires_grad_() for each in inputs)
    repeated_k, repeated_v = (each.repeat_interleave(heads // key_heads, 1) for each in (rk, rv))
    scores = 0.3 * rq @ repeated_k.mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~block_diagonal(window), -math.inf).softmax(-1)
    expected = (weights @ repeated_v).transpose(1, 2)
    expected.backward(upstream)

    for mine, right in zip((found, q.grad, k.grad, v.grad), (expected, rq.grad, rk.grad, rv.grad), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)


OTHER_PATTERNS = {
    "keys behind the query": lambda _b, _h, query, key: block_diagonal(None)[query, key] | (key == query + 1),
    "a hole": lambda _b, _h, query, key: block_diagonal(None)[query, key] & (key != query - 1),
    "a window that is not named": lambda _b, _h, query, key: block_diagonal(4)[query, key],
    "the document before": lambda _b, _h, query, key: (key <= query) & (query != 6) | block_diagonal(None)[query, key],
    "all of the row": lambda _b, _h, query, key: key >= 0 * query,
}


@pytest.mark.parametrize("pattern", OTHER_PATTERNS)
def test_any_other_pattern_gets_the_mask_of_sdpa(pattern: str) -> None:
    mask = document_mask(**mask_settings(None, mask_function=OTHER_PATTERNS[pattern]))
    assert mask is not None
    assert mask.shape == (1, 1, sum(LENGTHS), sum(LENGTHS))


@pytest.mark.parametrize(
    "changed",
    [{"use_vmap": True}, {"kv_length": 80}, {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.bool)}],
)
def test_other_inputs_get_the_mask_of_sdpa(changed: dict[str, Any]) -> None:
    functions = {"mask_function": lambda _batch, _head, query, key: key <= query}
    mask = document_mask(**mask_settings(None, **functions | changed))
    assert mask is not None
    assert mask.dtype == torch.bool


# ---- models


def tiny(name: str, adapter: str = "plain") -> Any:
    """A tiny model, Gemma 2 with a soft cap on its attention, windows of 4 tokens on every second layer."""
    if name == "gemma3":
        torch.manual_seed(0)
        model: Any = Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4,
                layer_types=["sliding_attention", "full_attention"], pad_token_id=PAD, bos_token_id=START,
                eos_token_id=END, initializer_range=0.3,
            )
        )  # fmt: skip
        return model
    if name != "gemma2":
        return tiny_model(name, adapter)
    model = tiny_model(name, sliding_window=4)
    for layer in (
        model.model.layers if model.config._attn_implementation == "eager" else ()
    ):  # older sdpa drops the cap
        layer.self_attn.attn_logit_softcapping = 1.5
    return model


def rows_with_short_ones() -> list[Example]:
    """Eight rows, two of them of one token; the first one is no target, which the Trainer would count for GPT-2."""
    rows = [{**row, "labels": [IGNORE, *row["labels"][1:]]} for row in examples("llama", 8)]
    for index in (2, 5):
        rows[index] = {key: values[:1] for key, values in rows[index].items()}
    return rows


def trained(model: Any, collator: Any, folder: Path, **options: Any) -> tuple[Steps, dict[str, float]]:
    rows = options.pop("rows", None) or rows_with_short_ones()
    settings: dict[str, Any] = {"temporal_power": 2.0, "per_device_eval_batch_size": 3, **options}
    steps = train(
        TemporalWeightTrainer, TemporalTrainingArguments, model, rows, folder, collator=collator, max_steps=2,
        trainer_arguments={"eval_dataset": rows}, **settings,
    )  # fmt: skip
    assert steps.trainer is not None
    metrics = steps.trainer.evaluate()
    return steps, {key: value for key, value in metrics.items() if "loss" in key}


def check_same(model: Any, folder: Path, **options: Any) -> None:
    """Two steps and an evaluation on padded rows, and on the same rows in one."""
    padded, padded_metrics = trained(model, PadCollator(), folder / "padded", **options)
    assert use_padding_free(model)
    packed, packed_metrics = trained(model, DataCollatorWithFlattening(), folder / "packed", **options)
    for one, other in zip(packed.logs[:2], padded.logs[:2], strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
    for gradients, right in zip(packed.gradients, padded.gradients, strict=True):
        assert distance(gradients, right) < 1e-5
    assert packed_metrics == pytest.approx(padded_metrics, rel=1e-5)
    assert {"eval_loss", "eval_temporal_loss", "eval_head_loss"} <= packed_metrics.keys()


MODELS = ("llama", "qwen3", "gemma2", "gemma3", "gpt2")


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_documents_is_learned_as_padded_rows_are(name: str, tmp_path: Path) -> None:
    check_same(tiny(name), tmp_path)


OPTIONS: list[dict[str, Any]] = [
    {"temporal_power": 0.0},
    {"temporal_origin": "sequence", "temporal_normalization": "tokens", "learning_rate": 1e-3},
    {"temporal_origin": "turn", "temporal_normalization": "batch"},
    {"batch_size": 4},
    {"batch_size": 1},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.items())))
def test_whatever_the_weighting_and_the_batch(options: dict[str, Any], tmp_path: Path) -> None:
    check_same(tiny("llama"), tmp_path, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_trained_alike(name: str, tmp_path: Path) -> None:
    check_same(tiny(name, "lora"), tmp_path, gradient_checkpointing=name == "llama")


def test_own_weights_of_tokens(tmp_path: Path) -> None:
    rows: Any = [{**row, "loss_weights": [0.5 * i for i, _ in enumerate(row["labels"])]} for row in examples("llama")]
    check_same(tiny("llama"), tmp_path, rows=rows)


def test_each_document_is_attended_to_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    attention = padding_free._attention

    def seen(module: nn.Module, query: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return attention(module, query, *others)

    monkeypatch.setattr(padding_free, "_attention", seen)
    model, rows = tiny("llama"), rows_with_short_ones()
    assert use_padding_free(model)
    shapes.clear()
    model(**DataCollatorWithFlattening()(rows), use_cache=False)
    assert shapes == 2 * [(1, 2, len(row["input_ids"]), 8) for row in rows]


def test_generation_and_padded_rows_are_as_before() -> None:
    for name in MODELS:
        model, batch = tiny(name).eval(), PadCollator("left")(examples("llama", 4))
        del batch["labels"]
        changed = copy.deepcopy(model)
        assert use_padding_free(changed)
        tokens = [each.generate(**batch, max_new_tokens=6, do_sample=False) for each in (model, changed)]
        assert torch.equal(*tokens)
        real = batch["attention_mask"] > 0
        with torch.no_grad():
            logits = [each(**batch).logits[real] for each in (model, changed)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_saved_model_has_the_usual_attention(tmp_path: Path) -> None:
    model = tiny("llama")
    assert use_padding_free(model)
    assert model.config._attn_implementation == ATTENTION
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# ---- models that cannot do it


def gpt_oss() -> Any:
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=PAD,
            eos_token_id=END,
        )
    )  # fmt: skip


def prompt_tuned() -> Any:
    return get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def several_embeddings() -> Any:
    model = tiny("llama")
    model.model.embed_tokens = nn.ModuleList([model.model.embed_tokens])
    return model


UNABLE = {
    "has no attribute 'weight'": several_embeddings,
    "s_aux": gpt_oss,
    "an encoder-decoder has rows of two lengths": lambda: tiny_model("t5"),
    "prompt learning": prompt_tuned,
    "weights are not at hand": lambda: tiny("llama").to("meta"),
    "no plain text model": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("reason", UNABLE)
def test_others_keep_their_attention_and_the_log_says_why(reason: str, said: pytest.LogCaptureFixture) -> None:
    model = UNABLE[reason]()
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    assert not use_padding_free(model)
    (line,) = said.messages
    assert "to be padded" in line
    assert reason in line
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == own


def test_documents_that_do_not_add_up_are_an_error() -> None:
    query = torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"documents of \[2, 2\] tokens, and queries of shape \(1, 1, 5, 4\)"):
        document_attention(nn.Module(), query, query, query, torch.tensor([[[[0, 0, 2, 2]]]]))

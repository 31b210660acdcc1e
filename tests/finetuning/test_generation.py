"""Answers are generated with the adapter added to a copy of the weights: the same answers, and no weight changed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from hf_temporal.finetuning import adapters, generation
from hf_temporal.finetuning.adapters import adapter_added, add_adapter
from hf_temporal.finetuning.generation import (
    cache_behind_padding,
    can_drop,
    generate_completions,
    make_batches,
    prefix_cache,
    room,
)
from hf_temporal.finetuning.models import ModelArguments
from tests.tiny_models import END, tiny_model
from tests.tiny_summarization import tiny_llama, tiny_tokenizer

WORDS = 300  # of the vocabulary
IDS = torch.arange(3, 43).view(2, 20)


def with_adapter(model: Any, **settings: Any) -> Any:
    """A model with an adapter that changes what it says."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **settings})
    adapted = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def some_prompts(number: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, WORDS) for _ in range(generator.randrange(2, 40))] for _ in range(number)]


def up_to_the_end(row: list[int], ends: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]


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
    generate_completions(model, tokenizer, some_prompts(10), max_new_tokens=2, batch_size=4, synced_gpus=True)
    assert rows == [4, 4, 2]


# ---- batches


@pytest.mark.parametrize("tokens", [1, 45, 200])
def test_batches_have_what_their_longest_prompt_allows(tokens: int) -> None:
    lengths = [len(prompt) for prompt in some_prompts(60)]
    batches = make_batches(lengths, lambda length: tokens // length)
    assert sorted(index for batch in batches for index in batch) == list(range(60))
    for batch, following in pairwise([*batches, []]):
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert not following or (len(batch) + 1) * lengths[following[0]] > tokens
        assert longest <= min((lengths[index] for index in following), default=longest)
    assert make_batches([], lambda length: tokens // length) == []


@pytest.mark.parametrize("vocabulary", [97, 5000])
def test_a_batch_takes_no_more_memory_than_an_evaluation_with_all_logits(vocabulary: int) -> None:
    """Of rows of 50 tokens: keys and values of 2 layers, and four results of 24 numbers."""
    model = tiny_model("llama")
    model.resize_token_embeddings(vocabulary)
    prefix = prefix_cache(model.eval(), [[*range(3, 15), 40], [*range(3, 15), 41]])
    config = model.config
    size = config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    layer = 4 * 4 * config.intermediate_size
    token = 4 * 2 * size + layer
    evaluation = 4 * 50 * (4 * vocabulary + layer)
    assert evaluation - token < room(model, prefix, 4, 50) * token <= evaluation
    assert room(model, None, 4, 50) == 4 * 50


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast", "quantized"])
def test_batches_stay_as_they_were_where_rounding_depends_on_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    model: Any = tiny_llama(len(tokenizer))
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    elif kind == "autocast":
        AcceleratorState._reset_state()  # a process has one precision
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        AcceleratorState._reset_state()
    elif kind == "quantized":
        model.is_quantized = True  # as transformers marks it
    rows, looked = [], []

    def batches(lengths: list[int], most: Callable[[int], int]) -> list[list[int]]:
        rows.append([most(length) for length in (1, 28)])
        return make_batches(lengths, most)

    monkeypatch.setattr(generation, "make_batches", batches)
    shared = [[*range(3, 30), end] for end in (40, 50, 60)]
    monkeypatch.setattr(generation, "prefix_cache", lambda *_: looked.append(True))
    model = with_adapter(model) if kind == "quantized" else model
    generate_completions(model, tokenizer, shared, max_new_tokens=2, batch_size=3)
    exact = kind == "float32"
    assert rows == [[3 * 30 // 3, 3] if exact else [3, 3]]
    assert looked == [True] * exact


# ---- rows that have ended


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_llama(len(tokenizer)))
    prompts = [[*range(3, 15), *end] for end in some_prompts(40)]

    ends = model.generation_config.eos_token_id = [*range(5, len(tokenizer), 4)]

    def answers() -> list[list[int]]:
        """Each up to its first end, behind which there is padding."""
        rows = generate_completions(model, tokenizer, prompts, max_new_tokens=20, batch_size=40)
        return [up_to_the_end(row, ends) for row in rows]

    seen: list[int] = []
    hook = model.get_base_model().register_forward_hook(lambda *call: seen.append(len(call[-1].logits)))
    found = answers()
    hook.remove()
    lengths = sorted(map(len, found))
    assert lengths[0] < lengths[20] < lengths[-1]
    prefix, *rows = seen
    assert prefix == 1
    assert rows == sorted(rows, reverse=True)
    assert (len(rows), rows[0], rows[1]) == (20, 40, 40)
    assert len(set(rows)) > 2
    monkeypatch.setattr(generation, "can_drop", lambda *_: False)
    assert found == answers()


RULES: list[dict[str, Any]] = [
    *({"min_new_tokens": 9}, {"begin_suppress_tokens": [5]}, {"exponential_decay_length_penalty": (2, 1.5)}),
    *({"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 2}, {"guidance_scale": 2.0}),
    {"max_time": 60.0},
]
KNOWN: list[dict[str, Any]] = [
    *({}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_length": 40}, {"top_k": 3}),
    *({"eos_token_id": 5}, {"eos_token_id": None}),
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_count_from_the_prompt_keep_the_rows_together(rule: dict[str, Any]) -> None:
    model = tiny_llama(len(tiny_tokenizer()))
    assert can_drop(model, 1)
    assert not can_drop(model, 2)
    model.generation_config.update(**rule)
    assert not can_drop(model, 1)


@pytest.mark.parametrize("setting", KNOWN)
def test_a_generation_configuration_says_the_same_without_the_rows_that_have_ended(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [[*range(3, 15), *end] for end in some_prompts(20)]

    def answers() -> list[list[int]]:
        model = tiny_llama(len(tokenizer))
        model.generation_config.update(**{"eos_token_id": [*range(5, len(tokenizer), 4)], **setting})
        ends = model.generation_config.eos_token_id or []
        rows = generate_completions(model, tokenizer, prompts, max_new_tokens=12, batch_size=20)
        return [up_to_the_end(row, [ends] if isinstance(ends, int) else ends) for row in rows]

    dropping = Mock(side_effect=generation.generate_and_drop)
    monkeypatch.setattr(generation, "generate_and_drop", dropping)
    found = answers()
    dropping.assert_called()
    monkeypatch.setattr(generation, "can_drop", lambda *_: False)
    assert found == answers()


# ---- what all prompts begin with


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    ("name", "cached"),
    [("llama", True), ("gpt2", True), ("qwen3", True), ("cohere", True), ("mixtral", True), ("gemma2", False)],
)
def test_a_prefix_computed_once_gives_the_same_answers(
    name: str, cached: bool, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 keeps a window of its tokens."""
    model = with_adapter(tiny_model(name))
    model.get_base_model().config.output_router_logits = False
    prefix, ends = list(range(3, 15)), [[7 + token % 80 for token in prompt] for prompt in some_prompts(30)]
    prompts = [prefix, *(prefix + end for end in ends)]

    def answers() -> list[list[int]]:
        how: dict[str, Any] = {"max_new_tokens": 8, "num_beams": num_beams, "batch_size": 7}
        rows = generate_completions(model, tiny_tokenizer(), prompts, **how)
        return [up_to_the_end(row, [END]) for row in rows]

    computed: list[int] = []

    def behind_padding(cache: DynamicCache, padding: Tensor) -> DynamicCache:
        computed.append(cache.get_seq_length())
        return cache_behind_padding(cache, padding)

    monkeypatch.setattr(generation, "cache_behind_padding", behind_padding)
    found = answers()
    assert set(computed) == ({len(prefix) - 1} if cached else set())
    monkeypatch.setattr(generation, "prefix_cache", lambda *_: None)
    assert found == answers()
    assert len({tuple(row) for row in found}) > 2


def test_short_beginnings_and_single_prompts_are_computed_in_full() -> None:
    model = tiny_model("llama").eval()
    long = list(range(3, 15))
    with torch.no_grad():
        for prompts in ([], [long], [long, long[:6]], [[*long[:7], 40, 41], long]):
            assert prefix_cache(model, prompts) is None
        cache = prefix_cache(model, [[*long, 40], [*long, 41, 42]])
        routed = tiny_model("mixtral").eval()
        assert routed.config.output_router_logits
        assert prefix_cache(routed, [[*long, 40], [*long, 41, 42]]) is None
    assert cache is not None
    assert cache.get_seq_length() == len(long)


def test_columns_of_a_cache_move_behind_the_padding() -> None:
    cache = DynamicCache()
    keys = torch.arange(10.0).view(1, 1, 5, 2)
    cache.update(keys, -keys, 0)
    layer: Any = cache_behind_padding(cache, torch.tensor([0, 2, 5])).layers[0]
    assert layer.keys.shape == (3, 1, 5, 2)
    assert torch.equal(layer.keys[0], keys[0])
    assert torch.equal(layer.keys[1, :, 2:], keys[0, :, :3])
    assert torch.equal(layer.values, -layer.keys)

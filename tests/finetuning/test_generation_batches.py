"""Answers are generated in batches of many rows, from what all prompts begin with: the same ones as one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import DynamicCache, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from hf_temporal.finetuning import generation
from hf_temporal.finetuning.generation import (
    cache_behind_padding,
    cache_in,
    can_drop,
    generate_completions,
    make_batches,
    prefix_cache,
    room,
)
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from tests.finetuning.generated import some_prompts, up_to_the_end, with_adapter
from tests.tiny_models import END, tiny_model
from tests.tiny_summarization import tiny_llama, tiny_tokenizer


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
    rows = room(model, prefix, 4, 50)
    assert evaluation - token < rows(1) * token <= evaluation
    assert room(model, None, 4, 50)(1) == 4 * 50
    in_parts = room(model, prefix, 4, 50, in_parts=True)
    for length in (1, 20, 50):
        row = 4 * 2 * size * length
        parts, step = 4 * 50 * layer, 3 * 4 * vocabulary + layer
        most = in_parts(length)
        assert max(most * row + parts, most * (row + step)) <= evaluation
        assert max((most + 1) * row + parts, (most + 1) * (row + step)) > evaluation


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
    monkeypatch.setattr(generation, "TOKENS_AT_ONCE", 4096)
    monkeypatch.setattr(generation, "is_read_alone", lambda *_, **__: True)

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
    assert (len(rows), rows[0], rows[1]) == (20, 40, sum(length > 1 for length in lengths))
    assert len(set(rows)) > 2
    monkeypatch.setattr(generation, "can_drop", lambda *_: False)
    assert found == answers()


@pytest.mark.parametrize("most", [1, 7, 40])
@pytest.mark.parametrize("at_once", [1, 60, 4096])
def test_rows_are_begun_in_parts_and_continued_together(
    at_once: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many lengths; some of their answers end at the first token, others later."""
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_llama(len(tokenizer)))
    prompts = [[*range(3, 15), *end] for end in some_prompts(20)]
    model.generation_config.eos_token_id = None
    first = [row[0] for row in generate_completions(model, tokenizer, prompts, max_new_tokens=1)]
    ends = model.generation_config.eos_token_id = [first[0], first[9], *range(6, len(tokenizer), 8)]
    monkeypatch.setattr(generation, "room", lambda *_, **__: lambda _: most)
    monkeypatch.setattr(generation, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(generation, "is_read_alone", lambda *_, **__: True)

    def answers() -> list[list[int]]:
        rows = generate_completions(model, tokenizer, prompts, max_new_tokens=10, batch_size=20)
        return [up_to_the_end(row, ends) for row in rows]

    seen: list[tuple[int, ...]] = []
    hook = model.get_base_model().register_forward_hook(
        lambda _, __, given, ___: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = answers()
    hook.remove()
    lengths = {len(row) for row in found}
    assert lengths >= {1, 10}
    assert len(lengths) > 3
    computed = sorted(len(prompt) - 12 for prompt in prompts)
    together = [computed[start : start + most] for start in range(0, 20, most)]
    parts = [
        (len(part), max(batch[index] for index in part))
        for batch in together
        for part in make_batches(batch, lambda length: at_once // length)
    ]
    assert [shape for shape in seen[1:] if shape[1] > 1] == [part for part in parts if part[1] > 1]
    goes_on = [len(found[index]) > 1 for index in sorted(range(20), key=lambda index: len(prompts[index]))]
    continued = max(sum(goes_on[start : start + most]) for start in range(0, 20, most))
    assert max(rows for rows, columns in seen if columns == 1) == continued
    monkeypatch.setattr(generation, "prefix_cache", lambda *_: None)
    assert found == answers()


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0], [1]])
def test_a_cache_with_room_holds_what_a_dynamic_one_does(indices: list[int]) -> None:
    torch.manual_seed(0)
    plain, tokens = DynamicCache(), [torch.randn(3, 2, columns, 4) for columns in (5, 1, 2)]
    roomy = cache_in([(torch.full((3, 2, 8, 4), torch.nan), torch.full((3, 2, 8, 4), torch.nan))], 0)
    for step, keys in enumerate(tokens):
        if step == 1:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor(indices))
        rows = keys if step == 0 else keys[: len(indices)]
        expected, found = (cache.update(rows, -rows, 0) for cache in (plain, roomy))
        assert all(map(torch.equal, expected, found))
        assert roomy.get_seq_length() == plain.get_seq_length()
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        roomy.update(rows[:, :, :1], rows[:, :, :1], 0)


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


# ---- models that read padding, or mix rows


def one_by_one(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """By the model's forward alone, every token anew."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(tokens):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize(
    ("name", "alone"),
    [("rwkv", True), ("xlstm", True), ("recurrent_gemma", True), ("mamba2", False), ("olmo_hybrid", False)],
)
def test_answers_do_not_depend_on_the_other_prompts(
    name: str, alone: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the prompts are some of equal length: RWKV mixes rows without any padding."""
    monkeypatch.setattr(generation.logger, "propagate", True)
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model, _ = load_causal_lm(ModelArguments(model_type=name, config_overrides="small"), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # padding and biases, which begin as zeros, too
    model.generation_config.eos_token_id = None
    prompts = [each[:length] for each, length in zip(some_prompts(99), [3, 5, 5, 9, 11, 11], strict=False)]
    calls = Mock(side_effect=model.generate)
    monkeypatch.setattr(model, "generate", calls)
    found = generate_completions(model, tokenizer, prompts, max_new_tokens=6, batch_size=8)
    assert found == one_by_one(model.eval(), prompts, 6)
    assert len({tuple(row) for row in found}) > 2
    trials = 3
    assert calls.call_count == trials + (len(prompts) if alone else 1)
    assert ("answers are generated one at a time" in caplog.text) is alone


def test_a_model_without_a_cache_generates() -> None:
    """The first GPT takes all that a prefix needs, and returns no keys and values."""
    config = OpenAIGPTConfig(vocab_size=len(tiny_tokenizer()), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = OpenAIGPTLMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    prompts = [[*range(3, 15), *end[:9]] for end in some_prompts(4)]

    def answers(prompts: list[list[int]]) -> list[list[int]]:
        return generate_completions(model, tiny_tokenizer(), prompts, max_new_tokens=4)

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


# ---- what all prompts begin with


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_configuration_that_returns_more_than_tokens(num_beams: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": num_beams}
    expected = generate_completions(model, tokenizer, some_prompts(5), **settings)
    model.generation_config.return_dict_in_generate = True
    assert generate_completions(model, tokenizer, some_prompts(5), **settings) == expected


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

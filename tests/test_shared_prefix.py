"""What all documents of a packed row begin with, computed once: against padded rows and documents alone."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from hf_temporal import padding_free, shared_prefix
from hf_temporal.padding_free import use_padding_free
from hf_temporal.shared_prefix import prefix_length
from tests.test_padding_free import MODELS, check_same, tiny
from tests.tiny_models import IGNORE, VOCABULARY, Example, PadCollator, causal_examples

SHARED = 10


def rows_that_begin_alike(*, targets_from: int = SHARED) -> list[Example]:
    """Eight rows, `SHARED` tokens of which are the same; those before `targets_from` are no targets."""
    rows = causal_examples()
    rows[5] = {"input_ids": [4], "labels": [4]}
    return [
        {
            "input_ids": [*range(4, 4 + SHARED), *row["input_ids"]],
            "labels": [*(IGNORE if i < targets_from else 4 + i for i in range(SHARED)), *row["labels"]],
        }
        for row in rows
    ]


def widths_in_layers(model: Any) -> list[int]:
    """Filled with the tokens that reach the attention of each layer."""
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0", "h.0")):
            module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    return seen


def packed(rows: list[Example]) -> dict[str, Tensor]:
    return {key: value for key, value in DataCollatorWithFlattening()(rows).items() if key != "labels"}


@pytest.mark.parametrize("targets_from", [SHARED, 1])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_learned_as_padded_ones_are(name: str, targets_from: int, tmp_path: Path) -> None:
    check_same(tiny(name), tmp_path, rows=rows_that_begin_alike(targets_from=targets_from))


OPTIONS: list[dict[str, Any]] = [
    {"temporal_origin": "sequence", "temporal_normalization": "tokens", "learning_rate": 1e-3},
    {"temporal_origin": "turn", "temporal_normalization": "batch", "batch_size": 3},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.items())))
@pytest.mark.parametrize("adapter", ["plain", "lora"])
def test_whatever_the_weighting_and_the_batch(adapter: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_same(tiny("llama", adapter), tmp_path, rows=rows_that_begin_alike(), **options)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_computed_once_and_seen_by_all(name: str) -> None:
    model, rows = tiny(name).eval(), rows_that_begin_alike()
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False, output_hidden_states=True)
            for row in rows
        ]
    assert use_padding_free(model)
    seen = widths_in_layers(model)
    with torch.no_grad():
        found = model(**packed(rows), use_cache=False, output_hidden_states=True)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert seen == [tokens - 7 * SHARED]
    torch.testing.assert_close(found.logits, torch.cat([each.logits for each in alone], 1), rtol=1e-5, atol=1e-5)
    for level, states in enumerate(found.hidden_states):
        expected = torch.cat([each.hidden_states[level] for each in alone], 1)
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_any_rows_give_the_logits_of_each_alone() -> None:
    model, draw = tiny("gemma3").eval(), random.Random(0)
    free = copy.deepcopy(model)
    assert use_padding_free(free)
    seen, shortened = widths_in_layers(free), 0
    for _ in range(60):
        first = [draw.randrange(VOCABULARY) for _ in range(draw.choice((0, 3, 7, 8, 9, 20)))]
        rows = [first + [draw.randrange(3) for _ in range(draw.randint(1, 12))] for _ in range(draw.randint(1, 5))]
        batch = packed([{"input_ids": row, "labels": row} for row in rows])
        with torch.no_grad():
            expected = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits for row in rows], 1)
            found = free(**batch, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        shortened += seen.pop() < found.shape[1]
    assert 10 < shortened < 50


@pytest.mark.parametrize(
    ("rows", "computed"),
    [
        ([[*range(12)]] * 3, 12 + 2),  # each keeps a token of its own
        ([[*range(12)], [*range(9)]], 12 + 1),
        ([[*range(12)], [*range(8)]], 20),
        ([[*range(7), 7], [*range(7), 8]], 16),
        ([[*range(12)]], 12),
        ([[5, *range(12)], [6, *range(12)]], 26),
    ],
)
def test_what_is_shared(rows: list[list[int]], computed: int) -> None:
    model = tiny("llama")
    assert use_padding_free(model)
    seen = widths_in_layers(model)
    model(**packed([{"input_ids": row, "labels": row} for row in rows]), use_cache=False)
    assert seen == [computed]


def test_other_calls_are_left_alone() -> None:
    model, rows = tiny("llama").eval(), rows_that_begin_alike()
    assert use_padding_free(model)
    row, padded = packed(rows), PadCollator()(rows)
    seen = widths_in_layers(model)
    tokens, width = row["input_ids"].shape[1], padded["input_ids"].shape[1]
    embeddings = model.get_input_embeddings()(row["input_ids"])
    two = {key: torch.cat([value, value]) for key, value in row.items()}
    calls: list[tuple[int, dict[str, Any]]] = [
        (width, {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}),
        (tokens, {"inputs_embeds": embeddings, "position_ids": row["position_ids"]}),
        (tokens, {"input_ids": row["input_ids"]}),
        (tokens, two),
        (tokens, {**row, "use_cache": True}),
        (tokens, {**row, "position_ids": row["position_ids"] + (torch.arange(tokens) > 30)}),
        (tokens, {**row, "token_type_ids": row["position_ids"]}),
    ]
    for expected, call in calls:
        with torch.no_grad():
            outputs = model(**{"use_cache": False, **call})
        assert seen.pop() == expected
        assert outputs.logits.shape[1] == expected


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, rows = tiny("llama").eval(), rows_that_begin_alike()
    assert use_padding_free(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**packed(rows), use_cache=False)
    handle.remove()
    assert prefix_length.get() == 0
    other = tiny("llama").eval()
    other.set_attn_implementation(padding_free.ATTENTION)
    batch = packed(rows)
    torch.testing.assert_close(other(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)


def test_a_second_call_adds_nothing() -> None:
    model = tiny("llama")
    assert use_padding_free(model)
    hooks = len(model.model._forward_hooks), len(model.model._forward_pre_hooks)
    assert use_padding_free(model)
    assert hooks == (len(model.model._forward_hooks), len(model.model._forward_pre_hooks)) == (1, 1)


def test_a_model_that_gives_other_logits_then_computes_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = shared_prefix._shared

    def wrong(given: dict[str, Any]) -> Any:
        found = shared(given)
        return found and (found[0], found[1], found[2].roll(1))

    monkeypatch.setattr(shared_prefix, "_shared", wrong)
    model = tiny("llama")
    assert use_padding_free(model)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    check_same(model, tmp_path, rows=rows_that_begin_alike())


def test_the_experts_see_every_token_where_their_loss_is_asked_for(tmp_path: Path) -> None:
    model = tiny("mixtral")
    assert use_padding_free(model)
    seen = widths_in_layers(model)
    row = packed(rows_that_begin_alike())
    widths = []
    for asked in (True, False):
        with torch.no_grad():
            model(**row, use_cache=False, output_router_logits=asked)
        widths.append(seen.pop())
    assert widths == [row["input_ids"].shape[1], row["input_ids"].shape[1] - 7 * SHARED]
    check_same(tiny("mixtral"), tmp_path, rows=rows_that_begin_alike())

"""Weights in data files: of messages, rows, tokens and matches of a pattern, up to the loss in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast, TrainingArguments

from hf_temporal import TemporalWeighting, TemporalWeightTrainer
from hf_temporal.data.language_modeling import LanguageModelingArguments, encode_for_causal_lm
from tests.tiny_summarization import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Where is x1?"},
    {"role": "assistant", "content": "<think>\nx1 is near\n</think>\nIn file 1.", "weight": 0.5},
    {"role": "user", "content": "And x2?"},
    {"role": "assistant", "content": "In file 2.", "weight": 3},
    {"role": "user", "content": "And x3?"},
    {"role": "assistant", "content": "Guess.", "weight": 0},
    {"role": "user", "content": "And x4?"},
    {"role": "assistant", "content": "In file 4.", "weight": None},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = CHAT_TEMPLATE.replace(": '", ":\\n'")
    return made


def encode(tokenizer: PreTrainedTokenizerFast, batch: dict[str, list[Any]], **settings: Any) -> dict[str, list[Any]]:
    return encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(**settings))


def weighted(
    tokenizer: PreTrainedTokenizerFast, encoded: dict[str, list[Any]], row: int = 0
) -> list[tuple[str, float]]:
    """The runs of targets of one weight, as text."""
    runs: list[tuple[list[int], float]] = []
    before = None
    for label, weight in zip(encoded["labels"][row], encoded["loss_weights"][row], strict=True):
        if label == -100:
            assert weight == 0
        elif before == weight:
            runs[-1][0].append(label)
        else:
            runs.append(([label], weight))
        before = None if label == -100 else weight
    return [(str(tokenizer.decode(tokens)), weight) for tokens, weight in runs]


def test_a_message_weighs_its_answer_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    assert weighted(tokenizer, encode(tokenizer, {"messages": [CHAT]})) == [
        ("<think>\nx1 is near\n</think>\nIn file 1.<end>", 0.5),
        ("In file 2.<end>", 3.0),
        ("In file 4.<end>", 1.0),
    ]


def test_a_match_weighs_its_tokens_or_those_of_its_groups(tokenizer: PreTrainedTokenizerFast) -> None:
    patterns = [r"(?s)</think>\n(.*)=4", "near=0", r"file \d=10"]
    assert weighted(tokenizer, encode(tokenizer, {"messages": [CHAT]}, weight_pattern=patterns)) == [
        ("<think>\nx1 is ", 0.5),
        ("near", 0.0),
        ("\n</think>\n", 0.5),
        ("In", 2.0),
        (" file 1", 20.0),
        (".<end>", 2.0),
        ("In", 3.0),
        (" file 2", 30.0),
        (".<end>", 3.0),
        ("In", 1.0),
        (" file 4", 10.0),
        (".<end>", 1.0),
    ]
    batch = {"prompt": ["Where is x1?\n"], "completion": ["In file 1."]}
    assert weighted(tokenizer, encode(tokenizer, batch, weight_pattern=[r"file=3"])) == [
        ("In", 1.0),
        (" file", 3.0),
        (" 1.<end>", 1.0),
    ]
    texts = encode(tokenizer, {"text": ["In file 1."]}, weight_pattern=[r"file=3"], block_size=2)
    assert [run for row in range(len(texts["labels"])) for run in weighted(tokenizer, texts, row)] == [
        ("In", 1.0), (" file", 3.0), (" 1", 1.0), (".<end>", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("no weight", "weight_pattern='no weight'; accepted: REGEX=w"),
        ("a=-1", "weight_pattern='a=-1': the weight is '-1'; accepted: a number of at least 0"),
        ("a=nan", "the weight is 'nan'"),
        ("(=2", r"weight_pattern='\(=2': .*; accepted: REGEX=w"),
    ],
)
def test_patterns_that_are_none(given: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LanguageModelingArguments(weight_pattern=[given])


def test_a_number_weighs_all_of_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    batch: dict[str, list[Any]] = {"messages": [CHAT[:2], CHAT[2:4]], "loss_weights": [2, "0.25"]}
    encoded = encode(tokenizer, batch)
    assert weighted(tokenizer, encoded) == [("<think>\nx1 is near\n</think>\nIn file 1.<end>", 1.0)]
    assert weighted(tokenizer, encoded, 1) == [("In file 2.<end>", 0.75)]
    tokens: dict[str, list[Any]] = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "labels": [[-100, 6, 7], [8, 9]],
        "loss_weights": [[1, 2, 0.5], 3],
    }
    assert encode(tokenizer, tokens)["loss_weights"] == [[0.0, 2.0, 0.5], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ([1.0, None], "loss_weights of row 1 of the data is None; accepted: a number of at least 0"),
        ([1.0, -2.0], "loss_weights of row 1 of the data is -2.0"),
        ([1.0, math.nan], "loss_weights of row 1 of the data is nan"),
        ([1.0, True], "loss_weights of row 1 of the data is True"),
        ([1.0, [1.0]], "loss_weights of row 1 of the data has 1 values; accepted: 2, one for each of input_ids"),
        ([1.0, [1.0, -1.0]], "loss_weights of row 1 of the data, value 1 is -1.0"),
        ([1.0, [1.0, None]], "loss_weights of row 1 of the data, value 1 is None"),
    ],
)
def test_weights_of_rows_that_are_none(tokenizer: PreTrainedTokenizerFast, weights: list[Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        encode(tokenizer, {"input_ids": [[5, 6], [5, 6]], "loss_weights": weights})
    with pytest.raises(ValueError, match="loss_weights of row 1 of the data"):
        encode(tokenizer, {"text": ["a", "b"], "loss_weights": weights})


def test_cut_rows_keep_the_weights_of_what_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, {"messages": [CHAT]})
    size = len(whole["labels"][0]) - 3
    right = encode(tokenizer, {"messages": [CHAT]}, block_size=size)
    assert {name: rows[0] for name, rows in right.items()} == {name: rows[0][:size] for name, rows in whole.items()}
    tokenizer.truncation_side = "left"
    start = next(place for place, label in enumerate(whole["labels"][0]) if label != -100)
    size = len(whole["labels"][0]) - start - 3  # the first answer has lost its first tokens
    left = encode(tokenizer, {"messages": [CHAT]}, block_size=size)
    assert left["input_ids"][0] == whole["input_ids"][0][-size:]
    assert weighted(tokenizer, left) == [("In file 2.<end>", 3.0), ("In file 4.<end>", 1.0)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalization", ["sequence", "batch", "tokens"])
@pytest.mark.parametrize("origin", ["target", "turn", "sequence"])
def test_the_loss_is_that_of_the_file_in_float64(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Any, origin: str, normalization: str, *, packed: bool
) -> None:
    """Values and gradients of Σ wℓ / D, where w is t^p, rescaled under "sequence", times the file's weight."""
    messages = [CHAT, CHAT[:2], CHAT[2:4]]
    encoded = encode(tokenizer, {"messages": messages}, weight_pattern=["file=2.5"], block_size=70)
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    model = tiny_llama(len(tokenizer))
    collator = DataCollatorWithFlattening() if packed else DataCollatorForSeq2Seq(tokenizer)
    if packed:
        for row in rows:
            del row["attention_mask"]
    args = TrainingArguments(tmp_path, per_device_train_batch_size=3, report_to="none", use_cpu=True)
    weighting = TemporalWeighting(power=2.0, origin=origin, normalization=normalization)
    trainer = TemporalWeightTrainer(model, args, train_dataset=rows, data_collator=collator, weighting=weighting)
    batches = iter(trainer.get_train_dataloader())
    samples, count = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    model.train()
    loss: Any = trainer.compute_loss(model, samples[0], num_items_in_batch=count)
    loss.backward()
    found = {name: each.grad.double() for name, each in model.named_parameters() if each.grad is not None}

    exact = tiny_llama(len(tokenizer)).double()
    total, divisor = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = exact(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        times, t, run = [], 0, 0
        for place, label in enumerate(row["labels"]):
            run = run + 1 if label != -100 else 0
            t += label != -100
            times.append({"target": t, "turn": run, "sequence": place + 1}[origin] if label != -100 else 0)
        w = torch.tensor(times, dtype=torch.float64) ** 2
        if normalization == "sequence":
            w = w * (w > 0).sum() / w.sum()
        divisor += float((w > 0).sum()) if normalization == "tokens" else 0.0
        w = w * torch.tensor(row["loss_weights"], dtype=torch.float64)
        divisor += 0.0 if normalization == "tokens" else float(w.sum())
        labels = torch.tensor(row["labels"])
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")
        total = total + (w[1:] * losses).sum()
    (total / divisor).backward()
    torch.testing.assert_close(loss.double(), total.detach() / divisor, rtol=1e-5, atol=1e-6)
    for name, each in exact.named_parameters():
        assert each.grad is not None
        largest = float(each.grad.abs().max())
        torch.testing.assert_close(found[name], each.grad, rtol=0, atol=3e-5 * largest)

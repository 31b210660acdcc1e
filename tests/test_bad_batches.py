"""Batches that a trainer is given, right and wrong: its loss is that by hand, or the error names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_temporal import (
    TemporalTrainingArguments,
    TemporalWeightTrainer,
)
from tests.test_bad_input import CASES, NORMALIZATIONS, ORIGINS, with_value
from tests.tiny_models import IGNORE, PAD, VOCABULARY, Example, PadCollator, causal_examples, tiny_model
from tests.tiny_training import reference

# ---- a trainer's loss


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TemporalWeightTrainer]:
    args = TemporalTrainingArguments(str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to="none")
    return {name: TemporalWeightTrainer(tiny_model(name).train(), args) for name in ("llama", "t5")}


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[Example], dict[str, Any], dict[str, Any]]:
    """A model, documents, the batch that they make, and the fields of the weighting."""
    layout = draw(st.sampled_from(["right", "left", "position_ids", "document_ids", "seq_idx", "cu_seq_lens_q", "t5"]))
    name = "t5" if layout == "t5" else "llama"
    tokens = st.integers(3, VOCABULARY - 1)
    rows: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        row: Any = {"input_ids": draw(st.lists(tokens, min_size=2, max_size=6))}
        length = draw(st.integers(1, 5)) if name == "t5" else len(row["input_ids"])
        each = tokens | st.just(IGNORE)
        row["labels"] = draw(st.lists(each, min_size=length, max_size=length))
        if name == "t5":
            row["labels"][0] = draw(tokens)  # a decoder that starts with padding is taken to be padded on the left
        rows.append(row)
    if draw(st.booleans()):
        for row in rows:
            each = st.sampled_from([0.0, 0.5, 1.0, 3.0])
            row["loss_weights"] = draw(st.lists(each, min_size=len(row["labels"]), max_size=len(row["labels"])))
    batch: dict[str, Any]
    if layout in ("right", "left"):
        batch = dict(PadCollator(layout, extra=draw(st.integers(0, 2)))(rows))
    elif layout == "t5":
        columns = {
            key: [{"input_ids": row[key], "labels": row[key]} for row in rows] for key in ("input_ids", "labels")
        }
        batch = {key: PadCollator()(columns[key])[key] for key in columns}
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        if "loss_weights" in rows[0]:
            padded = [(row["loss_weights"] + [0.0] * 5)[:5] for row in rows]
            batch["loss_weights"] = torch.tensor(padded)[:, : batch["labels"].shape[1]]
    else:
        lengths = [len(row["labels"]) for row in rows]
        batch = {key: torch.tensor([[value for row in rows for value in row[key]]]) for key in rows[0]}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None]
        if layout in ("document_ids", "seq_idx"):
            batch[layout] = ids
        elif layout == "cu_seq_lens_q":
            batch[layout] = torch.tensor([0, *lengths]).cumsum(0).int()
    batch["labels"] = batch["labels"].to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
    fields = {
        "power": draw(st.sampled_from([0.0, 1.0, -1.0, 2.5, 40.0, math.inf])),
        "origin": draw(st.sampled_from(ORIGINS)),
        "normalization": draw(st.sampled_from(NORMALIZATIONS)),
    }
    return name, rows, batch, fields


def compute(
    trainer: TemporalWeightTrainer, batch: dict[str, Any], fields: dict[str, Any], fused: str = "auto"
) -> Tensor:
    args: Any = trainer.args
    for key, value in fields.items():
        setattr(args, f"temporal_{key}", value)
    args.temporal_fused_head = fused
    loss: Any = trainer.compute_loss(trainer.model, dict(batch))  # type: ignore[arg-type]
    return loss


@settings(max_examples=max(CASES // 2, 1))
@given(given_batch=batches(), fused=st.sampled_from(["on", "off"]))
def test_a_trainers_loss_is_that_by_hand(
    trainers: dict[str, TemporalWeightTrainer], given_batch: Any, fused: str
) -> None:
    name, rows, batch, fields = given_batch
    if fields["normalization"] == "tokens" and fields["power"] == math.inf:
        with pytest.raises(ValueError, match=r"power=inf leaves float32 .*; accepted: "):
            compute(trainers[name], batch, fields, fused)
        return
    loss = compute(trainers[name], batch, fields, fused)
    assert loss.item() == pytest.approx(reference(trainers[name].model, rows, **fields).loss, rel=2e-5, abs=1e-6)


BAD_BATCHES: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Any]]]] = {
    "a label too large": ("labels", lambda batch: {"labels": with_value(batch["labels"], None, VOCABULARY)}),
    "labels without a sign": ("labels", lambda batch: {"labels": batch["labels"].to(torch.uint8)}),
    "labels in a list": ("labels", lambda batch: {"labels": batch["labels"].tolist()}),
    "labels of three dimensions": ("labels", lambda batch: {"labels": batch["labels"][..., None]}),
    "fewer labels than tokens": ("labels", lambda batch: {"labels": batch["labels"][:, 1:], "attention_mask": None}),
    "weights of another shape": ("loss_weights", lambda _: {"loss_weights": torch.ones(3, 2)}),
    "a negative weight": ("loss_weights", lambda batch: {"loss_weights": -1.0 * batch["attention_mask"]}),
    "a weight of NaN": ("loss_weights", lambda batch: {"loss_weights": batch["attention_mask"] / 0 * 0}),
    "a mask of another shape": ("attention_mask", lambda batch: {"attention_mask": batch["attention_mask"][:, 1:]}),
    "a mask of four dimensions": (
        "attention_mask",
        lambda batch: {"attention_mask": batch["attention_mask"][:, None, None]},
    ),
    "documents under a mask": (
        "attention_mask",
        lambda batch: {"document_ids": torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])},
    ),
    "positions of another shape": ("position_ids", lambda _: {"position_ids": torch.arange(2)[None]}),
    "positions of floats": ("position_ids", lambda batch: {"position_ids": batch["labels"] / 2}),
    "ids in a list": ("document_ids", lambda batch: {"document_ids": batch["labels"].tolist()}),
    "bounds that fall": ("cu_seq_lens_q", lambda _: {"cu_seq_lens_q": torch.tensor([0, 5, 3])}),
    "bounds beyond the end": ("cu_seq_lens_q", lambda _: {"cu_seq_lens_q": torch.tensor([0, 999])}),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_what_is_wrong_with_a_batch_is_named(trainers: dict[str, TemporalWeightTrainer], name: str) -> None:
    argument, change = BAD_BATCHES[name]
    batch: dict[str, Any] = dict(PadCollator()(causal_examples(3)))
    fields = {"power": 1.0, "origin": "target", "normalization": "sequence"}
    compute(trainers["llama"], batch, fields)
    with pytest.raises((ValueError, TypeError)) as raised:
        compute(trainers["llama"], {**batch, **change(batch)}, fields)
    assert argument in str(raised.value)
    assert "accepted" in str(raised.value).lower()

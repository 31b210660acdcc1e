from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_temporal.collator import Timeline, TimelineCollator

CAUSAL = Timeline(
    origin="target",
    shifts_labels=True,
    encoder_decoder=False,
    takes_position_ids=True,
    takes_packed_rows=True,
    ranks_per_row=1,
    vocabulary=50,
    pad_token_id=0,
)
SEQ2SEQ = Timeline(
    origin="target",
    shifts_labels=False,
    encoder_decoder=True,
    takes_position_ids=False,
    takes_packed_rows=True,
    ranks_per_row=1,
    vocabulary=50,
    pad_token_id=0,
)


def tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, 50)}}
    model = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", padding_side=padding_side)


FEATURES = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7], "loss_weights": [9.0, 0.5, 2.0]},
    {"input_ids": [8, 9], "attention_mask": [1, 1], "labels": [8, 9], "loss_weights": [9.0, 3.0]},
]


@pytest.mark.parametrize(
    ("collator", "positions", "weights"),
    [
        (DataCollatorForSeq2Seq(tokenizer("right")), [[0, 1, 2], [0, 1, 0]], [[9, 0.5, 2], [9, 3, 0]]),
        (DataCollatorForSeq2Seq(tokenizer("left")), [[0, 1, 2], [0, 0, 1]], [[9, 0.5, 2], [0, 9, 3]]),
        (
            DataCollatorForLanguageModeling(tokenizer("right"), mlm=False),
            [[0, 1, 2], [0, 1, 0]],
            [[9, 0.5, 2], [9, 3, 0]],
        ),
        (DataCollatorWithFlattening(), [[0, 1, 2, 0, 1]], [[9, 0.5, 2, 9, 3]]),
    ],
)
def test_loss_weights_travel_beside_the_labels(
    collator: Callable[[Any], Any], positions: list[list[int]], weights: list[list[float]]
) -> None:
    features = FEATURES
    if isinstance(collator, DataCollatorForLanguageModeling):
        features = [{key: value for key, value in row.items() if key != "labels"} for row in FEATURES]
    elif isinstance(collator, DataCollatorWithFlattening):
        features = [{key: value for key, value in row.items() if key != "attention_mask"} for row in FEATURES]
    batch = TimelineCollator(collator, CAUSAL)(features)
    assert batch["temporal_positions"].tolist() == positions
    assert batch["loss_weights"].tolist() == weights
    assert batch["labels"].shape == batch["loss_weights"].shape


def test_default_collator_keeps_the_column() -> None:
    batch = TimelineCollator(default_data_collator, CAUSAL)([FEATURES[0], FEATURES[0]])
    assert batch["loss_weights"].tolist() == [[9, 0.5, 2]] * 2


def test_a_collator_that_drops_the_column_is_told() -> None:
    def forgetful(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([row["labels"] for row in features])}

    with pytest.raises(
        ValueError, match="forgetful dropped the column loss_weights; accepted: a collator that returns"
    ):
        TimelineCollator(forgetful, CAUSAL)([FEATURES[0]])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "loss_weights of row 0 of the batch has 2 values; accepted: 3, one per label"),
        ([1.0, -2.0, 0.0], "loss_weights holds -2.0; accepted: finite numbers ≥ 0"),
        ([1.0, float("nan"), 0.0], "loss_weights holds nan"),
    ],
)
def test_bad_loss_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimelineCollator(DataCollatorForSeq2Seq(tokenizer("right")), CAUSAL)(
            [{**FEATURES[0], "loss_weights": weights}]
        )


def test_loss_weights_of_another_shape() -> None:
    batch = {"labels": torch.tensor([[1, 2]]), "loss_weights": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=r"loss_weights has shape \(1, 3\); accepted: \(1, 2\)"):
        CAUSAL.add(batch)


def test_the_first_real_token_is_no_target_of_a_causal_model() -> None:
    labels = torch.tensor([[-100, -100, 4, 5, 6], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = CAUSAL.add({"labels": labels, "attention_mask": mask})
    assert batch["temporal_positions"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["labels"] is labels


def test_no_position_ids_without_left_padding() -> None:
    batch = CAUSAL.add({"labels": torch.tensor([[3, 4, -100]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    assert "position_ids" not in batch


def test_packed_rows() -> None:
    batch = CAUSAL.add({"labels": torch.tensor([[3, 4, 5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])})
    assert batch["temporal_positions"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch["temporal_document_ids"].tolist() == [[0, 0, 1, 1, 1]]


def test_packed_rows_with_a_mask_would_attend_across_documents() -> None:
    batch = {
        "labels": torch.tensor([[3, 4, 5]]),
        "position_ids": torch.tensor([[0, 1, 0]]),
        "attention_mask": torch.ones(1, 3),
    }
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 3\) with several documents in a row"):
        CAUSAL.add(batch)


def test_document_ids_column_of_another_meaning_is_left_out() -> None:
    rows = [{**row, "document_ids": "report-17"} for row in FEATURES]
    batch = TimelineCollator(DataCollatorForSeq2Seq(tokenizer("right")), CAUSAL)(rows)
    assert "document_ids" not in batch


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.tensor([[-100, 4]])}, "labels padded on the left"),
        (
            {"labels": torch.tensor([[-100, 4]]), "decoder_input_ids": torch.tensor([[0, 0]])},
            "labels padded on the left",
        ),
        (
            {"labels": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[0, 1]])},
            "attention_mask padded on the left",
        ),
        ({"labels": torch.tensor([[3, 4]]), "seq_idx": torch.tensor([[0, 1]])}, "seq_idx: packed rows"),
    ],
)
def test_encoder_decoder_rows_are_padded_on_the_right(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SEQ2SEQ.add(batch)


def test_a_masked_decoder_prompt_is_no_padding() -> None:
    batch = SEQ2SEQ.add({"labels": torch.tensor([[-100, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 9, 4]])})
    assert batch["temporal_positions"].tolist() == [[0, 1, 2]]


def test_labels_out_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="labels hold 50; accepted: token ids from 0 to 49"):
        CAUSAL.add({"labels": torch.tensor([[1, 50]])})


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 0]), torch.tensor([0.5, 1.0])])
def test_labels_without_time_pass_through(labels: torch.Tensor | None) -> None:
    assert "temporal_positions" not in CAUSAL.add({"labels": labels})


SPLIT = dataclasses.replace(CAUSAL, ranks_per_row=2)


def test_rows_split_between_ranks_have_the_times_of_whole_rows() -> None:
    batch = {"labels": torch.tensor([[-100, 5, 6, 7], [4, 5, -100, -100]])}
    assert torch.equal(SPLIT.add(batch)["temporal_positions"], torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]))


@pytest.mark.parametrize(
    ("timeline", "batch", "message"),
    [
        (SPLIT, {"document_ids": torch.tensor([[0, 0, 1, 1]])}, "several documents in a row, on rows split between 2"),
        (SPLIT, {"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "attention_mask padded on the left, on rows split"),
        (SPLIT, {"labels": torch.tensor([[3, 4, 5, 6, 7]])}, "labels of length 5, .*; accepted: multiples of 4"),
        (dataclasses.replace(SEQ2SEQ, ranks_per_row=2), {}, "an encoder-decoder model, .*, on rows split between 2"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(timeline: Timeline, batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timeline.add({"labels": torch.tensor([[3, 4, 5, 6]]), **batch})


def test_lists_the_targets_that_weigh_anything() -> None:
    timeline = dataclasses.replace(CAUSAL, lists_targets=True)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]] * 2), "labels": torch.tensor([[5, 6, -100, 8], [-100, 6, 7, 8]])}
    assert timeline.add(batch)["temporal_targets"].tolist() == [1, 3, 5, 6, 7]
    batch["loss_weights"] = torch.tensor([[1.0, 0.5, 1.0, 2.0], [1.0, 0.0, 0.1, 1.0]])
    assert timeline.add(batch)["temporal_targets"].tolist() == [1, 3, 6, 7]
    assert "temporal_targets" not in CAUSAL.add(batch)

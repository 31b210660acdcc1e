"""Batches of rows that need no padding, and the interval of a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from hf_temporal.data.copying import DigitCopies, digit_tokenizer
from hf_temporal.data.copying.arguments import CopyingArguments
from hf_temporal.data.rows import RESAMPLES, RowCollator, bootstrap_interval


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    how: dict[str, Any] = {"split": "train", "seed": 0, "is_encoder_decoder": False, "size": count}
    return [{**row, **more} for row in DigitCopies(CopyingArguments(copy_length=3, blank_length=5), **how)]


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError


def test_rows_of_one_length_are_only_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = digit_tokenizer()
    usual = DataCollatorForSeq2Seq(tokenizer)(rows(4))
    monkeypatch.setattr(DataCollatorForSeq2Seq, "__call__", refuse)
    batch = RowCollator(tokenizer)(rows(4))
    assert batch.keys() == usual.keys()
    for name, tensor in usual.items():
        assert tensor.dtype == batch[name].dtype
        assert torch.equal(tensor, batch[name])


class MakesDecoderInputs:
    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels + 1


@pytest.mark.parametrize("why", ["lengths", "columns", "tensors", "multiple", "longest", "decoder", "numpy"])
def test_all_others_are_left_to_transformers(why: str) -> None:
    given = rows(4)
    how: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    if why == "lengths":
        given[1] = {name: values[:-2] for name, values in given[1].items()}
    elif why == "columns":
        given = rows(4, token_type_ids=[0] * len(given[0]["input_ids"]))
    elif why == "tensors":
        given = [{name: torch.tensor(values) for name, values in row.items()} for row in given]
    elif why == "decoder":
        how["model"] = MakesDecoderInputs()
    elif why == "numpy":
        asked["return_tensors"] = "np"
    else:
        how |= {"pad_to_multiple_of": 16} if why == "multiple" else {"padding": "max_length", "max_length": 20}
    collators = (kind(digit_tokenizer(), **how) for kind in (RowCollator, DataCollatorForSeq2Seq))
    batch, usual = (collator([dict(row) for row in given], **asked) for collator in collators)
    assert batch.keys() == usual.keys()
    for name, values in usual.items():
        assert type(batch[name]) is type(values)
        assert batch[name].tolist() == values.tolist()


@pytest.mark.parametrize("shape", [(1,), (7,), (128,), (1500,), (40, 3)])
def test_the_interval_is_that_of_resamples_one_by_one(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).random(shape)
    resamples = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.array([values[resample].mean(axis=0) for resample in resamples])
    assert np.array_equal(bootstrap_interval(values), np.percentile(means, [2.5, 97.5], axis=0))

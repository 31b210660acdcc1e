"""Copying digits: the examples are those of the literature, and the same every time."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hf_temporal.data import HELD_OUT_SEED
from hf_temporal.data.copying import CopyingArguments, DigitCopies, digit_tokenizer
from hf_temporal.data.copying.digits import END, PAD
from tests.data.copies import digits
from tests.tiny_summarization import tiny_llama


def test_digits_stand_as_in_the_literature() -> None:
    for example in digits(is_encoder_decoder=True):
        d1, d2, d3 = copied = example["input_ids"][:3]
        assert set(copied) <= set(range(1, 9))
        assert example["input_ids"] == [d1, d2, d3, 0, 0, 0, 9, 9, 9, 9]
        assert example["labels"] == [0, 0, 0, 0, 0, 0, 0, d1, d2, d3]
        assert example["attention_mask"] == [1] * 10


def test_digits_for_one_sequence_are_the_same_a_place_later() -> None:
    for one, two in zip(digits(), digits(is_encoder_decoder=True), strict=True):
        assert one["input_ids"] == [*two["input_ids"], END]
        assert one["labels"] == [-100, *two["labels"]]
        assert one["attention_mask"] == [1] * 11


@given(L=st.integers(1, 9), T=st.integers(1, 30), seed=st.integers(0, 2**32 - 1), one=st.booleans())
def test_lengths_are_those_of_the_task(L: int, T: int, seed: int, one: bool) -> None:
    arguments = CopyingArguments(copy_length=L, blank_length=T)
    example = digits(arguments, seed=seed, is_encoder_decoder=not one)[0]
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"]) == T + 2 * L + one
    targets = [label for label in example["labels"] if label != -100]
    assert len(targets) == len(DigitCopies.scored(arguments)) == T + 2 * L
    assert targets == [0] * (T + L) + example["input_ids"][:L]
    assert example["input_ids"].count(9) == L + 1


def test_every_digit_is_drawn_about_equally_often() -> None:
    copied = [digit for example in digits(size=2000) for digit in example["input_ids"][:3]]
    assert np.allclose(np.bincount(copied, minlength=9)[1:] / 6000, 1 / 8, atol=0.02)


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    first = [*digits()]
    assert [digits()[index] for index in (4, 3, 2, 1, 0)] == first[::-1]
    assert [*digits(size=3)] == first[:3]
    assert [*pickle.loads(pickle.dumps(digits()))] == first
    loader = DataLoader(digits(), batch_size=None, num_workers=2)
    assert [*loader] == first
    assert [example["input_ids"] for example in digits(seed=8)] != [example["input_ids"] for example in first]
    assert len({tuple(example["input_ids"]) for example in digits(size=50)}) > 40


def test_held_out_examples_are_the_same_for_every_seed_and_of_their_own() -> None:
    long = CopyingArguments(copy_length=10, blank_length=4)
    splits = {split: [*digits(long, split=split, seed=HELD_OUT_SEED)] for split in ("train", "validation", "test")}
    for split in ("validation", "test"):
        assert [*digits(long, split=split, seed=1)] == splits[split]
    assert [*digits(long, seed=1)] != splits["train"]
    assert len({tuple(example["input_ids"]) for examples in splits.values() for example in examples}) == 15


def test_an_index_behind_the_end_is_refused_so_that_a_loop_ends() -> None:
    assert len([*digits()]) == len(digits()) == 5
    assert digits()[-1] == digits()[4]
    with pytest.raises(IndexError):
        digits()[5]


def test_digits_are_their_own_tokens_after_saving_too(tmp_path: Path) -> None:
    digit_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (digit_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("0123456789").input_ids == [*range(10)]
        assert tokenizer.decode([3, 0, 9]) == "309"
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (PAD, END, 12)
        assert tokenizer("12</s>").input_ids == [1, 2, END]


def test_a_causal_models_loss_compares_the_logits_at_i_with_y_at_i() -> None:
    causal, y = digits(), torch.tensor([example["labels"] for example in digits(is_encoder_decoder=True)])
    model = tiny_llama(12).eval()
    batch = DataCollatorForSeq2Seq(digit_tokenizer())([*causal])
    with torch.no_grad():
        outputs = model(**batch)
    by_hand = F.cross_entropy(outputs.logits[:, : y.shape[1]].flatten(0, 1), y.flatten())
    torch.testing.assert_close(outputs.loss, by_hand)


def test_what_fills_the_last_place_changes_no_answer() -> None:
    model = tiny_llama(12).eval()
    batch = torch.tensor([example["input_ids"] for example in digits()])
    with torch.no_grad():
        logits = [model(input_ids=batch.index_fill(1, torch.tensor([10]), token)).logits[:, :10] for token in (END, 3)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copying_form": "words"}, "copying_form='words'; accepted: 'digits', 'text'"),
        ({"copy_length": 0}, "copy_length=0; accepted: a whole number of at least 1"),
        ({"blank_length": -3}, "blank_length=-3; accepted: a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyingArguments(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"split": "dev"}, "split='dev'; accepted: 'train', 'validation', 'test'"), ({"size": 0}, "size=0")],
)
def test_bad_splits_and_sizes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**given)

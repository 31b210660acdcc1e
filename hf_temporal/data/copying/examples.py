"""What all forms of the copying task share: how an example is made for a model, and what of its answer is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_temporal.data.drawn import DrawnDataset
from hf_temporal.data.rows import Row
from hf_temporal.positions import IGNORE_INDEX

from .arguments import CopyingArguments


@dataclass(eq=False)
class CopyingDataset(DrawnDataset[dict[str, list[int]]]):
    """Examples of one form, of two sequences for an encoder–decoder, else of one."""

    title: ClassVar[str]  # what a model card calls the data, with the names of settings in braces
    verb: ClassVar[str] = "copy"  # what a model learns to do
    generates: ClassVar[bool] = False  # the answer to a prompt; else a decoder-only model's are read off its places
    from_texts: ClassVar[bool] = False  # it is made with a data set's texts
    for_encoder_decoder: ClassVar[bool] = True
    rest: ClassVar[str] = ""  # the metric of the target tokens that are not scored as the answer; empty: none

    arguments: CopyingArguments
    is_encoder_decoder: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_encoder_decoder and not self.for_encoder_decoder:
            form = self.arguments.copying_form
            raise ValueError(f"copying_form={form!r} for an encoder–decoder; accepted: a decoder-only model.")

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        """For each target token but special ones, whether it is scored as part of the answer."""
        raise NotImplementedError

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:
        """The recall that is expected of an answer drawn uniformly from those that the form has."""
        raise NotImplementedError

    @staticmethod
    def tokenizer_of(arguments: CopyingArguments) -> PreTrainedTokenizerBase | None:  # noqa: ARG004
        """The form's own tokenizer; None: the model's."""
        return None

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        input_ids, labels, _ = self._example(self._generator(index))
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    def _example(self, rng: np.random.Generator) -> Row:
        raise NotImplementedError

    def _answered_in_place(self, x: Sequence[int], y: Sequence[int], end: int) -> Row:
        """The row in which y[i] is the answer at x[i], −100 where there is none.

        - Encoder–decoder: input_ids = x, labels = the answers in y alone, and no end token.
        - Decoder-only: the model's own loss compares the logits at i with labels[i+1], so labels = −100, y[0], y[1],
          …, and input_ids = x and an end token, which only fills the last place: no answer depends on it, and its own
          is not scored.
        """
        if self.is_encoder_decoder:
            return Row([*x], [label for label in y if label != IGNORE_INDEX])
        return Row([*x, end], [IGNORE_INDEX, *y])

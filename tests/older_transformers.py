"""Teaches older transformers what the tests take for granted; from 5.16 on nothing is changed.

Only the stock trainer is touched, so that what ours is compared with is the same on every release:

- before 5.2 there is no `train_sampling_strategy`, and so no training in the order of the data set;
- before 5.10 the first label of a row counts as a target of a causal model, which it is not, so the loss is too low;
- before 5.16 label smoothing divides by the targets of the micro-batch, not of the accumulated batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother


def teach() -> None:
    """Once in a process."""
    if hasattr(Trainer, "_taught"):
        return
    Trainer._taught = True  # type: ignore[attr-defined]
    if "train_sampling_strategy" not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        _teach_sampling()
    if "num_items_in_batch" not in inspect.signature(LabelSmoother.__call__).parameters:
        _teach_smoothing()
        _teach_counting()


def _teach_sampling() -> None:
    TrainingArguments.__annotations__["train_sampling_strategy"] = "str"
    TrainingArguments.train_sampling_strategy = "random"
    _make_again(TrainingArguments)
    stock, post_init = Trainer._get_train_sampler, TrainingArguments.__post_init__

    def sampler(self: Any, train_dataset: Any = None) -> Sampler[int] | None:
        found = stock(self, train_dataset)
        if found is None or self.args.train_sampling_strategy != "sequential":
            return found
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def group(self: Any) -> None:
        self.group_by_length = self.train_sampling_strategy == "group_by_length"
        post_init(self)

    Trainer._get_train_sampler = sampler  # type: ignore[method-assign]
    TrainingArguments.__post_init__ = group  # type: ignore[method-assign]


def _make_again(arguments: Any) -> None:
    """A dataclass and those that inherit from it, with the fields that it has by now."""
    own = vars(arguments).get("__annotations__", {})
    for field in dataclasses.fields(arguments):
        if field.name in own:
            setattr(arguments, field.name, field)
    if "__init__" in vars(arguments):
        del arguments.__init__  # which dataclass would keep
    dataclasses.dataclass(arguments)
    for heir in arguments.__subclasses__():
        _make_again(heir)


def _teach_counting() -> None:
    from hf_temporal._peft import base_model  # whose arguments are made from those that are taught
    from hf_temporal._transformers import shifts_by_class

    stock = Trainer._get_num_items_in_batch

    def count(self: Any, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if shifts_by_class(base_model(self.model)):
            batch_samples = [
                {**batch, "labels": batch["labels"][..., 1:]}
                if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)
                else batch
                for batch in batch_samples
            ]
        return stock(self, batch_samples, device)

    Trainer._get_num_items_in_batch = count  # type: ignore[method-assign]


def _teach_smoothing() -> None:
    stock, compute_loss = LabelSmoother.__call__, Trainer.compute_loss
    items: list[Any] = []

    def smooth(
        self: LabelSmoother,
        model_output: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        given = num_items_in_batch if num_items_in_batch is not None or not items else items[-1]
        targets = (labels[..., 1:] if shift_labels else labels).ne(self.ignore_index).sum()
        loss = stock(self, model_output, labels, shift_labels)
        return loss if given is None else loss * targets / given

    def compute(self: Trainer, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        items.append(kwargs.get("num_items_in_batch"))
        try:
            return compute_loss(self, model, inputs, return_outputs, **kwargs)
        finally:
            items.pop()

    LabelSmoother.__call__ = smooth  # type: ignore[method-assign]
    Trainer.compute_loss = compute  # type: ignore[method-assign, assignment]

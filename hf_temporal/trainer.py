"""Position-weighted losses for `Trainer`, `Seq2SeqTrainer` and any subclass of theirs."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from hf_temporal.hub.push import HubMixin
from hf_temporal.model.model_loss import missing_decoder_inputs
from hf_temporal.model.weighted_loss import Share, WeightedForward, chosen_fused_head

from . import _trl
from ._transformers import attribute, divides_by_accumulation_steps, split_between_ranks
from .collator import LOSS_WEIGHTS, OWN_KEYS, POSITIONS, TIMES, Batch, has_time, without
from .evaluation_hooks import EvaluationByPosition
from .positions import IGNORE_INDEX, shift_left
from .step_weights import WeightedStep, weigh_batches
from .training_args import TemporalFields
from .unsupported import LossCheck, check_arguments, check_engine, check_is_trainer, check_loss_func, check_order
from .weighting import TemporalWeighting


class TemporalWeightMixin(EvaluationByPosition):
    """Put in front of a `Trainer` subclass, weights each target token's loss by t^p.

    It changes one thing: inside the trainer's own `compute_loss`, in training, a call of the model with `labels`
    returns Σ_i w_i ℓ_i / D as the model's loss in place of its mean, with w from `TemporalWeighting` and D over the
    accumulated batch of all ranks. What the trainer adds to that loss, measures or logs stays. Where its code does not
    pass `num_items_in_batch` on to the model, D is that of the micro-batch, as the model's mean would be. With p = 0 a
    trainer that has a `compute_loss`, `training_step` or batches of its own is left as it is.

    Args:
        weighting: overrides the `temporal_*` fields of the arguments (`TemporalTrainingArguments`); where there are
            neither, `TemporalWeighting()` is used. Everything else is passed on.

    Logged beside what the trainer logs: `temporal_power`, the p in force, and `effective_sample_size`,
    (Σw)²/Σw² as a share of the target tokens. Evaluation adds `eval_temporal_loss`, `eval_first_token_loss`,
    `eval_head_loss`, `eval_tail_loss`, `eval_last_token_loss` and the file `loss_by_position.json` in `output_dir`.

    Raises:
        TypeError: the mixin stands behind its trainer or in front of none, or a method has the name of one of its own.
        ValueError: `nn.DataParallel`, a fused Liger cross-entropy, DeepSpeed's sequence parallelism; with p ≠ 0,
            `compute_loss_func`, labels without a time dimension, a model whose own loss is not the cross-entropy of
            its logits or, at the first step, a trainer whose loss does not come from the model's own.

    Source: Wang & Yan, arXiv 2307.11462.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, TemporalWeightMixin)

    def __init__(self, *args: Any, weighting: TemporalWeighting | None = None, **kwargs: Any) -> None:
        check_is_trainer(self, TemporalWeightMixin)
        if weighting is not None and not isinstance(weighting, TemporalWeighting):
            raise TypeError(f"weighting={weighting!r} is a {type(weighting).__name__}; accepted: a TemporalWeighting.")
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        check_arguments(given)
        _trl.check_sft_arguments(type(self), given, LOSS_WEIGHTS)
        self._temporal_given_weighting = weighting
        self._temporal_step: WeightedStep | None = None
        self._temporal_sample_sizes: list[Tensor] = []
        self._temporal_is_collecting = False
        self._temporal_is_weighted = False
        super().__init__(*args, **kwargs)
        check_engine(self)
        if not self._is_trivial({}):
            self._check_own_loss()
        self.add_callback(LossCheck(self._check_weighted))
        if isinstance(self.args, TemporalFields):
            self.args.validate_schedule(self.weighting.power)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        searched = [name for name in getattr(trial, "params", trial) or () if name.startswith("temporal_")]
        if isinstance(self.args, TemporalFields):
            self.args.validate_temporal_fields()
        if searched and self._temporal_given_weighting is not None:
            raise ValueError(
                f"{searched[0]} is searched beside an explicit weighting={self._temporal_given_weighting!r}, which "
                "overrides it; accepted: one of the two."
            )

    def _check_own_loss(self) -> None:
        """Look for losses that are not the model's own: each may be set at any time."""
        check_loss_func(self)
        _trl.check_loss_type(self)

    def get_train_dataloader(self) -> Any:
        self._temporal_sample_sizes.clear()  # of a run that was cut short, as by a batch size that did not fit
        return super().get_train_dataloader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and D in place of the number of items."""
        self._temporal_step, self._temporal_is_collecting = None, True
        collected: list[tuple[Tensor, int]] = []
        try:
            batches, num_items_in_batch = super().get_batch_samples(
                _recorded(epoch_iterator, collected), num_batches, device
            )
        finally:
            self._temporal_is_collecting = False
        if not batches or self._is_left_alone(batches[0]):
            return [without(batch, OWN_KEYS) for batch in batches], num_items_in_batch
        if problem := self._problem_with(batches[0]):
            self._check_power_is_0(batches[0], problem)
            return [without(batch, OWN_KEYS) for batch in batches], num_items_in_batch
        self._check_own_loss()
        batches = [batch if _is_unchanged(batch, collected) else without(batch, TIMES) for batch in batches]
        step = self._temporal_step = self._weigh(batches, device)
        self._temporal_sample_sizes.append(step.effective_sample_size)
        if not self._has_own("_get_num_items_in_batch"):
            return step.batches, step.denominator
        if self.weighting.normalization != "sequence" or LOSS_WEIGHTS in batches[0]:
            raise ValueError(
                f"{type(self).__name__} counts the items of a batch itself (_get_num_items_in_batch), beside "
                f"normalization={self.weighting.normalization!r} or {LOSS_WEIGHTS}, which need a D of their own. "
                "Accepted: normalization='sequence' without it, or the trainer's own count."
            )
        return step.batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """The trainer's own count; left out, with its gathering over all ranks, where D takes its place."""
        is_needed = (
            not self._temporal_is_collecting
            or not batch_samples
            or self._has_own("_get_num_items_in_batch")
            or self._is_left_alone(batch_samples[0])
            or self._problem_with(batch_samples[0])
        )
        return super()._get_num_items_in_batch(batch_samples, device) if is_needed else None

    def _weigh(self, batches: list[Any], device: torch.device) -> WeightedStep:
        """The optimizer step that these batches make, with its weights."""
        across_ranks = self.args.average_tokens_across_devices and self.args.world_size > 1
        step = weigh_batches(
            [dict(batch) if POSITIONS in batch else self._new_timeline().add(batch) for batch in batches],
            self.weighting.at(self.temporal_power),
            gather=self.accelerator.gather if across_ranks else None,
            device=device,
        )
        return dataclasses.replace(step, denominator=step.denominator / (self.get_tp_size() * self.get_cp_size()))

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Batch) -> tuple[Any, Batch]:
        """The trainer's own, which splits rows between ranks, with the weights split as the labels are.

        Where the model shifts its labels they have to be shifted before that, and the weights with them.
        """
        found = None
        if self._temporal_step is not None and self.get_cp_size() > 1:
            found = self._temporal_step.find(inputs["labels"])
        if found is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        if self._read_model_loss().shifts_labels and not found.labels.is_floating_point():
            found.weights = shift_left(found.weights, 0.0)
            inputs = {**inputs, "shift_labels": shift_left(found.labels, IGNORE_INDEX)}
        found.is_split = True
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        return split_between_ranks(context, found.weights), inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The trainer's own, in training with Σ wℓ / D as the loss of the model that it calls.

        `num_items_in_batch` is D as `get_batch_samples` returns it; a batch that did not come from there is weighted
        by itself. With `return_outputs` the model's outputs are complete, logits included.
        """
        weighs = model.training and not self._is_left_alone(inputs)
        problem = self._problem_with(inputs) if weighs else ""
        if problem:
            self._check_power_is_0(inputs, problem)
        if problem or not weighs:
            return self._unweighted_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_own_loss()
        steps = [] if self._temporal_step is None else [self._temporal_step]
        if not any(step.find(inputs["labels"]) for step in steps):
            if self.get_cp_size() > 1:
                raise ValueError(
                    f"a batch that did not come from get_batch_samples, split between {self.get_cp_size()} ranks "
                    "(cp_size): its weights need the whole rows. Accepted: trainer.train()."
                )
            steps.append(self._weigh([inputs], self.args.device))
        own = self._read_model_loss()
        mode = self.args.temporal_fused_head if isinstance(self.args, TemporalFields) else "auto"
        sees_logits = return_outputs or (mode == "auto" and self._has_own("compute_loss", behind=True))
        needs_logits = sees_logits or own.needs_labels or inputs["labels"].is_floating_point()
        forward = WeightedForward(
            self._root,
            own,
            functools.partial(self._share_of, steps, num_items_in_batch),
            self._note_weighted,
            fused_head=None if needs_logits else chosen_fused_head(self._root, own, mode),
            label_smoothing=self.args.label_smoothing_factor if self.label_smoother is not None else 0.0,
            regression_loss=self.weighting.regression_loss,
        )
        with forward.around(model), attribute(self, "label_smoother", None):
            return super().compute_loss(
                model, without(inputs, OWN_KEYS), return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def _unweighted_loss(self, model: nn.Module, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        """The trainer's own loss, in evaluation of encoder–decoders put right."""
        inputs = without(inputs, OWN_KEYS)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if self.label_smoother is not None and labels is not None and has_time(labels):
            # the trainer's label smoother takes the labels out, without which the decoder would have no inputs
            inputs |= missing_decoder_inputs(self._root, inputs, labels)
        elif not (model.training or self._read_model_loss().counts_items):
            num_items_in_batch = None
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _share_of(self, steps: list[WeightedStep], num_items_in_batch: Any, call: Batch) -> Share:
        """What a call of the model adds to the loss, so that it is right after the trainer has scaled it.

        `steps` are those whose labels are known, the optimizer step in progress first.
        """
        by_trainer = num_items_in_batch if call.get(_trl.FUSED_HEAD) else None
        items = call.get("num_items_in_batch", by_trainer)
        known = [(step, found) for step in steps if (found := step.find(call["labels"])) is not None]
        if not known:
            alone = self._weigh([without(call, ("num_items_in_batch", _trl.FUSED_HEAD))], self.args.device)
            known = [(alone, alone.weighted[0])]
        step, found = known[0]
        coefficient = self._read_model_loss().auxiliary_coefficient
        micro_batches = 1
        if step is self._temporal_step:
            micro_batches = getattr(self, "current_gradient_accumulation_steps", len(step.batches))
        copies = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        if items is not None:  # the trainer then multiplies by the copies
            return Share(found, 1 / items, coefficient / (micro_batches * copies), by_trainer)
        if step is not self._temporal_step:
            return Share(found, copies / step.denominator, coefficient)
        if self.model_accepts_loss_kwargs:  # the trainer's code asks for the mean of this micro-batch
            return Share(found, 1 / found.denominator, coefficient)
        divided = micro_batches if divides_by_accumulation_steps(self, num_items_in_batch) else 1
        return Share(found, copies * divided / step.denominator, coefficient * divided / micro_batches)

    def _note_weighted(self, _: Tensor) -> None:
        self._temporal_is_weighted = True

    def _check_weighted(self) -> None:
        """Raise a `ValueError` where the backward passes of a step did not minimise the weighted loss."""
        step, is_weighted, self._temporal_is_weighted = self._temporal_step, self._temporal_is_weighted, False
        if step is None or is_weighted:
            return
        self._temporal_step = None
        self._temporal_sample_sizes.clear()
        if not self._is_trivial({}):
            raise ValueError(
                f"the loss of {type(self).__name__} does not come from the model's own: its compute_loss (or "
                "training_step) calls the model without labels, or leaves the loss that the model returns. Accepted: "
                "loss, outputs = super().compute_loss(model, inputs, return_outputs=True), to which terms may be "
                "added; or power=0."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `temporal_power` and `effective_sample_size` to the logs of the training loss."""
        if self._temporal_step is not None and self._temporal_sample_sizes and "loss" in logs:
            logs["temporal_power"] = self._temporal_step.power
            logs["effective_sample_size"] = torch.stack(self._temporal_sample_sizes).mean().item()
            self._temporal_sample_sizes.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self.weighting.save_pretrained(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)


class TemporalWeightTrainer(TemporalWeightMixin, HubMixin, Trainer):
    """A drop-in for `Trainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""


class TemporalWeightSeq2SeqTrainer(TemporalWeightMixin, HubMixin, Seq2SeqTrainer):
    """A drop-in for `Seq2SeqTrainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""


def _recorded(batches: Iterator[Any], collected: list[tuple[Tensor, int]]) -> Iterator[Any]:
    """The batches as they come, their labels listed, with how often those were changed in place so far."""
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor):
            collected.append((labels, labels._version))
        yield batch


def _is_unchanged(batch: Any, collected: list[tuple[Tensor, int]]) -> bool:
    """Whether a batch has the labels that it was collected with, to which its times belong."""
    return any(batch["labels"] is labels and labels._version == version for labels, version in collected)

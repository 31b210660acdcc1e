"""Position-weighted losses for `Trainer`, `Seq2SeqTrainer` and any subclass of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Trainer

from hf_temporal.hub.push import HubMixin
from hf_temporal.model.model_loss import (
    ModelLoss,
    read_model_loss,
    read_on_batch,
    regression_problem,
    takes_position_ids,
)
from hf_temporal.model.weighted_loss import chosen_fused_head, missing_decoder_inputs, weighted_sum

from ._peft import base_model, is_prompt_learner
from ._transformers import forget_eval_dataloaders, keep_columns, split_between_ranks, undo_division
from .collator import (
    KEPT_COLUMNS,
    LOSS_WEIGHTS,
    OWN_KEYS,
    POSITIONS,
    WEIGHTS,
    Batch,
    Timeline,
    TimelineCollator,
    has_time,
)
from .evaluation_hooks import EvaluationByPosition
from .positions import IGNORE_INDEX, shift_left
from .schedules import power_at
from .step_weights import WeightedStep, weigh_batches
from .training_args import _TemporalFields
from .unsupported import check_arguments, check_engine
from .weighting import TemporalWeighting


class TemporalWeightMixin(EvaluationByPosition):
    """Put in front of a `Trainer` subclass, weights each target token's loss by t^p.

    The training loss is Σ_i w_i ℓ_i / D over the accumulated batch of all ranks, with w and D from
    `TemporalWeighting`; everything else of the trainer stays as it is. With p = 0 it is the trainer's own loss.

    Args:
        weighting: overrides the `temporal_*` fields of the arguments (`TemporalTrainingArguments`); where there are
            neither, `TemporalWeighting()` is used. Everything else is passed on.

    Logged beside what the trainer logs: `temporal_power`, the p in force, and `effective_sample_size`,
    (Σw)²/Σw² as a share of the target tokens. Evaluation adds `eval_temporal_loss`, `eval_first_token_loss`,
    `eval_head_loss`, `eval_tail_loss`, `eval_last_token_loss` and the file `loss_by_position.json` in `output_dir`.

    Raises:
        ValueError: `compute_loss_func`, `nn.DataParallel`, a fused Liger cross-entropy, DeepSpeed's sequence
            parallelism; with p ≠ 0, labels without a time dimension or a model whose own loss is not the cross-entropy
            of its logits.

    Source: Wang & Yan, arXiv 2307.11462.
    """

    loss_is_scaled_for_ga: bool | None = True

    def __init__(self, *args: Any, weighting: TemporalWeighting | None = None, **kwargs: Any) -> None:
        if weighting is not None and not isinstance(weighting, TemporalWeighting):
            raise TypeError(f"weighting={weighting!r} is a {type(weighting).__name__}; accepted: a TemporalWeighting.")
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        check_arguments({**given, **given.get("kwargs", {})})
        self._given_weighting = weighting
        self._model_loss: ModelLoss | None = None
        self._model_read: tuple[nn.Module, bool] | None = None
        self._problem: str | None = None
        self._eval_timeline: Timeline | None = None
        self._step: WeightedStep | None = None
        self._sample_sizes: list[Tensor] = []
        self._is_collecting = False
        super().__init__(*args, **kwargs)
        check_engine(self)
        if isinstance(self.args, _TemporalFields):
            self.args.validate_schedule(self.weighting.power)

    # ---- p and w

    @property
    def weighting(self) -> TemporalWeighting:
        """The weighting at its final power: the argument, else the arguments' fields, else `TemporalWeighting()`."""
        if self._given_weighting is not None:
            return self._given_weighting
        if isinstance(self.args, _TemporalFields):
            return self.args.temporal_weighting()
        return TemporalWeighting()

    @property
    def temporal_power(self) -> float:
        power = self.weighting.power
        if not isinstance(self.args, _TemporalFields):
            return power
        return power_at(
            self.state.global_step,
            self.state.max_steps,
            schedule=self.args.temporal_power_schedule,
            start=self.args.temporal_power_start,
            end=power,
            warmup_ratio=self.args.temporal_power_warmup_ratio,
        )

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        searched = [name for name in getattr(trial, "params", trial) or () if name.startswith("temporal_")]
        if isinstance(self.args, _TemporalFields):
            self.args.validate_temporal_fields()
        if searched and self._given_weighting is not None:
            raise ValueError(
                f"{searched[0]} is searched beside an explicit weighting={self._given_weighting!r}, which overrides "
                "it; accepted: one of the two."
            )

    # ---- t, made by the data loaders

    def get_train_dataloader(self) -> Any:
        """The trainer's own, whose batches carry t."""
        self._sample_sizes.clear()  # of a run that was cut short, as by a batch size that did not fit
        config: Any = self.args.accelerator_config
        dispatches = config.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        whole = not dispatches and self.get_cp_size() == self.get_tp_size() == 1
        with self._making_timelines(lists_targets=whole):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        timeline = self._new_timeline()
        if self._eval_timeline != timeline:
            forget_eval_dataloaders(self)  # they make the times of before
            self._eval_timeline = timeline
        with self._making_timelines():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._making_timelines():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _making_timelines(self, *, lists_targets: bool = False) -> Iterator[None]:
        collator = self.data_collator
        timeline = dataclasses.replace(self._new_timeline(), lists_targets=lists_targets)
        self.data_collator = TimelineCollator(collator, timeline)
        try:
            yield
        finally:
            self.data_collator = collator

    def _new_timeline(self) -> Timeline:
        """How times are made for the model as it is now."""
        base, loss = base_model(self._root), self._read_model_loss()
        config = getattr(base, "config", None)
        return Timeline(
            origin=self.weighting.origin,
            shifts_labels=loss.shifts_labels,
            encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
            takes_position_ids=loss.shifts_labels and takes_position_ids(base),
            takes_packed_rows=not is_prompt_learner(self._root),
            ranks_per_row=self.get_cp_size(),
            vocabulary=loss.vocabulary,
            pad_token_id=getattr(config, "pad_token_id", None),
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        keep_columns(self, KEPT_COLUMNS)

    # ---- the model's own loss

    @property
    def _root(self) -> Any:
        """The model inside any wrapper of accelerate's, a `PeftModel` included."""
        return self.accelerator.unwrap_model(self.model) if self.is_fsdp_enabled else self.model

    def _read_model_loss(self) -> ModelLoss:
        key = (self._root, self._can_run)
        if self._model_loss is None or self._model_read != key:
            self._model_loss, self._model_read = read_model_loss(self._root, can_run=self._can_run), key
            self._problem = None
        return self._model_loss

    @property
    def _can_run(self) -> bool:
        """Whether the model can be tried out on a few tokens, under FSDP2 by all ranks at once.

        Before FSDP2 shards a model, the weights may be on the first rank alone; FSDP1 and DeepSpeed gather theirs in
        the wrapper's forward only.
        """
        if self.is_fsdp_enabled:
            return isinstance(self._root, FSDPModule)
        return not self.is_deepspeed_enabled

    def _check_power_is_0(self, batch: Mapping[str, Any], problem: str) -> None:
        """Raise a `ValueError` where weights are asked for that this batch has no place for."""
        trivial = self.weighting.power == 0 and self.weighting.weight_fn is None and self.temporal_power == 0
        if trivial and batch.get(LOSS_WEIGHTS) is None:
            return
        raise ValueError(
            f"{type(base_model(self._root)).__name__} with {problem}: there is no loss per time to weight. Accepted: "
            f"power=0 without {LOSS_WEIGHTS} (the usual loss), or labels of shape [batch, time] and logits of shape "
            "[batch, time, vocabulary]."
        )

    def _problem_with(self, batch: Mapping[str, Any]) -> str:
        """Why there is no loss per time to weight, else empty; where need be a model's loss is read on this batch."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return "no labels" if labels is None else f"labels of type {type(labels).__name__}"
        if not has_time(labels):
            return f"labels of shape {tuple(labels.shape)}"
        loss = self._read_model_loss()
        if loss.is_read and not labels.is_floating_point():
            return loss.unsupported
        if self._problem is None:
            inputs = self._prepare_inputs({key: value for key, value in batch.items() if key not in OWN_KEYS})
            if labels.is_floating_point():
                self._problem = regression_problem(self._root, inputs) if self._can_run else ""
            else:
                self._model_loss = read_on_batch(self._root, loss, inputs)
                self._problem = self._model_loss.unsupported
        return self._problem

    # ---- training

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The trainer's own, which under DeepSpeed would round the weights to the model's bf16 or fp16."""
        kept = {key: inputs[key].to(self.args.device) for key in (WEIGHTS, LOSS_WEIGHTS) if key in inputs}
        prepared = super()._prepare_inputs(inputs)
        return {**prepared, **kept} if kept else prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step with their weights, and D in place of the number of items."""
        self._is_collecting = True
        try:
            batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        finally:
            self._is_collecting = False
        if not batches:
            return batches, num_items_in_batch
        problem = self._problem_with(batches[0])
        self.loss_is_scaled_for_ga = None if problem else True
        if problem:
            self._check_power_is_0(batches[0], problem)
            return batches, num_items_in_batch
        step = self._weigh(batches, device)
        return step.batches, step.denominator

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """The trainer's own count; left out, with its gathering over all ranks, where D takes its place."""
        if self._is_collecting and batch_samples and not self._problem_with(batch_samples[0]):
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def _weigh(self, batches: list[Any], device: torch.device) -> WeightedStep:
        """The optimizer step that these batches make, with its weights."""
        across_ranks = self.args.average_tokens_across_devices and self.args.world_size > 1
        step = weigh_batches(
            [dict(batch) if POSITIONS in batch else self._new_timeline().add(batch) for batch in batches],
            self.weighting.at(self.temporal_power),
            gather=self.accelerator.gather if across_ranks else None,
            device=device,
        )
        step = dataclasses.replace(step, denominator=step.denominator / (self.get_tp_size() * self.get_cp_size()))
        self._step = step
        self._sample_sizes.append(step.effective_sample_size)
        return step

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Batch) -> tuple[Any, Batch]:
        """The trainer's own, which splits rows between ranks, with the weights split as the labels are.

        Where the model shifts its labels they have to be shifted before that, and the weights with them.
        """
        if self.get_cp_size() == 1 or WEIGHTS not in inputs:
            return super()._prepare_context_parallel_inputs(model, inputs)
        labels = inputs["labels"]
        if self._read_model_loss().shifts_labels and not labels.is_floating_point():
            shifted = shift_left(labels, IGNORE_INDEX)
            inputs = {**inputs, WEIGHTS: shift_left(inputs[WEIGHTS], 0.0), "shift_labels": shifted}
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        return split_between_ranks(context, inputs[WEIGHTS]), inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Σ wℓ / D of a micro-batch in training, the trainer's own loss in evaluation.

        `num_items_in_batch` is D as `get_batch_samples` returns it; a batch that did not come from there is weighted
        by itself. With `return_outputs` the model's outputs are complete, logits included.
        """
        problem = self._problem_with(inputs) if model.training else ""
        if problem:
            self._check_power_is_0(inputs, problem)
        if problem or not model.training:
            inputs = {key: value for key, value in inputs.items() if key not in OWN_KEYS}
            if self.label_smoother is not None and has_time(inputs.get("labels")):
                # the trainer's label smoother takes the labels out, without which the decoder would have no inputs
                inputs |= missing_decoder_inputs(self._root, inputs, inputs["labels"])
            elif not (model.training or self._read_model_loss().counts_items):
                num_items_in_batch = None
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        given_items = num_items_in_batch
        self.loss_is_scaled_for_ga = WEIGHTS in inputs and num_items_in_batch is not None
        if WEIGHTS not in inputs or num_items_in_batch is None:
            if self.get_cp_size() > 1:
                raise ValueError(
                    f"a batch that did not come from get_batch_samples, split between {self.get_cp_size()} ranks "
                    "(cp_size): its weights need the whole rows. Accepted: trainer.train()."
                )
            step = self._weigh([inputs], self.args.device)
            (inputs,), num_items_in_batch = step.batches, step.denominator
        copies = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        # The weights are divided instead of the loss: gradients that are made in the forward pass are then final.
        weights = inputs[WEIGHTS] * (copies / num_items_in_batch)
        own = self._read_model_loss()
        mode = self.args.temporal_fused_head if isinstance(self.args, _TemporalFields) else "auto"
        needs_logits = return_outputs or own.needs_labels or inputs["labels"].is_floating_point()
        loss, outputs = weighted_sum(
            model,
            self._root,
            own,
            {**inputs, WEIGHTS: weights},
            is_shifted=self.get_cp_size() > 1 and "shift_labels" in inputs,
            fused_head=None if needs_logits else chosen_fused_head(self._root, own, mode),
            label_smoothing=self.args.label_smoothing_factor if self.label_smoother is not None else 0.0,
            regression_loss=self.weighting.regression_loss,
        )
        coefficient = own.auxiliary_coefficient
        if coefficient and isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
            steps = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
            loss = loss + coefficient * outputs["aux_loss"].to(loss.device) / steps
        if (factor := undo_division(self, given_items)) != 1:
            loss = loss * factor
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `temporal_power` and `effective_sample_size` to the logs of the training loss."""
        if self._step is not None and self._sample_sizes and "loss" in logs:
            logs["temporal_power"] = self._step.power
            logs["effective_sample_size"] = torch.stack(self._sample_sizes).mean().item()
            self._sample_sizes.clear()
        super().log(logs, *args, **kwargs)

    # ---- what is saved

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            self.weighting.save_pretrained(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)


class TemporalWeightTrainer(TemporalWeightMixin, HubMixin, Trainer):
    """A drop-in for `Trainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""


class TemporalWeightSeq2SeqTrainer(TemporalWeightMixin, HubMixin, Seq2SeqTrainer):
    """A drop-in for `Seq2SeqTrainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""

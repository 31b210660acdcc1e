"""Position-weighted losses for `Trainer`, `Seq2SeqTrainer` and any subclass of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from ._peft import base_model, is_prompt_learner
from ._transformers import forget_eval_dataloaders, keep_columns, split_between_ranks, undo_division
from .collator import (
    DOCUMENTS,
    KEPT_COLUMNS,
    LOSS_WEIGHTS,
    POSITIONS,
    TARGETS,
    TIMELINE_KEYS,
    WEIGHTS,
    Batch,
    Timeline,
    TimelineCollator,
    has_time,
    weigh_batches,
)
from .hub import HubMixin
from .lm_head import FusedHead, answer_logits
from .losses import weighted_cross_entropy, weighted_regression_loss
from .model_loss import (
    ModelLoss,
    decoder_inputs,
    logits_of,
    read_model_loss,
    read_on_batch,
    regression_problem,
    takes_position_ids,
)
from .profile import PROFILE_NAME, PositionProfile, TokenLosses, save_profile
from .schedules import power_at
from .timeline import IGNORE_INDEX, shift_left
from .training_args import _TemporalFields
from .weighting import TemporalWeighting

logger = logging.get_logger(__name__)

OWN_KEYS = (*TIMELINE_KEYS, WEIGHTS)
SMALLEST_VOCABULARY_TO_FUSE = 1024
LARGEST_POWER_WITHOUT_ZEROS = 16.0


class TemporalWeightMixin(HubMixin):
    """Put in front of a `Trainer` subclass, weights each target token's loss by t^p.

    The training loss is Σ_i w_i ℓ_i / D over the accumulated batch of all ranks, with w and D from
    `TemporalWeighting`; everything else of the trainer stays as it is. p = 0 is the trainer's own loss.

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
        given = {**given, **given.get("kwargs", {})}
        if given.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func cannot be combined with a position-weighted loss: it never sees the positions. "
                "Accepted instead: TemporalWeighting(weight_fn=...) for a shape of your own, or a loss_weights column."
            )
        _check_liger(given.get("args"))
        self._given_weighting = weighting
        self._model_loss: ModelLoss | None = None
        self._model_read: tuple[nn.Module, bool] | None = None
        self._problem: str | None = None
        self._eval_timeline: Timeline | None = None
        self._losses: TokenLosses | None = None
        self._sample_size: list[Tensor] = []
        self._power_in_force = 0.0
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={self.args.n_gpu}: nn.DataParallel splits the batch after its weights are summed. Accepted "
                "instead: one process per GPU, `accelerate launch` or `torchrun`."
            )
        if self.get_sp_size() > 1:
            raise ValueError(
                f"parallelism_config.sp_size={self.get_sp_size()}: under DeepSpeed's sequence parallelism the trainer "
                "takes the model's own loss. Accepted: sp_size=1; cp_size > 1 splits sequences, too, and is weighted."
            )
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
        """The power in force at `state.global_step`."""
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
        self._sample_size.clear()  # of a run that was cut short, as by a batch size that did not fit
        config: Any = self.args.accelerator_config
        dispatches = config.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        whole = not dispatches and self.get_cp_size() == self.get_tp_size() == 1
        with self._making_timelines(lists_targets=whole):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, whose batches carry t."""
        if self._eval_timeline != self._timeline:
            forget_eval_dataloaders(self)  # they make the times of before
            self._eval_timeline = self._timeline
        with self._making_timelines():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, whose batches carry t."""
        with self._making_timelines():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _making_timelines(self, *, lists_targets: bool = False) -> Iterator[None]:
        collator = self.data_collator
        timeline = dataclasses.replace(self._timeline, lists_targets=lists_targets)
        self.data_collator = TimelineCollator(collator, timeline)
        try:
            yield
        finally:
            self.data_collator = collator

    @property
    def _timeline(self) -> Timeline:
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

    def _is_stock(self, batch: Mapping[str, Any]) -> bool:
        """Whether the trainer's own loss is used: p = 0 where there is nothing that t^p could weight.

        Raises:
            ValueError: nothing to weight, and p ≠ 0.
        """
        what = self._problem_with(batch)
        if not what:
            return False
        trivial = self.weighting.power == 0 and self.weighting.weight_fn is None and self.temporal_power == 0
        if trivial and batch.get(LOSS_WEIGHTS) is None:
            return True
        raise ValueError(
            f"{type(base_model(self._root)).__name__} with {what}: there is no loss per time to weight. Accepted: "
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
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        stock = bool(batches) and self._is_stock(batches[0])
        self.loss_is_scaled_for_ga = None if stock else True
        if stock or not batches:
            return batches, num_items_in_batch
        return self._weigh(batches, device)

    def _weigh(self, batches: list[Any], device: torch.device) -> tuple[list[Batch], Tensor]:
        """The batches with their weights in place of their times, and the denominator D of all of them, all ranks."""
        self._power_in_force = self.temporal_power
        across_ranks = self.args.average_tokens_across_devices and self.args.world_size > 1
        batches, denominator, sample_size = weigh_batches(
            [dict(batch) if POSITIONS in batch else self._timeline.add(batch) for batch in batches],
            self.weighting.at(self._power_in_force),
            gather=self.accelerator.gather if across_ranks else None,
            device=device,
        )
        self._sample_size.append(sample_size)
        return batches, denominator / (self.get_tp_size() * self.get_cp_size())

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
        if not model.training or self._is_stock(inputs):
            inputs = {key: value for key, value in inputs.items() if key not in OWN_KEYS}
            if self.label_smoother is not None and has_time(inputs.get("labels")):
                inputs |= self._decoder_inputs(inputs, inputs["labels"])  # stock takes the labels out without them
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
            (inputs,), num_items_in_batch = self._weigh([inputs], self.args.device)
        copies = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        # The weights are divided instead of the loss: gradients that are made in the forward pass are then final.
        weights = inputs[WEIGHTS] * (copies / num_items_in_batch)
        loss, outputs = self._weighted_sum(model, {**inputs, WEIGHTS: weights}, needs_outputs=return_outputs)
        coefficient = self._read_model_loss().auxiliary_coefficient
        if coefficient and isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
            steps = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
            loss = loss + coefficient * outputs["aux_loss"].to(loss.device) / steps
        if (factor := undo_division(self, given_items)) != 1:
            loss = loss * factor
        return (loss, outputs) if return_outputs else loss

    def _weighted_sum(self, model: nn.Module, inputs: Batch, *, needs_outputs: bool) -> tuple[Tensor, Any]:
        """Σ wℓ of a micro-batch, and the model's outputs."""
        labels, weights, shifted = inputs.pop("labels"), inputs.pop(WEIGHTS), inputs.pop("shift_labels", None)
        targets = inputs.pop(TARGETS, None)
        if self.weighting.weight_fn is not None or abs(self._power_in_force) > LARGEST_POWER_WITHOUT_ZEROS:
            targets = None  # many weights may be 0, and such positions need no logits
        inputs = {key: value for key, value in inputs.items() if key not in OWN_KEYS}
        if labels.is_floating_point():
            outputs = model(**inputs, labels=labels)
            kind = self.weighting.regression_loss
            total, _ = weighted_regression_loss(logits_of(outputs, labels), labels, weights, kind=kind)
            return total, outputs
        own = self._read_model_loss()
        inputs |= {"labels": labels} if own.needs_labels else self._decoder_inputs(inputs, labels)
        if own.shifts_labels and self.get_cp_size() > 1:
            labels = shifted
        elif own.shifts_labels:
            labels, weights = shift_left(labels, IGNORE_INDEX), shift_left(weights, 0.0)
            targets = None if targets is None else targets - 1
        labels = labels.masked_fill(weights == 0, IGNORE_INDEX)
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        fused_head = None if needs_outputs or own.needs_labels else self._fused_head()
        if fused_head is not None:
            with fused_head.computing(self._root, labels, weights, targets=targets, label_smoothing=smoothing):
                outputs = model(**inputs)
                return fused_head.loss_of(outputs), outputs
        outputs = model(**inputs)
        logits = answer_logits(self._root, logits_of(outputs, labels), labels.shape[1])
        total, _ = weighted_cross_entropy(logits, labels, weights, label_smoothing=smoothing)
        return total, outputs

    def _decoder_inputs(self, inputs: Batch, labels: Tensor) -> Batch:
        base = base_model(self._root)
        if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            return {}
        if any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds")):
            return {}
        return {key: value for key, value in decoder_inputs(base, labels).items() if inputs.get(key) is None}

    def _fused_head(self) -> FusedHead | None:
        mode = self.args.temporal_fused_head if isinstance(self.args, _TemporalFields) else "auto"
        if mode == "off":
            return None
        head = self._read_model_loss().fused_head
        if isinstance(head, FusedHead) and head.is_known():
            return head if mode == "on" or head.vocabulary >= SMALLEST_VOCABULARY_TO_FUSE else None
        why = "its adapter is not a plain LoRA now" if isinstance(head, FusedHead) else head
        problem = (
            f"the LM head of {type(base_model(self._root)).__name__} cannot be fused exactly with the loss ({why})"
        )
        if mode == "on":
            raise ValueError(f"temporal_fused_head='on', but {problem}; accepted here: 'auto' or 'off'.")
        if (self._read_model_loss().vocabulary or 0) >= SMALLEST_VOCABULARY_TO_FUSE:
            logger.warning_once(f"The loss is computed from the full logits: {problem}.")
        return None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `temporal_power` and `effective_sample_size` to the logs of the training loss."""
        if self._sample_size and "loss" in logs:
            logs["temporal_power"] = self._power_in_force
            logs["effective_sample_size"] = torch.stack(self._sample_size).mean().item()
            self._sample_size.clear()
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, plus the weighted loss, that of both ends and the profile by position."""
        profile = PositionProfile(self.weighting, self._gather_examples, batch_size=self.args.eval_batch_size)
        with self._observing(profile):
            output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = profile.metrics(prefix)
        output.metrics.update(metrics)
        if metrics and self.args.should_save:
            path = Path(str(self.args.output_dir)) / PROFILE_NAME
            save_profile(path, split=prefix, step=self.state.global_step, bins=profile.bins())
        return output

    def _gather_examples(self, sums: Tensor) -> Tensor:
        """The rows of all ranks; of unequal numbers where last batches are not filled up (`even_batches=False`).

        Tensor parallel ranks are neighbours with the same rows, which accelerate would count once for each of them.
        """
        accelerator, copies = self.accelerator, self.get_tp_size()
        if accelerator.num_processes == 1:
            return sums
        sums = accelerator.pad_across_processes(sums)
        if copies == 1:
            return accelerator.gather_for_metrics(sums)
        rows = accelerator.gather(sums).unflatten(0, (-1, copies, len(sums)))[:, 0].flatten(0, 1)
        state = accelerator.gradient_state
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows

    @contextlib.contextmanager
    def _observing(self, losses: TokenLosses) -> Iterator[None]:
        """While it is open, `prediction_step` gives `losses` each batch that it runs through the model."""
        self._losses = losses
        try:
            yield
        finally:
            self._losses = None

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """The trainer's own step, whose logits are observed."""
        batch = dict(inputs) if POSITIONS in inputs else self._timeline.add(inputs)
        timeline = {key: batch.pop(key).to(self.args.device) for key in TIMELINE_KEYS if key in batch}
        if self._losses is None or POSITIONS not in timeline or self.get_cp_size() > 1 or self._problem_with(batch):
            return super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
        calls: deque[Any] = deque(maxlen=1)
        hook = model.register_forward_hook(lambda *call: calls.append(call[-1]))
        try:
            result = super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
        finally:
            hook.remove()
        batch = self._prepare_inputs(batch)
        labels = batch.pop("labels")
        outputs = calls[0]
        if isinstance(outputs, Mapping) and outputs.get("logits") is None:
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**batch, **self._decoder_inputs(batch, labels))
        logits = logits_of(outputs, labels)
        self._losses.add(
            logits if labels.is_floating_point() else answer_logits(self._root, logits, labels.shape[1]),
            labels,
            timeline[POSITIONS],
            shifts_labels=self._read_model_loss().shifts_labels,
            document_ids=timeline.get(DOCUMENTS),
            loss_weights=timeline.get(LOSS_WEIGHTS),
        )
        return result

    # ---- what is saved

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves `temporal_weighting.json` beside the model."""
        if self.args.should_save:
            self.weighting.save_pretrained(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)


class TemporalWeightTrainer(TemporalWeightMixin, Trainer):
    """A drop-in for `Trainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""


class TemporalWeightSeq2SeqTrainer(TemporalWeightMixin, Seq2SeqTrainer):
    """A drop-in for `Seq2SeqTrainer` that weights each target token's loss by t^p, see `TemporalWeightMixin`."""


def _check_liger(args: Any) -> None:
    if not getattr(args, "use_liger_kernel", False):
        return
    config = getattr(args, "liger_kernel_config", None) or {}
    if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
        raise ValueError(
            f"use_liger_kernel=True with liger_kernel_config={config or None}: Liger's cross-entropy knows no "
            "weights. Accepted: liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}; "
            "the fused head here takes its place."
        )

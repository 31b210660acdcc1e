"""The hooks of a `Trainer` by which its batches get their times, which need to know how its model makes its loss."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.utils import logging

from hf_temporal.model.model_loss import ModelLoss, read_model_loss, read_on_batch, regression_problem

from . import _trl
from ._peft import base_model, check_merged_head, described, is_prompt_learner
from ._transformers import TrainerBase, attribute, forget_eval_dataloaders, keep_columns
from .collator import KEPT_COLUMNS, LOSS_WEIGHTS, OWN_KEYS, Timeline, TimelineCollator, has_time, without
from .schedules import power_at
from .training_args import TemporalFields
from .weighting import TemporalWeighting

logger = logging.get_logger(__name__)


class TimelineHooks(TrainerBase):
    """Put in front of a `Trainer`, gives the batches of its data loaders their times, as its model needs them."""

    _temporal_given_weighting: TemporalWeighting | None = None
    _temporal_model_loss: ModelLoss | None = None
    _temporal_model_read: tuple[Any, ...] | None = None
    _temporal_problem: str | None = None
    _temporal_eval_timeline: Timeline | None = None

    @property
    def weighting(self) -> TemporalWeighting:
        """The weighting at its final power: the argument, else the arguments' fields, else `TemporalWeighting()`."""
        if self._temporal_given_weighting is not None:
            return self._temporal_given_weighting
        if isinstance(self.args, TemporalFields):
            return self.args.temporal_weighting()
        return TemporalWeighting()

    @property
    def temporal_power(self) -> float:
        power = self.weighting.power
        if not isinstance(self.args, TemporalFields):
            return power
        return power_at(self.state.global_step, self.state.max_steps, **self.args.power_schedule(power))

    # ---- t, made by the data loaders

    def get_train_dataloader(self) -> Any:
        """The trainer's own, whose batches carry t."""
        check_merged_head(self._root)
        config: Any = self.args.accelerator_config
        dispatches = config.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        whole = not dispatches and self.get_cp_size() == self.get_tp_size() == 1
        with self._making_timelines(lists_targets=whole):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        timeline = self._new_timeline()
        if self._temporal_eval_timeline != timeline:
            forget_eval_dataloaders(self)  # they make the times of before
            self._temporal_eval_timeline = timeline
        with self._making_timelines():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._making_timelines():
            return super().get_test_dataloader(*args, **kwargs)

    def _making_timelines(self, *, lists_targets: bool = False) -> Any:
        """While it is open, data loaders get a collator that adds t."""
        timeline = dataclasses.replace(self._new_timeline(), lists_targets=lists_targets)
        return attribute(self, "data_collator", TimelineCollator(self.data_collator, timeline))

    def _new_timeline(self) -> Timeline:
        """How times are made for the model as it is now."""
        base, loss = base_model(self._root), self._read_model_loss()
        config = getattr(base, "config", None)
        return Timeline(
            origin=self.weighting.origin,
            shifts_labels=loss.shifts_labels,
            encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
            takes_position_ids=loss.shifts_labels and loss.needs_position_ids and not self._is_left_alone({}),
            takes_packed_rows=loss.keeps_documents_apart and not is_prompt_learner(self._root),
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
        key = (self._root, self._can_run, *_ends(self._root))
        if self._temporal_model_loss is None or self._temporal_model_read != key:
            found = self._temporal_model_loss = read_model_loss(self._root, can_run=self._can_run)
            self._temporal_model_read, self._temporal_problem = key, None
            logger.info(f"{described(self._root)}: {found.in_words()}")
        return self._temporal_model_loss

    @property
    def _can_run(self) -> bool:
        """Whether the model can be tried out on a few tokens, under FSDP2 by all ranks at once.

        Before FSDP2 shards a model, the weights may be on the first rank alone; FSDP1 and DeepSpeed gather theirs in
        the wrapper's forward only.
        """
        if self.is_fsdp_enabled:
            return isinstance(self._root, FSDPModule)
        return not self.is_deepspeed_enabled

    def _is_trivial(self, batch: Any) -> bool:
        """Whether all weights are 1, throughout training."""
        weighting = self.weighting
        has_own = isinstance(batch, Mapping) and batch.get(LOSS_WEIGHTS) is not None
        return weighting.power == 0 and weighting.weight_fn is None and self.temporal_power == 0 and not has_own

    def _check_power_is_0(self, batch: Any, problem: str) -> None:
        """Raise a `ValueError` where weights are asked for that this batch has no place for."""
        if self._is_trivial(batch):
            return
        raise ValueError(
            f"{described(self._root)} with {problem}: there is no loss per time to weight in {type(self).__name__}. "
            f"Accepted: power=0 without {LOSS_WEIGHTS} (the usual loss), or labels of shape [batch, time] and logits "
            "of shape [batch, time, vocabulary]."
        )

    def _problem_with(self, batch: Any) -> str:
        """Why there is no loss per time to weight, else empty; where need be a model's loss is read on this batch."""
        if not isinstance(batch, Mapping):
            return f"batches of type {type(batch).__name__}"
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return "no labels" if labels is None else f"labels of type {type(labels).__name__}"
        if not has_time(labels):
            return f"labels of shape {tuple(labels.shape)}"
        loss = self._read_model_loss()
        if loss.is_read and not labels.is_floating_point():
            return loss.unsupported
        if self._temporal_problem is None:
            inputs = self._prepare_inputs(without(batch, OWN_KEYS))
            if labels.is_floating_point():
                self._temporal_problem = regression_problem(self._root, inputs) if self._can_run else ""
            else:
                self._temporal_model_loss = read_on_batch(self._root, loss, inputs)
                self._temporal_problem = self._temporal_model_loss.unsupported
        return self._temporal_problem

    # ---- what is left alone

    def _has_own(self, *names: str, behind: bool = False) -> bool:
        """Whether a class that is neither transformers' trainer nor ours defines one of these methods.

        `behind` leaves out the classes in front of the mixin.
        """
        kinds = type(self).__mro__
        return any(
            name in vars(kind)
            for kind in kinds[kinds.index(TimelineHooks) if behind else 0 :]
            if kind not in (Trainer, Seq2SeqTrainer)
            and kind.__module__.partition(".")[0] != __package__
            and kind.__module__ not in _trl.KNOWN_MODULES
            for name in names
        )

    def _is_left_alone(self, batch: Any) -> bool:
        """Whether p is 0 throughout and the trainer has a loss of its own, which then is left as it is."""
        return self._is_trivial(batch) and (
            self.compute_loss_func is not None
            or _trl.has_other_loss(self)
            or self._has_own("compute_loss", "training_step", "get_batch_samples", "_get_num_items_in_batch")
        )


def _ends(root: nn.Module) -> tuple[int, nn.Module | None]:
    """How many tokens the model embeds, which `resize_token_embeddings` changes, and its head; 0 and None without."""
    base = base_model(root)
    if not isinstance(base, PreTrainedModel):
        return 0, None
    with contextlib.suppress(NotImplementedError):  # of a model of sound or images
        return getattr(base.get_input_embeddings(), "num_embeddings", 0), base.get_output_embeddings()
    return 0, None

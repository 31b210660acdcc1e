"""The hooks of a `Trainer` by which its evaluation also tells the loss by position."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from hf_temporal.model.fused_head import FusedHead, answer_logits
from hf_temporal.model.model_loss import ModelLoss, logits_of, missing_decoder_inputs
from hf_temporal.model.target_head import head_at
from hf_temporal.model.weighted_loss import OutputsWithoutLogits

from . import _trl
from ._peft import is_prompt_learner
from ._transformers import attribute
from .collator import DOCUMENTS, LOSS_WEIGHTS, OWN_KEYS, POSITIONS, without
from .evaluation import PROFILE_NAME, PositionProfile, TokenBatch, losses_and_hits, save_profile, token_losses
from .positions import IGNORE_INDEX, shift_left
from .timeline_hooks import TimelineHooks
from .training_args import TemporalFields
from .weighting import wide_dtype


class EvaluationByPosition(TimelineHooks):
    """Put in front of a `Trainer`, observes the logits of its evaluation; `TemporalWeightMixin` says what of."""

    _temporal_observer: Callable[[TokenBatch], None] | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, plus the weighted loss, that of both ends and the profile by position."""
        profile = PositionProfile(self.weighting, self._gather_examples, batch_size=self.args.eval_batch_size)
        with self._observing(profile.add):
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

    def _observing(self, observer: Callable[[TokenBatch], None]) -> Any:
        """While it is open, `prediction_step` gives `observer` each batch that it runs through the model."""
        return attribute(self, "_temporal_observer", observer)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(inputs, Mapping):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        batch = dict(inputs) if POSITIONS in inputs else self._new_timeline().add(inputs)
        timeline = {key: batch.pop(key).to(self.args.device) for key in OWN_KEYS if key in batch}
        observer, is_whole = self._temporal_observer, POSITIONS in timeline and self.get_cp_size() == 1
        if observer is None or not is_whole or self._problem_with(batch):
            return super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
        positions = timeline[POSITIONS]
        if prediction_loss_only and self._needs_target_logits_alone(model, batch):
            alone = TargetLoss(self._root, self._read_model_loss())
            with alone.around(model):
                result = super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
            losses: Tensor = alone.losses
            correct: Tensor | None = alone.correct
        else:
            calls: deque[Any] = deque(maxlen=1)
            with model.register_forward_hook(lambda *call: calls.append(call[-1])):
                result = super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            losses, correct = self._token_losses(model, batch, labels, positions > 0, calls[0])
        losses = losses.to(wide_dtype(losses.device)).where(positions > 0, 0)
        observer(TokenBatch(losses, correct, positions, timeline.get(DOCUMENTS), timeline.get(LOSS_WEIGHTS)))
        return result

    def _needs_target_logits_alone(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether an evaluation that returns its loss alone needs no other logits than those that answer targets."""
        root, own, args = self._root, self._read_model_loss(), self.args
        if not isinstance(own.fused_head, FusedHead) or own.auxiliary_coefficient or is_prompt_learner(root):
            return False  # virtual tokens in front of a row answer its first label
        head, whole = own.fused_head.head, (model, root)
        is_off = isinstance(args, TemporalFields) and args.temporal_fused_head == "off"
        is_compiled = args.torch_compile or any(is_compiled_module(each) or each._compiled_call_impl for each in whole)
        is_watched = any(each._forward_hooks and not isinstance(each, FSDPModule) for each in (*whole, head))
        is_rounded = not own.counts_items and torch.finfo(head.weight.dtype).bits < 32  # as the logits are
        has_own_loss = self._has_own("compute_loss", "prediction_step") or "compute_loss" in vars(self)
        return not (
            is_off
            or is_compiled
            or is_watched
            or is_rounded
            or has_own_loss
            or _trl.is_sft(type(self))
            or self.label_smoother is not None
            or self.compute_loss_func is not None
            or batch["labels"].is_floating_point()
            or "shift_labels" in batch
        )

    def _token_losses(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, target: Tensor, outputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(outputs, Mapping) and isinstance(outputs.get("log_probs"), Tensor):
            # of TRL's head, at all labels but the first of a row
            log_probs, hits = (outputs[name][:, -(labels.shape[1] - 1) :] for name in ("log_probs", "is_top1"))
            return F.pad(-log_probs, (1, 0)), F.pad(hits.long(), (1, 0)) > 0
        if isinstance(outputs, Mapping) and outputs.get("logits") is None:
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**inputs, **missing_decoder_inputs(self._root, inputs, labels))
        logits = logits_of(outputs, labels)
        if not labels.is_floating_point():
            logits = answer_logits(self._root, logits, labels.shape[1])
        shifts, kind = self._read_model_loss().shifts_labels, self.weighting.regression_loss
        return token_losses(logits, labels, target, shifts_labels=shifts, regression_loss=kind)


class TargetLoss:
    """The model's own loss in an evaluation, from the logits alone that answer a target.

    `losses` and `correct` are those of a `TokenBatch`, of the last call.
    """

    losses: Tensor
    correct: Tensor

    def __init__(self, root: nn.Module, own: ModelLoss) -> None:
        self.root, self.own = root, own
        self._labels: Tensor | None = None  # of the call in progress
        self._items: Any = None
        self._rows: Tensor
        self._head = contextlib.ExitStack()

    @contextlib.contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """`model` is what the trainer calls: the root, or what wraps it."""
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        with before, model.register_forward_hook(self._after), self._head:
            yield

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        labels = self._labels = kwargs["labels"]
        self._items = kwargs.get("num_items_in_batch") if self.own.counts_items else None
        answers = shift_left(labels, IGNORE_INDEX) if self.own.shifts_labels else labels
        self._rows = (answers != IGNORE_INDEX).flatten().nonzero()[:, 0]
        assert isinstance(self.own.fused_head, FusedHead)
        self._head.enter_context(head_at(self.own.fused_head.head, self.root, self._rows, labels.shape[1]))
        inputs = without(kwargs, ("labels", "shift_labels", "num_items_in_batch"))
        return args, inputs | missing_decoder_inputs(self.root, inputs, labels)

    def _after(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        self._head.close()
        labels = self._labels
        assert labels is not None
        logits = logits_of(outputs, labels)
        places = self._rows + int(self.own.shifts_labels)
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        found, hits = losses_and_hits(logits, everywhere, labels.flatten()[places].to(logits.device))
        self.losses = found.new_zeros(labels.shape, device=labels.device)
        self.correct = torch.zeros_like(labels, dtype=torch.bool)
        self.losses.view(-1)[places], self.correct.view(-1)[places] = found.to(places.device), hits.to(places.device)
        loss = found.sum() / (len(found) if self._items is None else self._items)
        return OutputsWithoutLogits({**without(outputs, ["logits"]), "loss": loss})

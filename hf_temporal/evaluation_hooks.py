"""The hooks of a `Trainer` by which its evaluation also tells the loss by position."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_temporal.model.fused_head import answer_logits
from hf_temporal.model.model_loss import logits_of, missing_decoder_inputs

from ._transformers import attribute
from .collator import DOCUMENTS, LOSS_WEIGHTS, OWN_KEYS, POSITIONS
from .evaluation import PROFILE_NAME, PositionProfile, TokenBatch, save_profile, token_losses
from .timeline_hooks import TimelineHooks
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
        calls: deque[Any] = deque(maxlen=1)
        with model.register_forward_hook(lambda *call: calls.append(call[-1])):
            result = super().prediction_step(model, batch, prediction_loss_only, *args, **kwargs)
        batch = self._prepare_inputs(batch)
        labels, positions = batch.pop("labels"), timeline[POSITIONS]
        losses, correct = self._token_losses(model, batch, labels, positions > 0, calls[0])
        losses = losses.to(wide_dtype(losses.device)).where(positions > 0, 0)
        observer(TokenBatch(losses, correct, positions, timeline.get(DOCUMENTS), timeline.get(LOSS_WEIGHTS)))
        return result

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

"""An optimizer step of a trainer and all that it leaves behind; the same loss in float64, written out by hand."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests import older_transformers
from tests.tiny_models import IGNORE, PAD, Batch, Example, PadCollator

Tensors = dict[str, Tensor]

older_transformers.teach()

gc.freeze()  # Trainer collects garbage whenever it starts, which over the libraries' own objects takes 0.2 s


@dataclass
class Steps:
    """What training left: per optimizer step the loss, the norm and the gradients before clipping; the parameters."""

    logs: list[dict[str, float]] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    parameters: Tensors = field(default_factory=dict)
    update: Tensors = field(default_factory=dict)
    trainer: Trainer | None = None

    @property
    def loss(self) -> float:
        return self.logs[0]["loss"]

    @property
    def grad_norm(self) -> float:
        return self.logs[0]["grad_norm"]


class _Watch(TrainerCallback):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control
        self.steps.gradients.append(
            {
                key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
                for key, parameter in kwargs["model"].named_parameters()
                if parameter.requires_grad
            }
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        del args, state, control, kwargs
        self.steps.logs.append(dict(logs or {}))


def train(
    trainer_class: type[Trainer],
    arguments_class: type[TrainingArguments],
    model: nn.Module,
    rows: Sequence[Example],
    folder: Path,
    *,
    batch_size: int = 8,
    collator: Callable[[Sequence[Example]], Batch] | None = None,
    dataset: Any = None,
    trainer_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> Steps:
    """Train a copy of `model` by plain gradient descent on all rows at once, `batch_size` rows per forward pass.

    The optimizer step takes in all rows, by accumulation where `batch_size` is smaller. Nothing is clipped.
    `dataset` holds the rows in another form. A model that is divided between ranks is trained itself.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        model = copy.deepcopy(model)
    before = {key: whole(value) for key, value in model.named_parameters() if value.requires_grad}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": math.ceil(len(rows) / batch_size),
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    steps = Steps()
    trainer = trainer_class(
        model=model,
        args=arguments_class(**{**settings, **arguments}),
        train_dataset=list(rows) if dataset is None else dataset,
        data_collator=collator or PadCollator(),
        callbacks=[_Watch(steps)],
        **(trainer_arguments or {}),
    )
    trainer.train()
    steps.parameters = {key: whole(value) for key, value in model.named_parameters() if value.requires_grad}
    steps.update = {key: steps.parameters[key] - before[key] for key in before}
    steps.trainer = trainer
    return steps


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter on the CPU, gathered from all ranks where it is sharded."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).to("cpu", copy=True)


def hand_weights(times: Sequence[int], *, power: float, normalization: str, largest: int | None = None) -> list[float]:
    """The weight of each target token of one document, in Python floats; `largest` is the batch's largest t."""
    if normalization == "sequence":
        latest = max(times)
        raw = [float(t == latest) if power == math.inf else (t / latest) ** power for t in times]
        return [w * len(raw) / sum(raw) for w in raw]
    if power == math.inf:
        return [float(t == largest) for t in times]
    return [float(t) ** power for t in times]


def hand_times(targets: Sequence[bool], origin: str) -> list[int]:
    """t of each position of a document, 0 off the targets; `targets` has one entry per column of the labels."""
    times, count = [], 0
    for column, target in enumerate(targets):
        if origin == "sequence":
            times.append((column + 1) * target)
            continue
        if origin == "turn" and target and (column == 0 or not targets[column - 1]):
            count = 0
        count += target
        times.append(count * target)
    return times


@dataclass
class Reference:
    """The loss of the whole accumulated batch in float64, its gradients and their norm."""

    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float


def reference(
    model: Any,
    rows: Sequence[Example],
    *,
    power: float = 0.0,
    normalization: str = "sequence",
    origin: str = "target",
    label_smoothing: float = 0.0,
    auxiliary: Callable[[Any], Tensor] | None = None,
) -> Reference:
    """Σ wℓ / D over all examples, each run by itself and unpadded through a float64 copy of the model.

    D is the number of target tokens under `"tokens"` and Σ w otherwise. A row's `loss_weights` multiply w.
    `auxiliary(model)` is added undivided.
    """
    model = copy.deepcopy(model).double().train()
    seq2seq = bool(model.config.is_encoder_decoder)
    times = [
        hand_times([label != IGNORE and (seq2seq or column > 0) for column, label in enumerate(row["labels"])], origin)
        for row in rows
    ]
    largest = max(map(max, times))
    weighted, weight_sum, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
    for row, row_times in zip(rows, times, strict=True):
        positions = [i for i, t in enumerate(row_times) if t]
        if not positions:
            continue
        weights = hand_weights(
            [row_times[i] for i in positions], power=power, normalization=normalization, largest=largest
        )
        if "loss_weights" in row:
            weights = [w * row["loss_weights"][i] for w, i in zip(weights, positions, strict=True)]
        log_probabilities = _logits(model, row, seq2seq).log_softmax(-1)
        for position, weight in zip(positions, weights, strict=True):
            scores = log_probabilities[position if seq2seq else position - 1]
            loss = -scores[row["labels"][position]]
            weighted = weighted + weight * ((1 - label_smoothing) * loss - label_smoothing * scores.mean())
        weight_sum += sum(weights)
        tokens += len(positions)
    loss = weighted / ((tokens if normalization == "tokens" else weight_sum) or 1)
    if auxiliary is not None:
        loss = loss + auxiliary(model)
    if loss.requires_grad:  # there is a target
        loss.backward()
    gradients = {
        key: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Reference(loss.item(), gradients, norm(gradients))


def _logits(model: Any, row: Example, seq2seq: bool) -> Tensor:
    inputs = {"input_ids": torch.tensor([row["input_ids"]])}
    if seq2seq:
        decoder = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        inputs["decoder_input_ids"] = torch.tensor([[PAD if token == IGNORE else token for token in decoder]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if model.config.model_type == "encoder-decoder":  # masks pads among the decoder's inputs, as its forward does
            inputs["decoder_attention_mask"] = (inputs["decoder_input_ids"] != PAD).long()
    return model(**inputs, use_cache=False).logits[0].double()


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors together."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return norm({key: a[key].double() - b[key].double() for key in b}) / max(norm(b), 1e-30)


def token_losses(model: Any, rows: list[Any]) -> list[tuple[list[float], list[bool]]]:
    """Loss and correctness of each row's target tokens in float64, one row at a time, without padding."""
    result = []
    for row in rows:
        batch = PadCollator()([row])
        with torch.no_grad():
            logits = model(**batch).logits.double()
        labels = batch["labels"]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        on = labels != -100
        losses = -logits.log_softmax(-1)[on].gather(-1, labels[on][:, None])[:, 0]
        result.append((losses.tolist(), (logits.argmax(-1)[on] == labels[on]).tolist()))
    return result

"""The mixin in front of trainers that have code of their own: their loss at p = 0, weighted or refused otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_temporal import TemporalWeighting, TemporalWeightMixin, TemporalWeightTrainer
from tests.tiny_models import PadCollator, causal_examples, tiny_model

ROWS = causal_examples(8)
POWERS = [0.0, 2.0]


TWO_STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,  # clips nothing; without clipping, older releases do not log the norm
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def settings(folder: Path, **kwargs: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), **{**TWO_STEPS, **kwargs})


def weighted(kind: type[Trainer]) -> Any:
    return type(f"Weighted{kind.__name__}", (TemporalWeightMixin, kind), {})


def run(kind: Any, folder: Path, *, power: float | None = None, **kwargs: Any) -> list[dict[str, float]]:
    """The logs of two steps; without a power, of the trainer as it is."""
    if power is not None:
        kwargs["weighting"] = TemporalWeighting(power)
    kwargs = {"model": tiny_model("llama"), "train_dataset": ROWS, "data_collator": PadCollator(), **kwargs}
    args = settings(folder, **kwargs.pop("args", {}))
    trainer = kind(args=args, **kwargs)
    trainer.train()
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def numbers(logs: list[dict[str, float]]) -> list[float]:
    return [entry[key] for entry in logs for key in ("loss", "grad_norm")]


@torch.no_grad()
def reference(power: float, *, rows: list[dict[str, Any]] = ROWS[:4], labels_of: Callable[[Any], Any] = list) -> float:
    """Σ wℓ / D of the first step, in float64, one document at a time."""
    model: Any = tiny_model("llama").double().eval()
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(labels_of(row["labels"]))[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        keep = labels != -100
        losses = F.cross_entropy(logits[keep], labels[keep], reduction="none")
        weights = torch.arange(1, len(losses) + 1, dtype=torch.float64) ** power
        total += float((weights * losses).sum() * len(losses) / weights.sum())
        count += len(losses)
    return total / count


# ---- a loss around the model's own


class Regularised(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        loss = loss + self.extra(model) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def extra(model: Any) -> Any:
        return 0.01 * sum(parameter.double().square().sum() for parameter in model.parameters())


class FromTheOutputs(Trainer):
    """As most people write it who do not call super()."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class SecondForward(Trainer):
    """Half of the loss from each of two forward calls, and a call without labels between them."""

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:  # type: ignore[override]
        first = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
        assert model(**unlabelled).get("loss") is None
        second = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return (first + second) / 2  # type: ignore[operator]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kind", [Regularised, FromTheOutputs, SecondForward])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_around_the_models_own(kind: Any, power: float, smoothing: float, tmp_path: Path) -> None:
    args = {"label_smoothing_factor": smoothing}
    if smoothing and kind is FromTheOutputs:
        pytest.skip("does not smooth its labels")
    plain, ours = (run(weighted(each), tmp_path, power=power, args=args) for each in (Trainer, kind))
    extra = Regularised.extra(tiny_model("llama")).detach().item() if kind is Regularised else 0.0
    assert ours[0]["loss"] - extra == pytest.approx(plain[0]["loss"], rel=1e-6)
    if not smoothing:
        assert ours[0]["loss"] - extra == pytest.approx(reference(power), rel=1e-6)
    if power == 0:
        assert numbers(ours) == pytest.approx(numbers(run(kind, tmp_path, args=args)), rel=1e-6)
    else:
        assert ours[0]["temporal_power"] == power


class MeanOfMicroBatches(Trainer):
    """As it was written before there was `num_items_in_batch`."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        return super().compute_loss(model, inputs, return_outputs=return_outputs)


@pytest.mark.parametrize("power", POWERS)
def test_a_mean_over_micro_batches_stays_one(power: float, tmp_path: Path) -> None:
    ours = run(weighted(MeanOfMicroBatches), tmp_path, power=power)
    means = [reference(power, rows=ROWS[start : start + 2]) for start in (0, 2)]
    divided = 2 if hasattr(Trainer, "loss_is_scaled_for_ga") else 1  # before 5.19 every Trainer adds these means up
    assert ours[0]["loss"] == pytest.approx(sum(means) / divided, rel=1e-6)
    if power == 0:
        assert numbers(ours) == pytest.approx(numbers(run(MeanOfMicroBatches, tmp_path)), rel=1e-6)


# ---- a loss that does not come from the model's own


class Focal(Trainer):
    """From the logits of a call without labels."""

    with_labels = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"][:, 1:].flatten()
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels" or self.with_labels})
        losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels, reduction="none", ignore_index=-100)
        loss = ((1 - (-losses).exp()) ** 2 * losses).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class FocalWithLabels(Focal):
    with_labels = True


class OwnTrainingStep(Trainer):
    def training_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        model.train()
        assert inputs.keys() <= {"input_ids", "labels", "attention_mask", "position_ids"}
        loss = model(**inputs).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLossFunction(Trainer):
    """Set after `__init__`, as LLaMA-Factory does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_loss_func = lambda outputs, _, num_items_in_batch: (
            outputs.logits.square().sum() / num_items_in_batch
        )


def from_logits_in_front(trainer: type[TemporalWeightTrainer]) -> Any:
    class InFront(trainer):  # type: ignore[valid-type, misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **kwargs: Any) -> Any:
            _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return outputs.logits.square().mean()

    return InFront


@pytest.mark.parametrize("kind", [Focal, FocalWithLabels, OwnTrainingStep, OwnLossFunction])
def test_an_own_loss_is_kept_at_0_and_refused_elsewhere(kind: Any, tmp_path: Path) -> None:
    ours = run(weighted(kind), tmp_path, power=0.0)
    assert numbers(ours) == pytest.approx(numbers(run(kind, tmp_path)), rel=1e-6)
    assert "temporal_power" not in ours[0]
    message = "compute_loss_func cannot" if kind is OwnLossFunction else "does not come from the model's own"
    with pytest.raises(ValueError, match=message):
        run(weighted(kind), tmp_path, power=2.0)


@pytest.mark.parametrize("in_front", [from_logits_in_front, lambda kind: type("A", (OwnTrainingStep, kind), {})])
def test_a_class_in_front_that_leaves_the_loss(in_front: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not come from the model's own"):
        run(in_front(TemporalWeightTrainer), tmp_path, power=2.0)


def test_a_loss_function_that_is_given(tmp_path: Path) -> None:
    own: dict[str, Any] = {"compute_loss_func": lambda outputs, *_, **__: outputs.logits.square().mean()}
    ours = run(TemporalWeightTrainer, tmp_path, power=0.0, **own)
    assert numbers(ours) == pytest.approx(numbers(run(Trainer, tmp_path, **own)), rel=1e-6)


# ---- the order of the bases


def test_the_mixin_behind_its_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"class Slip\(Trainer, TemporalWeightMixin\).*the mixin first"):
        type("Slip", (Trainer, TemporalWeightMixin), {})
    assert issubclass(weighted(Trainer), TemporalWeightMixin)


# ---- names


class CountsItsSteps(Trainer):
    """Keeps numbers under names that are short enough for anyone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step = 0
        self._losses: list[float] = []
        self._problem = self._model_loss = self._model_read = self._is_weighted = None
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._step += 1
        self._losses.append(float(loss))
        assert self._problem is self._model_loss is self._model_read is self._is_weighted is None
        return loss


@pytest.mark.parametrize("power", POWERS)
def test_attributes_of_the_trainer_stay_its_own(power: float, tmp_path: Path) -> None:
    ours, plain = (run(weighted(kind), tmp_path, power=power) for kind in (CountsItsSteps, Trainer))
    assert numbers(ours) == pytest.approx(numbers(plain), rel=1e-6)


def test_a_method_with_the_name_of_one_of_ours_is_refused() -> None:
    class Weighs(Trainer):
        def _weigh(self) -> None: ...

    with pytest.raises(TypeError, match=r"Weighs\._weigh has the name of a method that TemporalWeightMixin needs"):
        weighted(Weighs)

"""What the trainer takes, refuses, logs and saves."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_temporal import (
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightMixin,
    TemporalWeightTrainer,
)
from tests.tiny_models import PadCollator, causal_examples, tiny_model

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def trainer(folder: Path, *, weighting: TemporalWeighting | None = None, **kwargs: Any) -> TemporalWeightTrainer:
    own = {key: kwargs.pop(key) for key in list(kwargs) if key in ("model", "compute_loss_func", "train_dataset")}
    return TemporalWeightTrainer(
        own.pop("model", None) or tiny_model("llama"),
        TemporalTrainingArguments(str(folder), **{**SETTINGS, **kwargs}),
        train_dataset=own.pop("train_dataset", None) or causal_examples(24),
        data_collator=PadCollator(),
        weighting=weighting,
        **own,
    )


def losses(one: Trainer) -> list[dict[str, float]]:
    return [logs for logs in one.state.log_history if "loss" in logs]


# ---- where the weighting comes from


def test_precedence_of_argument_fields_and_default(tmp_path: Path) -> None:
    assert trainer(tmp_path, temporal_power=3.0).weighting == TemporalWeighting(3.0)
    given = TemporalWeighting(2.0, normalization="batch")
    assert trainer(tmp_path, temporal_power=3.0, weighting=given).weighting is given
    plain = TemporalWeightTrainer(tiny_model("llama"), TrainingArguments(str(tmp_path), report_to="none"))
    assert plain.weighting == TemporalWeighting()


def test_fields_set_after_construction_count(tmp_path: Path) -> None:
    one = trainer(tmp_path, temporal_power=0.0)
    one.args.temporal_power = 2.0  # type: ignore[attr-defined]
    assert one.weighting.power == 2.0


def test_mixin_goes_in_front_of_any_trainer(tmp_path: Path) -> None:
    class Counting(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class Both(TemporalWeightMixin, Counting):
        pass

    args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, **SETTINGS)
    both = Both(tiny_model("llama"), args, train_dataset=causal_examples(12), data_collator=PadCollator())
    both.train()
    reference = trainer(tmp_path, temporal_power=2.0, train_dataset=causal_examples(12))
    reference.train()
    assert both.steps == 3
    assert [logs["loss"] for logs in losses(both)] == [logs["loss"] for logs in losses(reference)]


class OwnLoader(TemporalWeightTrainer):
    """A loader of the user's own, whose batches carry no times."""

    def get_train_dataloader(self) -> Any:
        rows = causal_examples(12)
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=PadCollator())  # type: ignore[arg-type]
        )


def test_a_loader_of_the_users_own(tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=2.0, **SETTINGS)
    own = OwnLoader(tiny_model("llama"), args, train_dataset=causal_examples(12), data_collator=PadCollator())
    own.train()
    reference = trainer(
        tmp_path, temporal_power=2.0, train_sampling_strategy="sequential", train_dataset=causal_examples(12)
    )
    reference.train()
    assert [logs["loss"] for logs in losses(own)] == [logs["loss"] for logs in losses(reference)]


def test_compute_loss_called_by_hand_weighs_the_batch_by_itself(tmp_path: Path) -> None:
    one = trainer(tmp_path, temporal_power=2.0)
    batch = PadCollator()(causal_examples(3))
    one.model.train()  # type: ignore[union-attr]
    loss, outputs = one.compute_loss(one.model, dict(batch), return_outputs=True)  # type: ignore[arg-type]
    assert outputs["logits"].shape == (*batch["labels"].shape, 97)
    step = one._weigh([batch], torch.device("cpu"))
    (ready,), denominator = step.weighted, step.denominator
    assert denominator == (batch["labels"][:, 1:] != -100).sum()
    log_p = outputs["logits"].double().log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    weights = ready.weights[:, 1:].double()
    torch.testing.assert_close(loss.double(), (weights * nll).sum() / denominator, rtol=1e-6, atol=0)


# ---- what is logged and saved


def test_logs_power_in_force_and_effective_sample_size(tmp_path: Path) -> None:
    one = trainer(tmp_path, temporal_power=2.0, temporal_power_schedule="linear", max_steps=4)
    one.train()
    logs = losses(one)
    assert [entry["temporal_power"] for entry in logs] == [0.0, 0.5, 1.0, 1.5]
    assert logs[0]["effective_sample_size"] == pytest.approx(1.0)
    sizes = [entry["effective_sample_size"] for entry in logs]
    assert all(0 < size < 1 for size in sizes[1:])


def test_effective_sample_size_by_hand(tmp_path: Path) -> None:
    rows = causal_examples(4)
    one = trainer(tmp_path, temporal_power=2.0, max_steps=1, train_dataset=rows)
    one.train()
    weights = []
    for row in rows:
        n = sum(label != -100 for label in row["labels"][1:])
        raw = [(t / n) ** 2 for t in range(1, n + 1)]
        weights += [w * n / sum(raw) for w in raw]
    expected = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert losses(one)[0]["effective_sample_size"] == pytest.approx(expected, rel=1e-5)


def test_every_checkpoint_says_its_weighting(tmp_path: Path) -> None:
    one = trainer(tmp_path, temporal_power=math.inf, save_strategy="steps", save_steps=2)
    one.train()
    one.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert json.loads((folder / "temporal_weighting.json").read_text())["power"] == "inf"
        assert TemporalWeighting.from_pretrained(folder) == TemporalWeighting(math.inf)


def test_saved_model_loads_plain(tmp_path: Path) -> None:
    one = trainer(tmp_path, temporal_fused_head="on")
    one.train()
    one.save_model()
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    batch = PadCollator()(causal_examples(2))
    model: Any = one.model
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_card_says_how_it_was_weighted(tmp_path: Path) -> None:
    one = trainer(
        tmp_path, temporal_power=2.0, temporal_power_schedule="linear", temporal_power_warmup_ratio=0.5, max_steps=1
    )
    one.train()
    one.evaluate(causal_examples(4))  # type: ignore[arg-type]
    one.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "## Temporal weighting" in card
    assert "| p | 2 |" in card
    assert "linear, from 0 over 50% of the steps" in card
    assert "| eval_head_loss |" in card
    assert "2307.11462" in card
    assert str(tmp_path) not in card


# ---- loss_weights


def test_loss_weights_survive_column_removal(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {**row, "loss_weights": [0.25 * (i % 5) for i in range(len(row["labels"]))], "title": "a"}
        for row in causal_examples(4)
    ]
    logged = []
    for data in (Dataset.from_list(rows), rows):
        one = trainer(tmp_path, temporal_power=1.0, max_steps=1, train_dataset=data)
        one.train()
        logged.append(losses(one)[0]["loss"])
    unweighted = trainer(tmp_path, temporal_power=1.0, max_steps=1, train_dataset=causal_examples(4))
    unweighted.train()
    assert logged[0] == logged[1] != losses(unweighted)[0]["loss"]


@pytest.mark.parametrize("normalization", ["sequence", "batch", "tokens"])
def test_loss_weights_in_the_denominator(normalization: str, tmp_path: Path) -> None:
    """Doubling every weight of a data set changes the loss where D counts tokens, and nowhere else."""
    logged = []
    for factor in (1.0, 2.0):
        rows = [{**row, "loss_weights": [factor] * len(row["labels"])} for row in causal_examples(4)]
        one = trainer(
            tmp_path, temporal_power=1.0, temporal_normalization=normalization, max_steps=1, train_dataset=rows
        )
        one.train()
        logged.append(losses(one)[0]["loss"])
    assert logged[1] == pytest.approx(logged[0] * (2 if normalization == "tokens" else 1), rel=1e-6)


# ---- a batch with nothing to predict


def test_no_target_anywhere_contributes_zero(tmp_path: Path) -> None:
    rows = [{"input_ids": [4, 5, 6], "labels": [-100] * 3} for _ in range(8)]
    for fused in ("on", "off"):
        one = trainer(tmp_path, temporal_power=2.0, train_dataset=rows, temporal_fused_head=fused)
        before = {key: value.clone() for key, value in one.model.state_dict().items()}  # type: ignore[union-attr]
        one.train()
        assert [entry["loss"] for entry in losses(one)] == [0.0] * 3
        for key, value in one.model.state_dict().items():  # type: ignore[union-attr]
            torch.testing.assert_close(value, before[key])


# ---- what is refused


def test_compute_loss_func_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_loss_func cannot be combined.*Accepted instead: TemporalWeighting"):
        trainer(tmp_path, compute_loss_func=lambda *_, **__: torch.zeros(()))


@pytest.mark.parametrize("config", [None, {"fused_linear_cross_entropy": False, "cross_entropy": True}])
def test_liger_cross_entropy_is_refused(config: dict[str, bool] | None, tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), **SETTINGS)
    args.use_liger_kernel, args.liger_kernel_config = True, config
    with pytest.raises(ValueError, match=r"Liger's cross-entropy knows no weights\. Accepted: liger_kernel_config="):
        TemporalWeightTrainer(tiny_model("llama"), args)


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TemporalTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"n_gpu=2: nn\.DataParallel.*`accelerate launch`"):
        TemporalWeightTrainer(tiny_model("llama"), TemporalTrainingArguments(str(tmp_path), **SETTINGS))


@pytest.mark.skipif("sp_size" not in inspect.signature(ParallelismConfig).parameters, reason="accelerate has none yet")
def test_sequence_parallelism_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "multi_device", True)  # else accelerate refuses it itself
    monkeypatch.setattr(ParallelismConfig, "get_device_mesh", lambda *_: None)  # of processes that there are not
    args = TemporalTrainingArguments(str(tmp_path), parallelism_config=ParallelismConfig(sp_size=2), **SETTINGS)
    with pytest.raises(ValueError, match=r"parallelism_config\.sp_size=2: .* Accepted: sp_size=1; cp_size > 1"):
        TemporalWeightTrainer(tiny_model("llama"), args)


def test_weighting_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="weighting=2 is a int; accepted: a TemporalWeighting"):
        trainer(tmp_path, weighting=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_power": math.nan}, "temporal_power=nan is out of range"),
        ({"temporal_origin": "end"}, "temporal_origin='end' is not known; accepted: 'target', 'sequence', 'turn'"),
        ({"temporal_normalization": "mean"}, "temporal_normalization='mean' is not known"),
        ({"temporal_mixture": -0.1}, "temporal_mixture=-0.1 is out of range; accepted: 0 to 1"),
        ({"temporal_mixture": 0.5, "temporal_normalization": "batch"}, "temporal_mixture=0.5 with normalization"),
        ({"temporal_power_schedule": "step"}, "temporal_power_schedule='step' is not known"),
        ({"temporal_fused_head": "yes"}, "temporal_fused_head='yes' is not known; accepted: 'auto', 'on', 'off'"),
        (
            {"temporal_power": math.inf, "temporal_power_schedule": "linear"},
            "temporal_power=inf cannot be reached by temporal_power_schedule='linear'",
        ),
    ],
)
def test_bad_fields_are_named_when_the_arguments_are_made(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalTrainingArguments(str(tmp_path), **fields)


def test_a_schedule_cannot_reach_an_infinite_weighting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temporal_power=inf cannot be reached"):
        trainer(tmp_path, weighting=TemporalWeighting(math.inf), temporal_power_schedule="cosine")


def test_labels_out_of_the_vocabulary(tmp_path: Path) -> None:
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 97, 6]}]
    with pytest.raises(ValueError, match="labels hold 97; accepted: token ids from 0 to 96"):
        trainer(tmp_path, train_dataset=rows * 4).train()


class Cutting(LlamaForCausalLM):
    """Drops the last position of long rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if outputs.logits.shape[1] > 8:
            outputs.logits = outputs.logits[:, 1:]
        return outputs

    forward.__signature__ = __import__("inspect").signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_labels_and_logits_of_different_length(tmp_path: Path) -> None:
    one = trainer(tmp_path, model=Cutting(tiny_model("llama").config), temporal_fused_head="off")
    with pytest.raises(ValueError, match=r"logits of shape \(4, \d+, 97\) for labels of shape \(4, \d+\)"):
        one.train()

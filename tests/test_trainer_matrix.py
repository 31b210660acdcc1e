"""The trainer against stock and against a loss by hand: models, accumulation, weightings, options of Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_temporal import (
    TemporalSeq2SeqTrainingArguments,
    TemporalTrainingArguments,
    TemporalWeighting,
    TemporalWeightMixin,
    TemporalWeightSeq2SeqTrainer,
    TemporalWeightTrainer,
)
from tests.tiny_models import (
    CAUSAL,
    IGNORE,
    MODELS,
    PAD,
    SEQ2SEQ,
    Batch,
    Example,
    PadCollator,
    examples,
    tiny_model,
)
from tests.tiny_training import Steps, distance, reference, train

POWERS = (-1.0, 0.0, 0.5, 2.0, 10.0, math.inf)
NORMALIZATIONS = ("sequence", "batch", "tokens")
ORIGINS = ("target", "sequence", "turn")


def temporal(model: Any, rows: Sequence[Example], folder: Path, **options: Any) -> Steps:
    return train(TemporalWeightTrainer, TemporalTrainingArguments, model, rows, folder, **options)


def stock(model: Any, rows: Sequence[Example], folder: Path, **options: Any) -> Steps:
    return train(Trainer, TrainingArguments, model, rows, folder, **options)


def assert_same(steps: Steps, expected: Steps, *, tolerance: float = 1e-5) -> None:
    assert steps.loss == pytest.approx(expected.loss, rel=tolerance / 5)
    assert steps.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)
    assert distance(steps.gradients[0], expected.gradients[0]) < tolerance
    assert distance(steps.parameters, expected.parameters) < tolerance


def behind_a_prompt(rows: Sequence[Example]) -> list[Example]:
    """Stock counts a first label that GPT-2's loss never scores; rows that have none are those that it gets right."""
    return [{**row, "labels": [IGNORE, *row["labels"][1:]]} for row in rows]


class DecoderInputs(PadCollator):
    """Adds the decoder's inputs, which stock label smoothing needs from the collator."""

    def __call__(self, rows: Sequence[Example]) -> Batch:
        batch = super().__call__(rows)
        shifted = batch["labels"].roll(1, -1).masked_fill(batch["labels"].roll(1, -1) == IGNORE, PAD)
        shifted[:, 0] = 7
        return {**batch, "decoder_input_ids": shifted}


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("name", MODELS)
def test_power_zero_is_stock_wherever_stock_is_right(name: str, batch_size: int, fused: str, tmp_path: Path) -> None:
    if batch_size < 8 and (name in SEQ2SEQ or name == "mixtral"):
        pytest.skip("stock multiplies this model's loss by the number of accumulation steps")
    rows = behind_a_prompt(examples(name)) if name == "gpt2" else examples(name)
    model = tiny_model(name)
    expected = stock(model, rows, tmp_path, batch_size=batch_size)
    steps = temporal(model, rows, tmp_path, batch_size=batch_size, temporal_power=0.0, temporal_fused_head=fused)
    assert_same(steps, expected)


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_power_zero_is_stock_under_label_smoothing(name: str, batch_size: int, fused: str, tmp_path: Path) -> None:
    rows = behind_a_prompt(examples(name)) if name == "gpt2" else examples(name)
    options: dict[str, Any] = {"batch_size": batch_size, "label_smoothing_factor": 0.2}
    if name in SEQ2SEQ:
        options["collator"] = DecoderInputs()
    model = tiny_model(name)
    expected = stock(model, rows, tmp_path, **options)
    steps = temporal(model, rows, tmp_path, temporal_power=0.0, temporal_fused_head=fused, **options)
    assert_same(steps, expected)


@pytest.mark.parametrize("power", [0.0, 2.0])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_accumulation_gives_a_model_that_ignores_the_count_its_large_batch_value(
    name: str, power: float, tmp_path: Path
) -> None:
    model = tiny_model(name)
    whole = temporal(model, examples(name), tmp_path, temporal_power=power)
    for batch_size in (1, 3):
        assert_same(temporal(model, examples(name), tmp_path, batch_size=batch_size, temporal_power=power), whole)


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("batch_size", [8, 4, 3])
def test_auxiliary_loss_is_added_once_per_step(batch_size: int, smoothing: float, fused: str, tmp_path: Path) -> None:
    rows = examples("mixtral")
    batches = [PadCollator()(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    expected = reference(
        tiny_model("mixtral"),
        rows,
        power=2.0,
        label_smoothing=smoothing,
        auxiliary=lambda model: (
            model.config.router_aux_loss_coef * sum(model(**batch).aux_loss for batch in batches) / len(batches)
        ),
    )
    steps = temporal(
        tiny_model("mixtral"), rows, tmp_path, batch_size=batch_size, temporal_power=2.0,
        label_smoothing_factor=smoothing, temporal_fused_head=fused,
    )  # fmt: skip
    assert steps.loss == pytest.approx(expected.loss, rel=2e-6)
    assert distance(steps.gradients[0], expected.gradients) < 2e-5


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_loss_and_gradients_are_those_written_by_hand(
    name: str, power: float, normalization: str, origin: str, tmp_path: Path
) -> None:
    model, rows = tiny_model(name), examples(name)
    options: dict[str, Any] = {
        "batch_size": 3,
        "temporal_power": power,
        "temporal_normalization": normalization,
        "temporal_origin": origin,
        "temporal_fused_head": "on" if origin == "target" else "off",
    }
    if normalization == "tokens" and power == math.inf:
        with pytest.raises(ValueError, match=r"power=inf"):
            temporal(model, rows, tmp_path, **options)
        return
    expected = reference(model, rows, power=power, normalization=normalization, origin=origin)
    steps = temporal(model, rows, tmp_path, **options)
    assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
    assert steps.grad_norm == pytest.approx(expected.grad_norm, rel=3e-5)
    assert distance(steps.gradients[0], expected.gradients) < 3e-5


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_weights_of_the_data_set_multiply_those_of_time(name: str, normalization: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows: list[Any] = [
        {**row, "loss_weights": (2 * torch.rand(len(row["labels"]), generator=generator)).tolist()}
        for row in examples(name)
    ]
    expected = reference(tiny_model(name), rows, power=2.0, normalization=normalization)
    assert expected.loss != pytest.approx(
        reference(tiny_model(name), examples(name), power=2.0, normalization=normalization).loss, rel=1e-3
    )
    for fused in ("on", "off"):
        steps = temporal(
            tiny_model(name), rows, tmp_path, batch_size=3, temporal_power=2.0,
            temporal_normalization=normalization, temporal_fused_head=fused,
        )  # fmt: skip
        assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
        assert distance(steps.gradients[0], expected.gradients) < 3e-5


def test_a_shape_of_ones_own_is_used(tmp_path: Path) -> None:
    def square_by_hand(t: Tensor, last: Tensor) -> Tensor:
        return 5.0 * (t / last).square()

    weighting = TemporalWeighting(weight_fn=square_by_hand)
    expected = reference(tiny_model("llama"), examples("llama"), power=2.0)
    steps = train(
        TemporalWeightTrainer, TrainingArguments, tiny_model("llama"), examples("llama"), tmp_path, batch_size=3,
        trainer_arguments={"weighting": weighting},
    )  # fmt: skip
    assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
    assert distance(steps.gradients[0], expected.gradients) < 3e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_weighting_may_stand_in_the_arguments_or_beside_plain_ones(name: str, tmp_path: Path) -> None:
    weighting = TemporalWeighting(power=3.0, origin="sequence", normalization="batch")
    fields = temporal(
        tiny_model(name), examples(name), tmp_path, temporal_power=3.0, temporal_origin="sequence",
        temporal_normalization="batch",
    )  # fmt: skip
    beside = train(
        TemporalWeightTrainer, TrainingArguments, tiny_model(name), examples(name), tmp_path,
        trainer_arguments={"weighting": weighting},
    )  # fmt: skip
    first = train(
        TemporalWeightTrainer, TemporalTrainingArguments, tiny_model(name), examples(name), tmp_path,
        temporal_power=-7.0, trainer_arguments={"weighting": weighting},
    )  # fmt: skip
    default = train(TemporalWeightTrainer, TrainingArguments, tiny_model(name), examples(name), tmp_path)
    expected = reference(tiny_model(name), examples(name), power=3.0, normalization="batch", origin="sequence")
    for steps in (fields, beside, first):
        assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
    assert default.loss == pytest.approx(reference(tiny_model(name), examples(name), power=1.0).loss, rel=3e-6)


def test_the_mixin_goes_in_front_of_another_trainer(tmp_path: Path) -> None:
    class Other(Trainer):
        seen = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            Other.seen += 1
            return super().training_step(*args, **kwargs)

    class Both(TemporalWeightMixin, Other):
        pass

    expected = reference(tiny_model("llama"), examples("llama"), power=2.0)
    steps = train(
        Both, TemporalTrainingArguments, tiny_model("llama"), examples("llama"), tmp_path, batch_size=4,
        temporal_power=2.0,
    )  # fmt: skip
    assert Other.seen == 2
    assert steps.loss == pytest.approx(expected.loss, rel=3e-6)


def test_batches_of_a_loader_of_ones_own_are_weighted(tmp_path: Path) -> None:
    class OwnLoader(TemporalWeightTrainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            rows: Any = self.train_dataset
            return DataLoader(rows, batch_size=3, collate_fn=PadCollator())

    expected = reference(tiny_model("llama"), examples("llama"), power=2.0)
    steps = train(
        OwnLoader, TemporalTrainingArguments, tiny_model("llama"), examples("llama"), tmp_path, batch_size=3,
        temporal_power=2.0,
    )  # fmt: skip
    assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
    assert distance(steps.gradients[0], expected.gradients) < 3e-5


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "bart"])
def test_no_target_anywhere_gives_zero_and_moves_nothing(name: str, fused: str, tmp_path: Path) -> None:
    rows = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in examples(name)]
    model = tiny_model(name, router_aux_loss_coef=0.0)
    steps = temporal(model, rows, tmp_path, batch_size=4, temporal_power=2.0, temporal_fused_head=fused)
    assert steps.loss == 0.0
    assert steps.grad_norm == 0.0
    assert all(value.abs().max() == 0 for value in steps.update.values())


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_micro_batch_without_targets_changes_nothing(name: str, fused: str, tmp_path: Path) -> None:
    rows = examples(name)
    empty = [{**row, "labels": [IGNORE] * len(row["labels"])} for row in examples(name, 2, seed=5)]
    expected = reference(tiny_model(name), rows, power=2.0)
    for normalization in ("sequence", "batch"):
        expected = reference(tiny_model(name), rows, power=2.0, normalization=normalization)
        steps = temporal(
            tiny_model(name), [*rows[:4], *empty, *rows[4:]], tmp_path, batch_size=2, temporal_power=2.0,
            temporal_fused_head=fused, temporal_normalization=normalization,
        )  # fmt: skip
        assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
        assert distance(steps.gradients[0], expected.gradients) < 3e-5


OPTIONS: list[dict[str, Any]] = [
    {"train_sampling_strategy": "group_by_length"},
    {"train_sampling_strategy": "random", "dataloader_num_workers": 1},
    {"include_num_input_tokens_seen": "all"},
    {"optim": "adamw_torch", "max_grad_norm": 1.0},
]


@pytest.mark.parametrize(
    ("name", "fused", "option"),
    [("llama", fused, option) for option in OPTIONS for fused in ("on", "off")]
    + [("t5", "on", option) for option in OPTIONS],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_options_of_the_trainer_change_neither_loss_nor_gradient(
    name: str, fused: str, option: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name)
    expected = reference(model, examples(name), power=2.0)
    steps = temporal(
        model, examples(name), tmp_path, batch_size=4, temporal_power=2.0, temporal_fused_head=fused, **option
    )
    assert steps.loss == pytest.approx(expected.loss, rel=3e-6)
    scale = min(1.0, 1.0 / expected.grad_norm) if option.get("max_grad_norm") else 1.0
    clipped = {key: value * scale for key, value in expected.gradients.items()}
    assert distance(steps.gradients[0], clipped) < 3e-5


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("name", ["gemma2", "bart"])
def test_bf16_is_as_close_to_float64_as_stock_is(name: str, fused: str, tmp_path: Path) -> None:
    rows, model = examples(name), tiny_model(name)
    plain = reference(model, rows)
    stock_steps = stock(model, rows, tmp_path, bf16=True)
    stock_error = distance(stock_steps.gradients[0], plain.gradients)
    for power in (0.0, 2.0):
        expected = reference(model, rows, power=power)
        steps = temporal(model, rows, tmp_path, bf16=True, temporal_power=power, temporal_fused_head=fused)
        assert steps.loss == pytest.approx(expected.loss, rel=0.01)
        assert distance(steps.gradients[0], expected.gradients) < 2.0 * stock_error


@pytest.mark.parametrize("name", ["t5", "bart", "encoder_decoder"])
def test_generation_sees_only_what_it_knows(name: str, tmp_path: Path) -> None:
    rows: list[Any] = [{**row, "loss_weights": [1.0] * len(row["labels"])} for row in examples(name)]
    results = {}
    stock_and_ours: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (Seq2SeqTrainer, Seq2SeqTrainingArguments, examples(name), {}),
        (TemporalWeightSeq2SeqTrainer, TemporalSeq2SeqTrainingArguments, rows, {"temporal_power": 2.0}),
    ]
    for trainer_class, arguments_class, data, extra in stock_and_ours:
        trainer = trainer_class(
            model=tiny_model(name),
            args=arguments_class(
                output_dir=str(tmp_path), per_device_eval_batch_size=3, predict_with_generate=True, use_cpu=True,
                generation_max_length=6, report_to="none", disable_tqdm=True, **extra,
            ),
            eval_dataset=data,
            data_collator=PadCollator(),
            compute_metrics=lambda prediction: {"sum": float(prediction.predictions.clip(min=0).sum())},
        )  # fmt: skip
        results[trainer_class] = trainer.evaluate()
    ours, theirs = results[TemporalWeightSeq2SeqTrainer], results[Seq2SeqTrainer]
    assert ours["eval_sum"] == theirs["eval_sum"]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert ours["eval_temporal_loss"] == pytest.approx(reference(tiny_model(name), examples(name), power=2.0).loss)


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bart"])
def test_evaluation_gives_stock_values_at_any_power_and_its_own_beside_them(name: str, tmp_path: Path) -> None:
    rows = examples(name, 7)
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path), "per_device_eval_batch_size": 3, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    expected = Trainer(
        tiny_model(name), TrainingArguments(**settings), eval_dataset=rows, data_collator=PadCollator()
    ).evaluate()
    got = TemporalWeightTrainer(
        tiny_model(name), TemporalTrainingArguments(**settings, temporal_power=2.0, temporal_fused_head="on"),
        eval_dataset=rows, data_collator=PadCollator(),
    ).evaluate()  # fmt: skip
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert got["eval_temporal_loss"] == pytest.approx(reference(tiny_model(name), rows, power=2.0).loss, rel=1e-5)
    assert set(expected) < set(got)

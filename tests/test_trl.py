"""TRL's `SFTTrainer` with the mixin in front: its own numbers at p = 0, its metrics at any p, exact losses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightMixin, TemporalWeightTrainer
from hf_temporal.padding_free import use_padding_free
from tests.tiny_models import VOCABULARY, causal_examples, tiny_model

trl = pytest.importorskip("trl", minversion="1.16.0")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from hf_temporal.trl import TemporalSFTConfig, TemporalWeightSFTTrainer  # noqa: E402
from tests.test_mixin import ROWS, TWO_STEPS, reference  # noqa: E402
from tests.test_mixin import run as run_plain  # noqa: E402
from tests.tiny_training import distance  # noqa: E402

METRICS = ("entropy", "mean_token_accuracy", "num_tokens")
PROMPTS = [
    {"prompt": "w5 w6 w7", "completion": " ".join(f"w{9 + (i * 7 + k) % 80}" for k in range(3 + i % 4))}
    for i in range(8)
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def run(kind: Any, config: Any, folder: Path, *, rows: Any = ROWS, model: Any = "llama", **kwargs: Any) -> Any:
    own = {key: kwargs.pop(key) for key in ("weighting", "peft_config", "compute_loss_func") if key in kwargs}
    settings = {
        **TWO_STEPS,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        **kwargs,
    }
    torch.manual_seed(0)
    trainer = kind(
        model=tiny_model(model) if isinstance(model, str) else model,
        args=config(str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]),
        processing_class=tokenizer(),
        **own,
    )
    trainer.train()
    return trainer


def numbers(trainer: Any) -> dict[str, float]:
    """Everything logged but times, by step."""
    return {
        f"{index} {key}": value
        for index, entry in enumerate(trainer.state.log_history)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not any(word in key for word in ("runtime", "second", "flos"))
    }


def first(trainer: Any) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


pytestmark = pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
CASES: list[dict[str, Any]] = [
    {},
    {"rows": PROMPTS},
    {"rows": PROMPTS, "packing": True, "max_length": 16},
    {"rows": PROMPTS, "packing": True, "max_length": 16, "packing_strategy": "bfd_split"},
    {"rows": PROMPTS, "packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    {"rows": PROMPTS, "padding_free": True, "max_length": None},
    {"label_smoothing_factor": 0.1},
    {"loss_type": "dft"},
    {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)},
    {"model": "mixtral", "router_aux_loss_coef": 0.3, "gradient_accumulation_steps": 1},
    {"model": "gemma2"},
]


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values()))[:40] if case else "plain")
def test_every_number_is_its_own_at_0(case: dict[str, Any], fused: str, tmp_path: Path) -> None:
    stock = numbers(run(trl.SFTTrainer, trl.SFTConfig, tmp_path, **case))
    ours = numbers(
        run(
            TemporalWeightSFTTrainer,
            TemporalSFTConfig,
            tmp_path,
            temporal_power=0.0,
            temporal_fused_head=fused,
            **case,
        )
    )
    assert {key: ours.get(key) for key in stock} == pytest.approx(stock, rel=2e-5, abs=1e-6)
    assert any("entropy" in key for key in stock)


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("power", [2.0, math.inf])
def test_weighted_loss_and_unweighted_metrics(power: float, fused: str, tmp_path: Path) -> None:
    ours = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, temporal_power=power, temporal_fused_head=fused)
    stock = run(trl.SFTTrainer, trl.SFTConfig, tmp_path)
    if power == 2.0:
        assert first(ours)["loss"] == pytest.approx(reference(power), rel=1e-6)
    assert {key: first(ours)[key] for key in METRICS} == pytest.approx({key: first(stock)[key] for key in METRICS})
    assert first(ours)["temporal_power"] == power
    evaluations = [entry for entry in ours.state.log_history if "eval_loss" in entry]
    assert "eval_head_loss" in evaluations[0]


@pytest.mark.parametrize("case", CASES[1:6], ids=lambda case: " ".join(map(str, case.values()))[9:60])
def test_packing_does_not_change_a_weighted_step(case: dict[str, Any], tmp_path: Path) -> None:
    """All rows in one step; only "wrapped" cuts documents."""
    config = {"temporal_power": 2.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    losses = [
        first(run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, **{**each, **config, "max_steps": 1}))["loss"]
        for each in (CASES[1], case)
    ]
    assert (losses[1] == pytest.approx(losses[0], rel=1e-6)) is (case.get("packing_strategy") != "wrapped")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_free_batches_without_flash_attention(checkpointing: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert use_padding_free(model)
    config = {
        "temporal_power": 2.0, "max_length": None, "per_device_train_batch_size": 4, "max_steps": 3,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    padded = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, **config)
    packed = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, model=model, padding_free=True, **config)
    expected = {key: value for key, value in numbers(padded).items() if "num_tokens" not in key}
    assert {key: numbers(packed)[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert first(packed)["loss"] == pytest.approx(reference(2.0), rel=1e-6)
    assert distance(packed.model.state_dict(), padded.model.state_dict()) < 1e-5


def test_what_all_rows_begin_with_is_computed_once(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert use_padding_free(model)
    rows = [{"input_ids": [*range(5, 17), *row["input_ids"]], "labels": [-100] * 12 + row["labels"]} for row in ROWS]
    config: dict[str, Any] = {
        "temporal_power": 2.0,
        "max_length": None,
        "gradient_accumulation_steps": 1,
        "rows": rows,
    }
    config["eval_strategy"] = "no"
    padded = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, **config)
    widths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    packed = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, model=model, padding_free=True, **config)
    assert distance(packed.model.state_dict(), padded.model.state_dict()) < 1e-5
    size = packed.args.per_device_train_batch_size
    tokens = sum(len(row["input_ids"]) for row in rows[:size])
    assert tokens - 12 * (size - 1) in widths
    assert tokens not in widths


def test_a_plain_class_with_the_mixin_and_a_plain_config(tmp_path: Path) -> None:
    class Weighted(TemporalWeightMixin, trl.SFTTrainer): ...  # type: ignore[name-defined]

    ours = run(Weighted, trl.SFTConfig, tmp_path, weighting=TemporalWeighting(2.0))
    assert first(ours)["loss"] == pytest.approx(reference(2.0), rel=1e-6)


@pytest.mark.parametrize("fused", ["on", "off"])
def test_label_smoothing_of_the_weighted_loss(fused: str, tmp_path: Path) -> None:
    smoothing: dict[str, Any] = {"label_smoothing_factor": 0.1}
    config = {"temporal_power": 2.0, "temporal_fused_head": fused, **smoothing}
    ours = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, **config)
    (plain, _) = run_plain(TemporalWeightTrainer, tmp_path, power=2.0, args=smoothing)
    assert first(ours)["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert plain["loss"] != pytest.approx(reference(2.0), rel=1e-4)


def test_an_auxiliary_loss_stays_the_trainers(tmp_path: Path) -> None:
    case = CASES[9]
    stock = run(trl.SFTTrainer, trl.SFTConfig, tmp_path, **case)
    ours = [
        first(run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, temporal_power=power, **case))
        for power in (0.0, 2.0)
    ]
    assert ours[1]["aux_loss"] == pytest.approx(first(stock)["aux_loss"])
    assert ours[1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-4)


def test_dft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type='dft' of TemporalWeightSFTTrainer"):
        run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, loss_type="dft")


def test_one_forward_per_evaluation_batch(tmp_path: Path) -> None:
    trainer = run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, per_device_eval_batch_size=3)
    calls: list[Any] = []
    trainer.model.register_forward_hook(lambda *call: calls.append(call))
    metrics = trainer.evaluate()
    assert len(calls) == 1
    assert metrics["eval_head_loss"] > 0


# ---- loss_weights


def with_weights() -> list[dict[str, Any]]:
    return [
        {**row, "loss_weights": [float(1 + (i * 7 + j) % 5) for j in range(len(row["labels"]))]}
        for i, row in enumerate(ROWS)
    ]


def test_loss_weights_go_through_its_collator(tmp_path: Path) -> None:
    plain: Any = {"weighting": TemporalWeighting(0.0), "max_steps": 1, "eval_strategy": "no"}
    ours = first(run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, rows=with_weights(), **plain))["loss"]
    model: Any = tiny_model("llama").double().eval()
    total = weight_sum = 0.0
    for row in with_weights()[:4]:
        labels = torch.tensor(row["labels"])[1:]
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for place, label in enumerate(labels.tolist()):
            if label != -100:
                total -= row["loss_weights"][place + 1] * float(log_p[place, label].detach())
                weight_sum += row["loss_weights"][place + 1]
    assert ours == pytest.approx(total / weight_sum, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "case", "message"),
    [
        (with_weights(), {"packing": True, "max_length": 16}, "packing=True beside a loss_weights column"),
        (with_weights(), {"padding_free": True, "max_length": None}, "padding_free=True beside a loss_weights"),
        ([{**row, "loss_weights": [1.0]} for row in PROMPTS], {}, "text that SFTTrainer tokenizes"),
    ],
)
def test_loss_weights_that_would_be_lost(rows: Any, case: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(TemporalWeightSFTTrainer, TemporalSFTConfig, tmp_path, rows=rows, **case)


# ---- arguments


def test_temporal_training_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"args is a TemporalTrainingArguments.*hf_temporal\.trl\.TemporalSFTConfig"):
        TemporalWeightSFTTrainer(
            model=tiny_model("llama"), args=TemporalTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(causal_examples(2)), processing_class=tokenizer(),
        )  # fmt: skip


@dataclasses.dataclass(repr=False)
class OursFirst(TemporalTrainingArguments, trl.SFTConfig): ...  # type: ignore[name-defined]


@dataclasses.dataclass(repr=False)
class TheirsFirst(trl.SFTConfig, TemporalTrainingArguments): ...  # type: ignore[name-defined]


class Undecorated(TemporalTrainingArguments, trl.SFTConfig): ...  # type: ignore[name-defined]


@pytest.mark.parametrize("kind", [OursFirst, TheirsFirst, TemporalSFTConfig])
def test_the_defaults_of_sft_config_stay(kind: Any, tmp_path: Path) -> None:
    theirs, ours = (each(str(tmp_path), use_cpu=True, bf16=False) for each in (trl.SFTConfig, kind))
    names = [each.name for each in dataclasses.fields(theirs)]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.temporal_power == 1.0
    assert kind(str(tmp_path), use_cpu=True, bf16=False, learning_rate=1.0).learning_rate == 1.0


def test_an_undecorated_class_of_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Undecorated lacks the fields .*accepted: the class with @dataclass"):
        Undecorated(str(tmp_path), use_cpu=True)

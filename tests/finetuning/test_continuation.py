"""What makes a run another one: every training argument but those that do not change what is trained."""

from __future__ import annotations

import json
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hf_temporal import TemporalTrainingArguments
from hf_temporal.finetuning.continuation import FREE_ARGUMENTS, SETTINGS_NAME, continue_run
from hf_temporal.training_args import TemporalFields, TemporalSeq2SeqTrainingArguments

DECIDING: dict[str, Any] = {
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "average_tokens_across_devices": False,
    "data_seed": 3,
    "dataloader_drop_last": True,
    "gradient_accumulation_steps": 2,  # more examples in a step
    "label_smoothing_factor": 0.1,
    "lr_scheduler_kwargs": {"num_cycles": 3},
    "neftune_noise_alpha": 5.0,
    "num_train_epochs": 4.0,
    "optim_args": "rank=2",
    "temporal_mixture": 0.5,
    "temporal_normalization": "tokens",
    "temporal_power": float("inf"),
    "temporal_power_schedule": "cosine",
    "train_sampling_strategy": "sequential",
}
FREE: dict[str, Any] = {
    "dataloader_num_workers": 1,
    "ddp_timeout": 60,
    "do_eval": True,
    "eval_steps": 3,
    "gradient_checkpointing": True,
    "logging_steps": 7,
    "push_to_hub": True,
    "report_to": ["tensorboard"],
    "run_name": "other",
    "save_steps": 9,
    "temporal_fused_head": "off",
}


def arguments(folder: Path, **given: Any) -> TemporalTrainingArguments:
    given.setdefault("report_to", "none")
    return TemporalTrainingArguments(str(folder), per_device_train_batch_size=2, use_cpu=True, **given)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint in it."""
    continue_run(arguments(tmp_path), {"task": "copying"})
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    state = {"global_step": 1, "max_steps": 2, "best_model_checkpoint": None}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "model-none.bin").touch()
    return tmp_path


@pytest.fixture(autouse=True)
def _checkpoints_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_temporal.finetuning.continuation.check_checkpoint", lambda *_, **__: None)


@pytest.mark.parametrize("name", DECIDING)
def test_another_training_is_another_run(name: str, begun: Path) -> None:
    shown = "examples_per_step" if name == "gradient_accumulation_steps" else name
    with pytest.raises(ValueError, match=f"^{shown}=.*, but output_dir=.* holds a run with {shown}="):
        continue_run(arguments(begun, **{name: DECIDING[name]}), {"task": "copying"})


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_change_the_training_may_change(name: str, begun: Path) -> None:
    found = continue_run(arguments(begun, **{name: FREE[name]}), {"task": "copying"})
    assert found.checkpoint == str(begun / "checkpoint-1")


def test_the_same_examples_in_a_step_are_the_same_run(begun: Path) -> None:
    args = arguments(begun, gradient_accumulation_steps=2)
    args.per_device_train_batch_size = 1
    assert continue_run(args, {"task": "copying"}).checkpoint


def test_a_run_of_an_earlier_version_goes_on(begun: Path) -> None:
    """It has fewer settings; those that it has still count."""
    path = begun / SETTINGS_NAME
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name in ("task", "learning_rate")}
    path.write_text(json.dumps(kept))
    assert continue_run(arguments(begun, adam_beta2=0.9), {"task": "copying", "new": 1}).checkpoint
    with pytest.raises(ValueError, match=r"learning_rate=0\.1, but"):
        continue_run(arguments(begun, learning_rate=0.1), {"task": "copying"})


def test_the_free_arguments_are_there() -> None:
    names = [each.name for each in fields(TemporalSeq2SeqTrainingArguments)]
    free = {name for name in names if any(fnmatch(name, pattern) for pattern in FREE_ARGUMENTS)}
    assert free & {each.name for each in fields(TemporalFields)} == {"temporal_fused_head"}
    assert free.isdisjoint(DECIDING.keys() - {"gradient_accumulation_steps"})
    assert free >= FREE.keys()

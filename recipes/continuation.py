"""Going on with a run that was interrupted: what `output_dir` holds, and whether it is the same run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

SETTINGS_NAME = "run.json"
TRAINER_STATE_NAME = "trainer_state.json"
TRAINING_SETTINGS = (
    "bf16",
    "data_seed",
    "fp16",
    "label_smoothing_factor",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "optim",
    "seed",
    "temporal_normalization",
    "temporal_origin",
    "temporal_power",
    "temporal_power_schedule",
    "temporal_power_start",
    "temporal_power_warmup_ratio",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)


@dataclass(frozen=True)
class Continuation:
    """Where a run goes on: its last complete checkpoint, if there is one, and whether training ended there."""

    checkpoint: str | None
    finished: bool


def continue_run(training_args: TrainingArguments, settings: dict[str, Any]) -> Continuation:
    """Find the last complete checkpoint in `output_dir`, or prepare the folder for a new run.

    `settings` are what makes a run the same one, beside the `TRAINING_SETTINGS` of its arguments.

    Raises ValueError where the checkpoints there belong to a run with other settings.
    """
    if training_args.resume_from_checkpoint:
        return Continuation(training_args.resume_from_checkpoint, finished=False)
    output_dir = Path(training_args.output_dir or ".")
    settings = json.loads(json.dumps(settings | _training_settings(training_args)))
    with training_args.main_process_first():
        states = _complete_checkpoints(output_dir)
        if states:
            _check_settings(output_dir, settings)
        elif training_args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if not states:
        return Continuation(None, finished=False)
    checkpoint, state = max(states.items(), key=lambda item: item[1]["global_step"])
    step, last_step = state["global_step"], state["max_steps"]
    finished = step >= last_step
    if finished and training_args.load_best_model_at_end and state["best_model_checkpoint"]:
        checkpoint = state["best_model_checkpoint"]
    what = "is not trained again; another output_dir starts anew" if finished else "goes on from there"
    logger.warning(f"output_dir={str(output_dir)!r} holds step {step} of {last_step} of this run, which {what}.")
    return Continuation(str(checkpoint), finished)


def _training_settings(training_args: TrainingArguments) -> dict[str, Any]:
    examples = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    settings = {name: getattr(training_args, name) for name in TRAINING_SETTINGS}
    return settings | {"examples_per_step": examples * training_args.world_size}


def _complete_checkpoints(output_dir: Path) -> dict[Path, dict[str, Any]]:
    """The trainer's state in each checkpoint; it is written last, so one that can be read ends a whole checkpoint."""
    states = {path.parent: _read_state(path) for path in output_dir.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")}
    return {checkpoint: state for checkpoint, state in states.items() if state is not None}


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning(f"{path.parent} was not written to its end and is left out.")
        return None
    return state


def _check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    path = output_dir / SETTINGS_NAME
    if not path.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} holds checkpoints of something else; accepted: a new folder")
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but output_dir={str(output_dir)!r} holds a run with {name}={found.get(name)!r}; "
                "accepted: the same settings, which continue that run, or another output_dir"
            )

"""Going on with a run that was interrupted: what `output_dir` holds, and whether it is the same run."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from recipes.checkpoints import CHECKSUMS_NAME, check_checkpoint
from recipes.report import write_json

logger = logging.get_logger(__name__)

LAST_GOOD = "last_good"
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
    """Find the last checkpoint in `output_dir` that was written to its end, or prepare the folder for a new run.

    `settings` are what makes a run the same one, beside the `TRAINING_SETTINGS` of its arguments.

    Where `resume_from_checkpoint` is "last_good", checkpoints that are damaged are set aside, under another name, and
    the one before them is found. Any other value of it is the checkpoint.

    Raises ValueError where the checkpoints there belong to a run with other settings, and where the one to go on from,
    with "last_good" every one, is damaged: see `recipes.checkpoints.check_checkpoint`.
    """
    asked, output_dir = training_args.resume_from_checkpoint, Path(training_args.output_dir or ".")
    if asked and asked != LAST_GOOD:
        _check(Path(asked), training_args)
        return Continuation(asked, finished=False)
    settings = json.loads(json.dumps(settings | _training_settings(training_args)))
    with training_args.main_process_first():
        newest_first = _complete_checkpoints(output_dir)
        if newest_first:
            _check_settings(output_dir, settings)
        elif training_args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / SETTINGS_NAME, settings)
        if asked:
            newest_first = _without_damaged(newest_first, training_args)
    if not newest_first:
        return Continuation(None, finished=False)
    checkpoint = newest_first[0]
    if not asked:
        _check(checkpoint, training_args)
    state = _read_state(checkpoint)
    step, last_step = state["global_step"], state["max_steps"]
    finished = step >= last_step
    if finished and training_args.load_best_model_at_end and state["best_model_checkpoint"]:
        checkpoint = Path(state["best_model_checkpoint"])
        _check(checkpoint, training_args)
    what = "is not trained again; another output_dir starts anew" if finished else "goes on from there"
    logger.warning(f"output_dir={str(output_dir)!r} holds step {step} of {last_step} of this run, which {what}.")
    return Continuation(str(checkpoint), finished)


def _damage_of(checkpoint: Path, training_args: TrainingArguments) -> str | None:
    try:
        check_checkpoint(checkpoint, with_optimizer=not training_args.save_only_model)
    except ValueError as error:
        return str(error)
    return None


def _check(checkpoint: Path, training_args: TrainingArguments) -> None:
    if damage := _damage_of(checkpoint, training_args):
        raise ValueError(
            f"{damage}; accepted: --resume_from_checkpoint {LAST_GOOD}, which goes on from the last checkpoint in "
            "output_dir that is whole, or the folder of another checkpoint in its place"
        )


def _without_damaged(newest_first: list[Path], training_args: TrainingArguments) -> list[Path]:
    """The checkpoints from the first on that is whole; those before it get names that no one takes for a checkpoint's.

    A folder that stayed would be written into when its step comes again, and a run that dies there would leave a
    checkpoint of new and old files.
    """
    damages: dict[Path, str] = {}
    for checkpoint in newest_first:
        damage = _damage_of(checkpoint, training_args)
        if damage is None:
            break
        damages[checkpoint] = damage
    if damages and len(damages) == len(newest_first):
        raise ValueError(
            f"resume_from_checkpoint={LAST_GOOD!r}: no checkpoint is whole: {'; '.join(damages.values())}; accepted: "
            "another output_dir, which starts anew"
        )
    for checkpoint, damage in damages.items():
        logger.warning(f"{damage}; {checkpoint.name} is set aside.")
        if training_args.should_save:
            names = (f"damaged-{checkpoint.name}{f'-{count}' if count else ''}" for count in itertools.count())
            checkpoint.rename(next(path for name in names if not (path := checkpoint.with_name(name)).exists()))
    return newest_first[len(damages) :]


def _training_settings(training_args: TrainingArguments) -> dict[str, Any]:
    examples = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    settings = {"train_sampling_strategy": "random"}  # of transformers before 5.2, which has no other
    settings |= {name: getattr(training_args, name) for name in TRAINING_SETTINGS if hasattr(training_args, name)}
    return settings | {"examples_per_step": examples * training_args.world_size}


def _complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that were written to their end, the newest first."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_complete(path)
    }
    return [found[step] for step in sorted(found, reverse=True)]


def _is_complete(checkpoint: Path) -> bool:
    """Whether there is what is written last: the trainer's state to its end, or the checksums behind it."""
    if (checkpoint / CHECKSUMS_NAME).is_file():
        return True
    try:
        return "global_step" in _read_state(checkpoint)
    except (OSError, TypeError, ValueError):
        logger.warning(f"{checkpoint} was not written to its end and is left out.")
        return False


def _read_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
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

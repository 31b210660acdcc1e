"""Resuming a run that was interrupted: which checkpoints are there, whether they are whole, and of the same run."""

import itertools
import json
import zipfile
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_temporal.tables import write_json

logger = logging.get_logger(__name__)

LAST_GOOD = "last_good"
SETTINGS_NAME = "run.json"
TRAINER_STATE_NAME = "trainer_state.json"
CHECKSUMS_NAME = "checksums.json"
ARCHIVES = (".pt", ".pth", ".bin")  # of torch.save: zip files, with a checksum of each of their parts
# DeepSpeed keeps weights and optimizer in one folder
WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*")
OPTIMIZER = ("optimizer.*", "optimizer_*", "global_step*")
CHUNK = 1 << 20
# Patterns of the training arguments that do not change what is trained; every other one makes a run another one.
FREE_ARGUMENTS = (
    # counted together as `examples_per_step`
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    # logging, evaluation, saving, the Hub
    *("log_level*", "log_on_each_node", "logging_*", "include_num_input_tokens_seen", "disable_tqdm", "debug"),
    *("report_to", "run_name", "project", "trackio_*", "skip_memory_metrics"),
    *("do_train", "do_eval", "do_predict", "eval_*", "per_device_eval_batch_size", "prediction_loss_only"),
    *("bf16_full_eval", "fp16_full_eval", "include_for_metrics", "batch_eval_metrics"),
    *("predict_with_generate", "generation_*", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("output_dir", "save_*", "enable_jit_checkpoint", "push_to_hub", "hub_*"),
    *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    # where and how fast it is computed
    *("use_cpu", "tf32", "torch_compile*", "torch_empty_cache_steps", "full_determinism", "use_cache"),
    *("gradient_checkpointing*", "activation_checkpointing*", "use_liger_kernel", "liger_kernel_config"),
    *("temporal_fused_head", "ddp_*", "fsdp*", "deepspeed", "parallelism_config", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
)


@dataclass(frozen=True)
class Continuation:
    """The checkpoint that a run resumes from, if there is one, and whether training was finished there."""

    checkpoint: str | None
    finished: bool


def continue_run(training_args: TrainingArguments, settings: dict[str, Any]) -> Continuation:
    """Find the last complete checkpoint in `output_dir`, or prepare the folder for a new run.

    Two runs are the same where `settings` and all training arguments but `FREE_ARGUMENTS` are. With
    `resume_from_checkpoint="last_good"`, damaged checkpoints are renamed and the last one before them is taken; any
    other value of it is the checkpoint itself.
    """
    asked, output_dir = training_args.resume_from_checkpoint, Path(training_args.output_dir or ".")
    if asked and asked != LAST_GOOD:
        _check(Path(asked), training_args)
        return Continuation(asked, finished=False)
    settings = dict(settings)
    examples = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    for name, value in training_args.to_dict().items():
        if not any(fnmatch(name, pattern) for pattern in FREE_ARGUMENTS):
            settings[name] = value
    settings["examples_per_step"] = examples * training_args.world_size
    settings = json.loads(json.dumps(settings, default=str))
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


def _check(checkpoint: Path, training_args: TrainingArguments) -> None:
    try:
        check_checkpoint(checkpoint, with_optimizer=not training_args.save_only_model)
    except ValueError as damage:
        raise ValueError(
            f"{damage}; accepted: --resume_from_checkpoint {LAST_GOOD}, which goes on from the last checkpoint in "
            "output_dir that is whole, or the folder of another checkpoint in its place"
        ) from damage


def _without_damaged(newest_first: list[Path], training_args: TrainingArguments) -> list[Path]:
    """Rename the damaged checkpoints that are newer than the last whole one, and return the others.

    A run that dies while it writes into a damaged folder again would leave a mixture of new and old files.
    """
    damages: dict[Path, str] = {}
    for checkpoint in newest_first:
        try:
            check_checkpoint(checkpoint, with_optimizer=not training_args.save_only_model)
            break
        except ValueError as error:
            damages[checkpoint] = str(error)
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


def _complete_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that were written completely, the newest first."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_complete(path)
    }
    return [found[step] for step in sorted(found, reverse=True)]


def _is_complete(checkpoint: Path) -> bool:
    """Whether what is written last is there: the checksums, or else the whole of the trainer's state."""
    if (checkpoint / CHECKSUMS_NAME).is_file():
        return True
    try:
        return "global_step" in _read_state(checkpoint)
    except (OSError, TypeError, ValueError):
        logger.warning(f"{checkpoint} was not written to its end and is left out.")
        return False


def _read_state(checkpoint: Path) -> Any:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def _check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    path = output_dir / SETTINGS_NAME
    if not path.is_file():
        raise ValueError(f"output_dir={str(output_dir)!r} holds checkpoints of something else; accepted: a new folder")
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name in found and found[name] != value:  # a run of an earlier version has fewer settings
            raise ValueError(
                f"{name}={value!r}, but output_dir={str(output_dir)!r} holds a run with {name}={found[name]!r}; "
                "accepted: the same settings, which continue that run, or another output_dir"
            )


def check_checkpoint(checkpoint: Path, *, with_optimizer: bool) -> None:
    """Check that nothing in a checkpoint is missing, cut off or altered.

    JSON is parsed; of safetensors the header and the size that it tells are checked, of the archives of `torch.save`
    every part's checksum. The files that `checksums.json` names are there, with these checksums; without it, a weight
    that was altered in its place goes unnoticed. `with_optimizer` says whether the optimizer's state has to be there,
    which `Trainer` itself does without in silence.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not there")
    for what, patterns in {"weights": WEIGHTS, **({"optimizer": OPTIMIZER} if with_optimizer else {})}.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{checkpoint} holds no {what}; files that would: {', '.join(patterns)}")
    path = checkpoint
    try:
        for path in filter(Path.is_file, sorted(checkpoint.rglob("*"))):
            _read(path)
    except Exception as error:  # what a reader raises at a damaged file is of many kinds
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path} is cut off or altered ({reason})") from error


def _read(path: Path) -> None:
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == CHECKSUMS_NAME:
            _compare(path.parent, content)
        elif path.name.endswith(".index.json"):
            _compare(path.parent, dict.fromkeys(content["weight_map"].values()))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in ARCHIVES:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise ValueError(f"the checksum of {part} does not match")


def _compare(folder: Path, checksums: dict[str, int | None]) -> None:
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise ValueError(f"it names {name}, which is not there")
        if checksum is not None and checksum_of(folder / name) != checksum:
            raise ValueError(f"the checksum of {name} does not match")


def checksum_of(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


class Checksums(TrainerCallback):
    """Puts `checksums.json` last into each checkpoint: every file's CRC-32, null for archives, which have theirs."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del control
        if args.should_save:
            checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            names = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
            names.pop(CHECKSUMS_NAME, None)
            checksums = {name: None if path.suffix in ARCHIVES else checksum_of(path) for name, path in names.items()}
            write_json(checkpoint / CHECKSUMS_NAME, dict(sorted(checksums.items())))

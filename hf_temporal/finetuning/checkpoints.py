"""Checking that a checkpoint is complete and undamaged, by reading every file in it."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .report import write_json

CHECKSUMS_NAME = "checksums.json"
ARCHIVES = (".pt", ".pth", ".bin")  # of torch.save: zip files, with a checksum of each of their parts
# DeepSpeed keeps weights and optimizer in one folder
WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*")
OPTIMIZER = ("optimizer.*", "optimizer_*", "global_step*")
CHUNK = 1 << 20


def check_checkpoint(checkpoint: Path, *, with_optimizer: bool) -> None:
    """Check that nothing in a checkpoint is missing, cut off or altered.

    JSON is parsed; of safetensors the header and the size that it tells are checked, of the archives of `torch.save`
    every part's checksum. The files that `checksums.json` names are there, with these checksums; without it, a weight
    that was altered in its place goes unnoticed.

    Args:
        checkpoint: its folder.
        with_optimizer: whether the optimizer's state has to be there, which `Trainer` itself does without in silence.

    Raises:
        ValueError: something is; the message has the file.
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
    """Puts `checksums.json` into every checkpoint: each file's CRC-32, null for archives, which have their own.

    The file is written last, so a checkpoint that has it is complete.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del control
        if args.should_save:
            checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            names = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
            names.pop(CHECKSUMS_NAME, None)
            checksums = {name: None if path.suffix in ARCHIVES else checksum_of(path) for name, path in names.items()}
            write_json(checkpoint / CHECKSUMS_NAME, dict(sorted(checksums.items())))

"""Runs in processes of their own, each forked where the imports are made, and what goes wrong in them."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerState, modeling_utils

from hf_temporal.memory.functionals import FunctionalDataset
from recipes.laboratory import train_functional

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds that a run has to end by itself
STEPS, SAVE_STEPS, MICRO_BATCH = 6, 2, 2
Fault = Callable[[], None]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def flags(output_dir: Path) -> list[str]:
    """A linear RNN learns a functional: a second for all six steps, a checkpoint every other."""
    return [
        *(
            "--config",
            str(ROOT / "recipes/laboratory/configs/linear_functional.yaml"),
            "--output_dir",
            str(output_dir),
        ),
        *("--length", "12", "--eval_samples", "8", "--config_overrides", "hidden_size=64", "--max_steps", str(STEPS)),
        *(
            "--per_device_train_batch_size",
            str(MICRO_BATCH),
            "--gradient_accumulation_steps",
            "2",
            "--save_steps",
            str(SAVE_STEPS),
        ),
        *("--eval_steps", "2", "--logging_steps", "1", "--save_total_limit", "9", "--report_to", "none", "--use_cpu"),
    ]


@dataclass(frozen=True)
class Run:
    """A run in `folder`; each `start` is the same command once more."""

    folder: Path

    @property
    def log(self) -> str:
        """All that its processes printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, *more: str, fault: Fault | None = None, environment: dict[str, str] | None = None) -> BaseProcess:
        """The process that trains, in which `fault` is prepared."""
        argv = [*flags(self.folder), *more]
        process = CONTEXT.Process(target=_train, args=(argv, self._log, fault, environment or {}))
        process.start()
        return process

    def end(self, *more: str, fault: Fault | None = None) -> int:
        """The exit status of a run, negative for a signal."""
        return status_of(self.start(*more, fault=fault))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those in the model that was saved at the end."""
        return load_file(self.folder / "model.safetensors")

    @property
    def evaluated(self) -> list[int]:
        """The steps of all evaluations."""
        return [each["step"] for each in json.loads((self.folder / "evaluations.json").read_text())["evaluations"]]

    @property
    def complete(self) -> dict[str, dict[str, bytes]]:
        """The files of each checkpoint that was written to its end."""
        states = self.folder.glob("checkpoint-*/checksums.json")
        return {each.parent.name: {path.name: path.read_bytes() for path in each.parent.iterdir()} for each in states}

    def assert_ends_as(self, undisturbed: Run) -> None:
        """Bit for bit the same weights, and no evaluation that is missing."""
        assert self.evaluated == undisturbed.evaluated
        expected = undisturbed.weights
        assert self.weights.keys() == expected.keys()
        assert [name for name, weight in self.weights.items() if not torch.equal(weight, expected[name])] == []


def status_of(process: BaseProcess, limit: float = LIMIT) -> int:
    """The exit status of a process, which has to end in time."""
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a run was still there after {limit} seconds")
    return process.exitcode


def _train(argv: list[str], log: Path, fault: Fault | None, environment: dict[str, str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as it is where nothing sets it
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    train_functional.main(argv)


# ---- faults


@dataclass(frozen=True)
class KilledWhileSaving:
    """SIGKILL in the middle of a checkpoint's file, counted from 0; half of it is then there."""

    file: int

    def __call__(self) -> None:
        """Each function that writes one, as it does, up to that file."""
        count = itertools.count()

        def cut_off(write: Any, path_at: int) -> Any:
            def written(*arguments: Any, **options: Any) -> Any:
                result = write(*arguments, **options)
                path = Path(str(arguments[path_at]))
                if path.parent.name.startswith("checkpoint-") and next(count) == self.file:
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return written

        modeling_utils.safe_save_file = cut_off(safetensors.torch.save_file, 1)
        torch.save = cut_off(torch.save, 1)
        TrainerState.save_to_json = cut_off(TrainerState.save_to_json, 1)  # type: ignore[method-assign]


@dataclass(frozen=True)
class DiskFull:
    """While the checkpoint of a step is saved, no file can become larger than so many bytes."""

    size: int
    step: int = 2 * SAVE_STEPS

    def __call__(self) -> None:
        """A limit of the process, which the kernel keeps as it does a disk's."""
        save = Trainer._save_checkpoint

        def limited(trainer: Trainer, *arguments: Any) -> None:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if trainer.state.global_step == self.step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, before[1]))
            try:
                save(trainer, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        Trainer._save_checkpoint = limited  # type: ignore[assignment,method-assign]


@dataclass(frozen=True)
class NotANumber:
    """One micro-batch holds a NaN, whence its loss is one."""

    micro_batch: int

    def __call__(self) -> None:
        """Counted from 0."""
        step, count = train_functional.FunctionalTrainer.training_step, itertools.count()

        def poisoned(trainer: Any, model: Any, inputs: dict[str, Any], *arguments: Any) -> Tensor:
            if next(count) == self.micro_batch:
                inputs["input_values"][0, 0] = math.nan
            return step(trainer, model, inputs, *arguments)

        train_functional.FunctionalTrainer.training_step = poisoned  # type: ignore[assignment,method-assign]


@dataclass(frozen=True)
class WorkerKilled:
    """SIGKILL for the data worker that makes a micro-batch, counted from 0."""

    micro_batch: int

    def __call__(self) -> None:
        """In the worker alone."""
        make, count = FunctionalDataset.__getitems__, itertools.count()

        def killed(data: FunctionalDataset, indices: Sequence[int]) -> list[dict[str, Tensor]]:
            trains = get_worker_info() is not None and len(indices) == MICRO_BATCH
            if trains and next(count) == self.micro_batch:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(data, indices)

        FunctionalDataset.__getitems__ = killed  # type: ignore[assignment,method-assign]


@dataclass(frozen=True)
class KilledBeforeStep:
    """SIGKILL for one rank when it begins a step, counted from 0."""

    step: int
    rank: int

    def __call__(self) -> None:
        """Before its forward pass."""
        step = train_functional.FunctionalTrainer.training_step

        def killed(trainer: Any, *arguments: Any) -> Tensor:
            if trainer.state.global_step == self.step and trainer.args.process_index == self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer, *arguments)

        train_functional.FunctionalTrainer.training_step = killed  # type: ignore[assignment,method-assign]

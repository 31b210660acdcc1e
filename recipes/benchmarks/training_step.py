r"""A whole optimizer step of SmolLM2-135M in TemporalWeightTrainer, fused head and full logits, against stock Trainer.

    python recipes/benchmarks/training_step.py --output recipes/results/training_step.json

A few seconds, on a toy:

    python recipes/benchmarks/training_step.py --model toy --repeats 2 --length 32 --targets 8

Each trainer lives in a process of its own, so that its peak memory is its own. The processes take their steps in
turn, one at a time and in a rotating order, so that whatever else the machine does meets them alike; a step is timed
from the command to take it to its end: the batch's collation and weights, forward, backward, clipping, optimizer.
Weights are random: the time does not depend on them. "no head" is a step without LM head and loss, the floor of what
any loss can reach. Memory is the process's peak above what it held before its first step, optimizer state and
gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from recipes.benchmarks.report import environment, spread, table, write

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "toy": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 2048, "tie_word_embeddings": True,
    },
}  # fmt: skip
TUNED = ("lora", "full")
TRAINERS = ("stock Trainer", "fused head", "full logits", "no head")
WARMUP = 2
READY = "step:"


class OnCommand(TrainerCallback):
    """Reports the time of each step on stdout and waits on stdin for the command to take the next one."""

    def __init__(self) -> None:
        self.start = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first command."""
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The time since the last command, then the next command."""
        _report(time.perf_counter() - self.start)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit("the process that measures is gone")
        self.start = time.perf_counter()


class HeadlessTrainer(Trainer):
    """What is left of a step without LM head and loss: no trainer can be faster."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean of the hidden states at the target positions."""
        del return_outputs, num_items_in_batch
        backbone: Any = (model.get_base_model() if isinstance(model, PeftModel) else model).model
        return backbone(input_ids=inputs["input_ids"]).last_hidden_state[inputs["labels"] != -100].mean()


def _report(value: float) -> None:
    print(READY, value, flush=True)


def run_child(settings: argparse.Namespace) -> None:
    """Build the model and train it, a step per line on stdin; the last line on stdout is the memory in bytes."""
    torch.set_num_threads(settings.threads)
    set_seed(settings.seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**MODELS[settings.model]))
    if settings.tuned == ["lora"]:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    steps = WARMUP + settings.repeats
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": settings.batch_size,
            "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
            "logging_strategy": "no", "seed": settings.seed,
        }  # fmt: skip
        trainer_class: type[Trainer] = TemporalWeightTrainer
        if settings.trainer in ("stock Trainer", "no head"):
            trainer_class = Trainer if settings.trainer == "stock Trainer" else HeadlessTrainer
            arguments = TrainingArguments(**common)
        else:
            fused = "auto" if settings.trainer == "fused head" else "off"
            arguments = TemporalTrainingArguments(**common, temporal_power=1.0, temporal_fused_head=fused)
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=_rows(settings, steps), data_collator=default_data_collator,
            callbacks=[OnCommand()],
        )  # fmt: skip
        before = _memory()
        trainer.train()
    _report(_peak_memory() - before)


def _memory() -> int:
    """The process's resident size in bytes; its largest so far where the system does not tell the present one."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else _peak_memory()


def _peak_memory() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rows(settings: argparse.Namespace, steps: int) -> Any:
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = MODELS[settings.model]["vocab_size"]
    shape = (steps * settings.batch_size, settings.length)
    ids = torch.randint(vocabulary, shape, generator=generator)
    labels = ids.clone()
    labels[:, : settings.length - settings.targets] = -100
    return [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels, strict=True)]


class Child:
    """A process that trains on command."""

    def __init__(self, settings: argparse.Namespace, tuned: str, trainer: str, errors: IO[bytes]) -> None:
        options = {name: getattr(settings, name) for name in (
            "model", "repeats", "batch_size", "length", "targets", "threads", "seed"
        )}  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in {**options, "tuned": tuned, "trainer": trainer}.items()]
        self.name = f"{trainer}, {tuned}"
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def step(self) -> float:
        """Take one step; its seconds. After the last one: the memory in bytes."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # read() says why the process is gone
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> float:
        """The next figure that the process reports.

        Raises:
            RuntimeError: it ended without one; the message holds what it wrote to stderr.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                return float(line.removeprefix(READY))
        self.errors.seek(0)
        raise RuntimeError(
            f"{self.name} ended early, code {self.process.wait()}:\n{self.errors.read().decode()[-4000:]}"
        )


@contextmanager
def children(settings: argparse.Namespace, tuned: str) -> Iterator[list[Child]]:
    """One process per trainer, ended with the block."""
    with ExitStack() as stack:
        started = []
        for trainer in TRAINERS:
            child = Child(settings, tuned, trainer, stack.enter_context(tempfile.TemporaryFile()))
            stack.callback(child.process.wait)
            stack.callback(child.process.kill)
            started.append(child)
        yield started


def measure(settings: argparse.Namespace, tuned: str) -> list[dict[str, Any]]:
    """Medians, noise and memory of the trainers; ratios are medians of the ratios to stock in the same round."""
    with children(settings, tuned) as workers:
        for _ in range(WARMUP):
            for worker in workers:
                worker.step()
        seconds: list[list[float]] = [[] for _ in workers]
        for repeat in range(settings.repeats):
            for turn in range(len(workers)):
                which = (repeat + turn) % len(workers)
                seconds[which].append(workers[which].step())
        memory = [worker.step() / 2**20 for worker in workers]  # the command after the last step ends the training
    stock = seconds[0]
    return [
        {
            "tuned": tuned,
            "trainer": trainer,
            "seconds": statistics.median(mine),
            "noise": spread(mine),
            "time / stock": statistics.median([a / b for a, b in zip(mine, stock, strict=True)]),
            "MiB": mebibytes,
            "memory / stock": mebibytes / memory[0],
            "all_seconds": mine,
        }
        for trainer, mine, mebibytes in zip(TRAINERS, seconds, memory, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; with `--trainer`, be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--targets", type=int, default=24, help="target tokens per row, the last ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--tuned", choices=TUNED, nargs="+", default=TUNED)
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    if settings.trainer:
        run_child(settings)
        return {}
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "benchmark": "training_step",
        **environment(),
        "settings": {
            name: getattr(settings, name)
            for name in ("model", "repeats", "batch_size", "length", "targets", "threads", "seed")
        },
        "rows": [row for tuned in settings.tuned for row in measure(settings, tuned)],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    print(table(results["rows"], ["tuned", "trainer", "seconds", "noise", "time / stock", "MiB", "memory / stock"]))
    write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

r"""The whole job of fine-tuning on docstrings, part by part, each beside its peer in turns.

    git worktree add /tmp/before 7da344f
    python recipes/benchmarks/whole_job.py --before /tmp/before --output outputs/whole_job.json

takes an hour on two cores. Parts alone, the trainings without an older tree:

    python recipes/benchmarks/whole_job.py --parts training-512 training-112 document --output outputs/training.json

- `training-L`: SmolLM2-135M-Instruct with LoRA learns the same docstrings, cut at L tokens, in batches of 8: by the
  recipe's trainer with padding-free batches; by the same with padded ones, as before there were others; by TRL's
  SFTTrainer, without gradient checkpointing and autocast, with batches of like length; and, as the floor, padding-free
  without LM head and loss. Of 50 batches that are sorted by length, as `group_by_length` does it, those in the middle
  of equal parts are an epoch: SFTTrainer takes them as they are, the others take their rows at random. Each lives in a
  process of its own, and ours takes steps in turn with one peer after the other. A time is an epoch's.
- `document`: one docstring without padding in each batch, padding-free and padded.
- `demo`: the whole command of `make demo`, a seed after the other, with the recipe of this tree and of the older one;
  and its first evaluation, which generates from the untuned model. Metrics are kept.

Memory is a process's largest resident size. Ratios are medians over rounds, and `low` and `high` their extremes.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measured
import torch
from huggingface_hub.utils import tqdm
from measured import Child, in_turn, peak_memory, print_into
from torch import nn
from transformers import TrainerCallback

from hf_temporal.tables import table

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "recipes/configs/summarization/smollm2_lora_docstrings.yaml"
OURS, PADDED, SFT, FLOOR = "padding-free", "padded", "SFTTrainer", "floor"
GROUPED = 50  # batches that the Trainer's sampler sorts by length together
PARTS = ("training-512", "training-112", "document", "demo")
DEMO = ("demo", "its first evaluation")
COLUMNS = ("part", "what", "seconds", "against", "time", "low", "high", "MiB", "memory")
PRELOADED = ["hf_temporal.finetuning.recipe", "hf_temporal.finetuning.trainers", "datasets", "peft"]


# ---- training


class OnCommand(TrainerCallback):
    """Takes a step at each command and answers with its seconds and the largest memory so far."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.connection.recv()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.connection.send((time.perf_counter() - self.start, peak_memory()))


def trainer_of(kind: str, length: int, batch_size: int, steps: int, epochs: int, folder: str) -> Any:
    """A trainer of the demo's model on `steps` batches of docstrings of at most `length` tokens."""
    from step_trainers import HeadlessTrainer

    from hf_temporal._peft import base_model
    from hf_temporal.finetuning.configuration import parse
    from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, prepare_causal_lm
    from hf_temporal.trainer import TemporalWeightTrainer

    own: dict[str, Any] = {
        "max_source_length": length, "per_device_train_batch_size": batch_size, "max_steps": steps * epochs,
        "padding_free": "off" if kind in (PADDED, SFT) else "on", "output_dir": folder, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "warmup_steps": 0, "disable_tqdm": True,
    }  # fmt: skip
    given = [text for name, value in own.items() for text in (f"--{name}", str(value))]
    if kind == SFT:  # which has its memory as its users do
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "as it is"
    run = prepare_causal_lm(parse(CAUSAL_ARGUMENTS, ["--config", CONFIG, *given]))
    drawn = run.splits["train"].shuffle(seed=0).select(range(GROUPED * batch_size))
    lengths = [len(ids) for ids in drawn["input_ids"]]
    by_length = sorted(range(len(drawn)), key=lambda index: lengths[index])
    batches = [by_length[start : start + batch_size] for start in range(0, len(drawn), batch_size)]
    chosen = [index for step in range(steps) for index in batches[(2 * step + 1) * len(batches) // (2 * steps)]]
    rows = drawn.select(chosen)
    how: dict[str, Any] = {"train_dataset": rows, "processing_class": run.tokenizer}
    if kind == SFT:
        trl: Any = importlib.import_module("trl")  # no peer is among what the project needs
        names = ("max_steps", "per_device_train_batch_size", "learning_rate", "report_to", "save_strategy")
        kept = {name: getattr(run.training_args, name) for name in (*names, "logging_strategy", "disable_tqdm")}
        settings = trl.SFTConfig(
            folder,
            **kept,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
        )
        lists = rows.select_columns(["input_ids", "labels"])
        return trl.SFTTrainer(run.model, settings, **how | {"train_dataset": lists})
    if kind == FLOOR:
        base: Any = base_model(run.model)
        base.set_output_embeddings(nn.Identity())
        return HeadlessTrainer(run.model, run.training_args, data_collator=run.data_collator, **how)
    return TemporalWeightTrainer(run.model, run.training_args, data_collator=run.data_collator, **how)


def serve(connection: Connection, job: tuple[str, int, int, int, int], threads: int, log: Path) -> None:
    """Train, a step per command; what is printed goes into a file."""
    print_into(log)
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(*job, folder)
        trainer.add_callback(OnCommand(connection))
        trainer.train()


def training(kinds: Sequence[str], length: int, batch_size: int, settings: Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of each epoch and MiB by trainer."""
    steps, epochs = settings.steps, settings.repeats
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        children = []
        for kind in kinds:
            log = Path(folder) / f"{kind}.log"
            log.touch()
            job = (kind, length, batch_size, steps, epochs)
            child = Child(kind, serve, job, settings.threads, log, preload=PRELOADED, log=log)
            children.append(stack.enter_context(closing(child)))
        answers = in_turn(children, steps * epochs)
    return {
        kind: {
            "rounds": [sum(took for took, _ in mine[start : start + steps]) for start in range(0, len(mine), steps)],
            "MiB": mine[-1][1] / 2**20,
        }
        for kind, mine in zip(kinds, answers, strict=True)
    }


# ---- whole commands


def command(tree: Path, folder: str, *extra: str) -> dict[str, Any]:
    """Seconds, MiB and metrics of the demo's command in a tree."""
    own = ["--config", CONFIG, "--output_dir", folder, *extra]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "recipes/finetune_causal_lm.py", *own]
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(launch, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{tree}: {Path(log.name).read_text(errors='replace')[-4000:]}")
    evaluations = json.loads((Path(folder) / "evaluations.json").read_text(encoding="utf-8"))["evaluations"]
    metrics = [each["metrics"] for each in evaluations]
    return {"seconds": seconds, "MiB": used.ru_maxrss / 2**10, "metrics": metrics}


def commands(settings: Namespace, results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The command in this tree and in the older one, which take turns, a seed after the other; each run is kept."""
    trees = {"now": ROOT, "before": settings.before.resolve()}
    runs = results.setdefault("runs", [])
    for seed in settings.seeds:
        for name in [*trees][:: 1 if seed % 2 else -1]:
            if not any((run["tree"], run["seed"]) == (name, seed) for run in runs):
                with tempfile.TemporaryDirectory() as folder:
                    runs.append({"tree": name, "seed": seed, **command(trees[name], folder, "--seed", str(seed))})
                measured.write(settings.output, results)
    return {name: [run for run in runs if run["tree"] == name and run["seed"] in settings.seeds] for name in trees}


# ---- the table


def compared(part: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of a part, with what was found first in units of the second."""
    (ours, mine), (peer, other) = found.items()
    ratios = [one / two for one, two in zip(mine["rounds"], other["rounds"], strict=True)]
    return {
        "part": part,
        "what": ours,
        "seconds": statistics.median(mine["rounds"]),
        "against": peer,
        "time": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "MiB": mine["MiB"],
        "memory": mine["MiB"] / other["MiB"],
        "all": found,
    }


def measure(part: str, settings: Namespace, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a part."""
    if part == "document":
        return [compared(part, training([OURS, PADDED], 512, 1, settings))]
    if part.startswith("training"):
        length = int(part.partition("-")[2])
        return [compared(part, training([OURS, peer], length, 8, settings)) for peer in (SFT, PADDED, FLOOR)]
    found = commands(settings, results)
    times: list[Callable[[dict[str, Any]], float]] = [
        lambda each: each["seconds"],
        lambda each: each["metrics"][0]["eval_runtime"],
    ]
    return [
        compared(
            what,
            {
                name: {"rounds": [*map(seconds, mine)], "MiB": max(each["MiB"] for each in mine)}
                for name, mine in found.items()
            },
        )
        for what, seconds in zip(DEMO, times, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table; parts that stand in the file already are not measured again."""
    parser = measured.parser_of(__doc__)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.set_defaults(repeats=3)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch, which is trained --repeats times")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of whole commands")
    parser.add_argument("--before", type=Path, help="a checkout of an older tree, for the demo")
    settings = measured.parsed(parser, arguments)
    if "demo" in settings.parts and not settings.before:
        parser.error("--parts demo needs --before; accepted: a checkout of an older commit.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[str, Any] = {**measured.heading("whole_job", settings), "rows": []}
    if settings.output and settings.output.exists():
        kept = json.loads(settings.output.read_text(encoding="utf-8"))
        results |= {"rows": kept["rows"], "runs": kept.get("runs", [])}
    there = {row["part"] for row in results["rows"]} - {"demo"}  # which may have more seeds
    if "demo" in settings.parts:
        results["rows"] = [row for row in results["rows"] if row["part"] not in DEMO]
    for part in tqdm([part for part in settings.parts if part not in there], "Parts", unit="part"):
        results["rows"] += measure(part, settings, results)
        measured.write(settings.output, results)
    print(f"\n{table(results['rows'], COLUMNS)}")


if __name__ == "__main__":
    main()

r"""A whole optimizer step in TemporalWeightTrainer, fused head and full logits, against every peer.

    python recipes/benchmarks/training_step.py --output outputs/training_step.json

is SmolLM2-135M at 8 × 160 tokens. The whole grid, many hours on a CPU, which the same command continues after a stop:

    python recipes/benchmarks/training_step.py --models SmolLM2-135M Qwen3-0.5B T5-base --shapes 8x160 1x4096 \
        --shares 0.05 0.15 1 --dtype float32 bfloat16 --repeats 5 --at_once 3 \
        --output outputs/training_step_grid.json --picture outputs/training_step_grid.png

A minute, on toys:

    python recipes/benchmarks/training_step.py --models toy "toy T5" --shapes 2x32 --repeats 2

The picture of figures that are there, of this script's own file or of a machine's:

    python recipes/benchmarks/training_step.py --redraw recipes/results/benchmarks_avx512.json \
        --picture docs/pictures/training_step.png

The models have random weights, which the time does not depend on. Qwen3-0.5B is Qwen3-0.6B with 22 of its 28 layers.
A share of a row's tokens are targets, the last ones; of a seq2seq model's row, whose tokens are the encoder's, the
decoder has so many tokens, all of them targets. No row is padded, and each trainer has the same.

  stock        `Trainer` at its defaults, of a seq2seq model `Seq2SeqTrainer`: the model's own mean cross-entropy
  by hand      the subclass that users write: full logits, the cross-entropy of each token times its weight, p = 1
  SFTTrainer   TRL's, for decoder-only models, where trl is installed (written for 1.16.0). Its own defaults but three,
               set to Trainer's: no gradient checkpointing, no bf16 autocast, rows not cut at 1,024 tokens. Its loss
               "nll", of which "chunked_nll" is a deprecated name, is computed in tiles, without the logits of all
               tokens; with it come the entropy and the accuracy that it reports, and their waits, at every step
  fused head   ours, p = 1; "full logits" is ours with temporal_fused_head="off"
  no head      a step without LM head and loss, the floor of what any loss can reach

Each trainer lives in a process of its own, so that its peak memory is its own. The processes take their steps in
turn, one at a time and in a rotating order, so that whatever else the machine does meets them alike; a step is timed
from the command to take it to its end: the batch's collation and weights, forward, backward, clipping, optimizer.
Memory is the process's peak above what it held before its first step, optimizer state and gradients included. Ratios
are to stock in the same rounds. `--at_once` is for machines that cannot hold all the trainers of a case: they are
measured in groups of so many, each beside a stock of its own.

Waits are the operations of one more step, not timed, for which the host would wait for an accelerator, counted on the
CPU (see step_waits.py): what a trainer does on a CUDA device alone, as TRL its choice of the target tokens, is not in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from measured import environment, read_rows, spread, table, write
from step_picture import plot_steps
from step_trainers import DTYPES, MODELS, SFT, STOCK, TRAINERS, TUNED, WARMUP, Job, serve, why_not

PRELOADED = ["hf_temporal.trainer", "hf_temporal.plots", "hf_temporal.hub.model_card", "datasets", "peft"]
OUTPUTS = ("output", "picture", "redraw")
CASE = ("model", "tuned", "dtype", "batch × length", "share")
COLUMNS = (
    *CASE, "trainer", "seconds", "noise", "time / stock", "MiB", "memory / stock", "waits per step",
)  # fmt: skip


class Child:
    """A process that trains on command."""

    def __init__(self, job: Job, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # forked where the libraries are imported once
        context.set_forkserver_preload(PRELOADED)
        self.job = job
        self.log = folder / f"{job.trainer}.log"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, job, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Any:
        """Take one step; its seconds. After the last of those that are timed: the memory in bytes."""
        with suppress(ConnectionError):  # receive() says why the process is gone
            self.connection.send(True)
        return self.receive()

    def receive(self) -> Any:
        """The next figure that the process reports.

        Raises:
            RuntimeError: it ended without one, for want of memory perhaps; the message holds what it printed.
        """
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            said = self.log.read_text(encoding="utf-8", errors="replace")[-4000:] if self.log.exists() else ""
            code = self.process.exitcode
            raise RuntimeError(f"{self.job.trainer} ended early, exit code {code}\n{said}") from error

    def end(self) -> None:
        """Stop the process."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


@contextmanager
def children(job: Job, trainers: Sequence[str]) -> Iterator[list[Child]]:
    """One process per trainer, ended with the block."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = []
        for trainer in trainers:
            started.append(Child(replace(job, trainer=trainer), folder))
            stack.callback(started[-1].end)
        yield started


def measure(job: Job, trainers: Sequence[str]) -> list[dict[str, Any]]:
    """Medians, noise, memory and waits of trainers that take turns; ratios where the first of them is stock."""
    with children(job, trainers) as workers:
        for _ in range(WARMUP):
            for worker in workers:
                worker.step()
        seconds: list[list[float]] = [[] for _ in workers]
        for repeat in range(job.repeats):
            for turn in range(len(workers)):
                which = (repeat + turn) % len(workers)
                seconds[which].append(workers[which].step())
        memory, waits = [], []
        for worker in workers:
            memory.append(worker.step() / 2**20)
            waits.append(worker.receive())
    has_stock = trainers[0] == STOCK
    return [
        {
            "trainer": trainer,
            "seconds": statistics.median(mine),
            "noise": spread(mine),
            "time / stock": statistics.median([a / b for a, b in zip(mine, seconds[0], strict=True)])
            if has_stock
            else None,
            "MiB": mebibytes,
            "memory / stock": mebibytes / memory[0] if has_stock else None,
            "waits per step": sum(places.values()),
            "all_seconds": mine,
            "waits": places,
        }
        for trainer, mine, mebibytes, places in zip(trainers, seconds, memory, waits, strict=True)
    ]


def groups(trainers: Sequence[str], at_once: int | None) -> list[list[str]]:
    """The trainers that are measured together, at most `at_once`, with stock, where it is asked for, in each group."""
    first = [trainer for trainer in trainers if trainer == STOCK]
    others = [trainer for trainer in trainers if trainer != STOCK]
    size = max(1, (at_once or len(trainers)) - len(first))
    return [[*first, *others[i : i + size]] for i in range(0, max(1, len(others)), size)]


@dataclass
class Results:
    """The rows of all cases, in a file after each group of trainers, and those that are there already.

    A row is there where one of its case and trainer was made by the same settings, versions and processor; rows of
    others are replaced by what is measured now.
    """

    path: Path | None
    head: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path | None, settings: argparse.Namespace) -> Results:
        """Go on with the file, if there is one."""
        head = {"benchmark": "training_step", **environment()}
        with suppress(PackageNotFoundError):
            head["versions"]["trl"] = version("trl")
        head["settings"] = {name: value for name, value in vars(settings).items() if name not in OUTPUTS}
        rows = []
        if path is not None and path.exists():
            rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if "made" in row]
        return cls(path, head, rows)

    def made(self, trainer: str) -> dict[str, Any]:
        """What a row's figures depend on beside its case."""
        versions = {name: which for name, which in self.head["versions"].items() if name != "trl" or trainer == SFT}
        return {
            **{name: self.head["settings"][name] for name in ("repeats", "threads", "seed")},
            **{name: self.head["hardware"][name] for name in ("processor", "instructions")},
            "versions": versions,
        }

    def of(self, case: dict[str, Any], trainers: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of a case, in the order of the trainers, as far as they are there."""
        mine = {row["trainer"]: row for row in self.rows if {key: row[key] for key in CASE} == case}
        return [mine[each] for each in trainers if each in mine and mine[each]["made"] == self.made(each)]

    def add(self, case: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Take in the rows of a case and write the file."""
        new = [{**case, **row, "made": self.made(row["trainer"])} for row in rows]
        keys = [[row[key] for key in (*CASE, "trainer")] for row in new]
        self.rows = [row for row in self.rows if [row[key] for key in (*CASE, "trainer")] not in keys] + new
        write(self.path, {**self.head, "rows": self.rows})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is not in the file yet, print the table of all cases, draw the picture."""
    parser = _parser()
    settings = parser.parse_args(arguments)
    if settings.redraw and not settings.picture:
        parser.error("--redraw without --picture; accepted: both, or neither.")
    if settings.redraw:
        rows = read_rows(settings.redraw, "training_step")
        plot_steps(rows, settings.picture)
        return {"rows": rows}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or TRL's trainers report to the hub that they are used
    torch.set_num_threads(settings.threads)
    results = Results.read(settings.output, settings)
    shown: list[dict[str, Any]] = []
    failed: list[str] = []
    cases = list(product(settings.models, settings.dtype, settings.tuned, settings.shapes, settings.shares))
    for model, dtype, tuned, shape, share in tqdm(cases, "Training steps", unit="case"):
        size = dict(zip(("batch_size", "length"), shape, strict=True))
        job = Job(model, tuned, dtype, **size, share=share, **_each(settings, "repeats", "threads", "seed"))
        case = dict(zip(CASE, (model, tuned, dtype, "×".join(map(str, shape)), share), strict=True))
        trainers = [trainer for trainer in TRAINERS if trainer in settings.trainers and not why_not(trainer, model)]
        there = {row["trainer"] for row in results.of(case, trainers)}
        for group in groups(trainers, settings.at_once):
            if there.issuperset(group):
                continue
            try:
                rows = measure(job, group)
            except RuntimeError as error:  # a group that the memory cannot hold leaves the others alone
                failed.append(f"{', '.join(map(str, case.values()))}: {error}")
                continue
            results.add(case, [row for row in rows if row["trainer"] not in there])
            there.update(group)
        shown += results.of(case, trainers)
    print(json.dumps({key: results.head[key] for key in ("date", "hardware", "versions", "settings")}))
    print(table(shown, COLUMNS))
    for model, trainer in product(settings.models, settings.trainers):
        if why := why_not(trainer, model):
            print(f"{trainer} on {model} is left out: {why}.")
    if settings.picture is not None and shown:
        plot_steps(results.rows, settings.picture)  # of all that the file holds
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))
    return {**results.head, "rows": shown}


def _each(settings: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["SmolLM2-135M"])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(8, 160)], help="batch x length: 8x160")
    parser.add_argument(
        "--shares", type=_share, nargs="+", default=[0.15], help="targets / length, above 0, at most 1"
    )
    parser.add_argument("--tuned", choices=TUNED, nargs="+", default=TUNED)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="of the weights")
    parser.add_argument("--trainers", choices=TRAINERS, nargs="+", default=TRAINERS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--at_once", type=int, help="processes alive at a time, stock among them; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write, or to go on with")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    parser.add_argument("--redraw", type=Path, help="JSON file to draw the rows of, in place of measuring them")
    return parser


def _shape(text: str) -> tuple[int, int]:
    batch_size, length = map(int, text.split("x"))
    if batch_size < 1 or length < 2:
        raise argparse.ArgumentTypeError(f"{text}; accepted: batch x length, at least 1x2.")
    return batch_size, length


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: above 0, at most 1.")
    return share


if __name__ == "__main__":
    main()

r"""A whole optimizer step in TemporalWeightTrainer, fused head and full logits, against every peer.

    python recipes/benchmarks/training_step.py --output outputs/training_step.json

is SmolLM2-135M at 8 × 160 tokens; the same command continues after a stop. A minute, on toys:

    python recipes/benchmarks/training_step.py --models toy "toy T5" --shapes 2x32 --repeats 2

The models have random weights. A share of a row's tokens are targets, the last ones; of a seq2seq model's row, whose
tokens are the encoder's, the decoder has so many tokens, all of them targets. No row is padded. docs/benchmarks.md has
the trainers; those that weight do so with p = 1.

Each trainer lives in a process of its own, and they take their steps in turn, as in `loss_head.py`, timed from the
batch's collation to the optimizer. Memory is the process's peak above what it held before its first step. `--at_once`
is for machines that cannot hold all the trainers of a case: they are measured in groups of so many, each beside a
stock of its own.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import measured
from huggingface_hub.utils import tqdm
from measured import Child
from step_trainers import MODELS, STOCK, TRAINERS, TUNED, WARMUP, Job, serve, why_not

from hf_temporal.tables import table

PRELOADED = ["hf_temporal.trainer", "hf_temporal.plots", "hf_temporal.hub.model_card", "datasets", "peft"]
CASE = ("model", "tuned", "dtype", "batch × length", "share")
COLUMNS = (*CASE, "trainer", "seconds", "noise", "time / stock", "MiB", "memory / stock")


def measure(job: Job, trainers: Sequence[str]) -> list[dict[str, Any]]:
    """Medians, noise and memory of trainers that take turns; ratios where the first of them is stock."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = []
        for trainer in trainers:
            log = Path(folder) / f"{trainer}.log"
            log.touch()
            worker = Child(trainer, serve, replace(job, trainer=trainer), log, preload=PRELOADED, log=log)
            workers.append(stack.enter_context(closing(worker)))
        answers = measured.in_turn(workers, job.steps)
    seconds = [[time for time, _ in mine[WARMUP:]] for mine in answers]
    memory = [mine[-1][1] / 2**20 for mine in answers]
    has_stock = trainers[0] == STOCK
    return [
        {
            "trainer": trainer,
            "seconds": statistics.median(mine),
            "noise": measured.spread(mine),
            "time / stock": measured.median_ratio(mine, seconds[0]) if has_stock else None,
            "MiB": mebibytes,
            "memory / stock": mebibytes / memory[0] if has_stock else None,
            "all_seconds": mine,
        }
        for trainer, mine, mebibytes in zip(trainers, seconds, memory, strict=True)
    ]


def groups(trainers: Sequence[str], at_once: int | None) -> list[list[str]]:
    """The trainers that are measured together, at most `at_once`, with stock, where it is asked for, in each group."""
    first = [trainer for trainer in trainers if trainer == STOCK]
    others = [trainer for trainer in trainers if trainer != STOCK]
    size = max(1, (at_once or len(trainers)) - len(first))
    return [[*first, *others[i : i + size]] for i in range(0, max(1, len(others)), size)]


def rows_there(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that is to be gone on with; a `ValueError` tells other settings, versions or machines."""
    there = json.loads(path.read_text(encoding="utf-8"))
    same = {"settings": ("repeats", "threads", "seed"), "hardware": ("processor", "instructions")}
    for part, names in {**same, "versions": head["versions"]}.items():
        for name in names:
            if (made := there[part].get(name)) != head[part][name]:
                raise ValueError(
                    f"{path} was measured with {name}={made!r}; accepted: {head[part][name]!r}, or another --output."
                )
    return list(there["rows"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is not in the file yet, print and draw all that it holds; exit with what could not be measured."""
    parser = measured.parser_of(__doc__, draws=True)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["SmolLM2-135M"])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(8, 160)], help="batch x length: 8x160")
    parser.add_argument("--shares", type=_share, nargs="+", default=[0.15], help="targets / length")
    parser.add_argument("--tuned", choices=TUNED, nargs="+", default=TUNED)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    parser.add_argument("--trainers", choices=TRAINERS, nargs="+", default=TRAINERS)
    parser.add_argument("--at_once", type=int, help="processes alive at a time, stock among them; default: all")
    settings = measured.parsed(parser, arguments)
    if settings.redraw:
        rows = measured.read_rows(settings.redraw, "training_step")
        draw(rows, settings.picture)
        return {"rows": rows}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or TRL's trainers report to the hub that they are used
    results: dict[str, Any] = {**measured.heading("training_step", settings), "rows": []}
    with suppress(PackageNotFoundError):
        results["versions"]["trl"] = version("trl")
    if settings.output and settings.output.exists():
        results["rows"] = rows_there(settings.output, results)
    failed: list[str] = []
    cases = list(product(settings.models, settings.dtype, settings.tuned, settings.shapes, settings.shares))
    for model, dtype, tuned, (batch_size, length), share in tqdm(cases, "Training steps", unit="case"):
        how_often = {"repeats": settings.repeats, "threads": settings.threads, "seed": settings.seed}
        job = Job(model, tuned, dtype, batch_size, length, share, **how_often)
        case = dict(zip(CASE, (model, tuned, dtype, f"{batch_size}×{length}", share), strict=True))
        trainers = [trainer for trainer in TRAINERS if trainer in settings.trainers and not why_not(trainer, model)]
        there = {row["trainer"] for row in results["rows"] if case.items() <= row.items()}
        for group in groups(trainers, settings.at_once):
            if there.issuperset(group):
                continue
            try:
                rows = measure(job, group)
            except RuntimeError as error:  # a group that the memory cannot hold leaves the others alone
                failed.append(f"{', '.join(map(str, case.values()))}: {error}")
                continue
            results["rows"] += [{**case, **row} for row in rows if row["trainer"] not in there]
            there.update(group)
            measured.write(settings.output, results)
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    print(table(results["rows"], COLUMNS))
    for model, trainer in product(settings.models, settings.trainers):
        if why := why_not(trainer, model):
            print(f"{trainer} on {model} is left out: {why}.")
    if settings.picture:
        draw(results["rows"], settings.picture)
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))
    return results


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory as shares of stock's, a line of panels for each model and what is trained of it."""
    shown = [row for row in rows if row["trainer"] != STOCK and row["time / stock"] is not None]
    shown = measured.most_repeated(shown, (*CASE, "trainer"))
    measured.draw_bars(
        sorted(shown, key=lambda row: (row["batch × length"], row["share"])),
        path,
        case=lambda row: "{model}, {tuned}, {dtype}".format(**row),
        name=lambda row: "{trainer}, {batch × length}, {share:.0%}".format(**row),
        panels=[
            ("time / stock", 1.0, "seconds of a step / stock Trainer's"),
            ("memory / stock", 1.0, "memory / stock Trainer's"),
        ],
        ours="fused head",
    )


def _shape(text: str) -> tuple[int, int]:
    batch_size, length = map(int, text.split("x"))
    if batch_size < 1 or length < 2:
        raise argparse.ArgumentTypeError(f"{text}; accepted: batch x length, at least 1x2.")
    return batch_size, length


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: above 0, at most 1.")
    return float(text)


if __name__ == "__main__":
    main()

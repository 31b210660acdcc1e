r"""Cells an hour of a comparison, by this tree and by an older one in turns.

    git worktree add /tmp/before d748e05
    python recipes/benchmarks/comparison.py --before /tmp/before --output outputs/comparison.json

A round is one comparison in each tree: the powers with one seed, another seed in each round. A rate is that of all
cells, from the start of the first to the end of the last, without the imports and the report of the command; `seconds`
are those of the whole command. What the cells measured has to be the same in both trees: `difference` is the largest
one of a metric at the last step. Rounds that stand in the file already are not run again.

Other cells, and more of them at a time:

    python recipes/benchmarks/comparison.py --before /tmp/before --config recipes/configs/copying/small_llama.yaml \
        --parallel 1 --parallel_before 2 --max_steps 100 --output outputs/comparison_llama.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measured
from huggingface_hub.utils import tqdm

from hf_temporal.tables import table

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("round", "cells", "per hour", "before", "ratio", "seconds", "seconds before", "difference")
INTERVAL = 0.02  # Seconds between two looks for the first cell.
TIMED = ("runtime", "per_second")


def comparison(tree: Path, seed: int, parallel: int, settings: Namespace) -> dict[str, Any]:
    """Run a comparison in a tree: its seconds, its cells an hour, and what each cell measured last."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(
                sys.executable,
                "recipes/compare_powers.py",
                "recipes/finetune_causal_lm.py",
                "--config",
                settings.config,
            ),
            *("--powers", *map(str, settings.powers), "--seeds", str(seed), "--metric", settings.metric),
            *("--max_parallel", str(parallel), "--output_dir", folder, *settings.flags),
        ]
        environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
        start, begun = time.time(), None
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if begun is None and any(Path(folder).glob("p*_seed*/log.txt")):
                    begun = time.time()
                time.sleep(INTERVAL)
        seconds = time.time() - start
        if process.returncode or begun is None:
            raise RuntimeError(f"{tree}: {Path(log.name).read_text(errors='replace')[-4000:]}")
        end = max(path.stat().st_mtime for path in Path(folder).glob("*/all_results.json"))
        cells = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))["cells"]
    metrics = {cell["folder"]: cell["metrics"] for cell in cells}
    return {"seconds": seconds, "per hour": 3600 * len(cells) / (end - begun), "metrics": metrics}


def largest_difference(found: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a metric between the cells of two comparisons, those of time left out."""
    return max(
        abs(value - other[cell][name])
        for cell, metrics in found.items()
        for name, value in metrics.items()
        if not name.endswith(TIMED)
    )


def run_round(number: int, settings: Namespace) -> dict[str, Any]:
    """A comparison in each tree; which is the first one changes from round to round."""
    trees = {"now": (ROOT, settings.parallel), "before": (settings.before.resolve(), settings.parallel_before)}
    found = {}
    for name in [*trees][:: 1 if number % 2 else -1]:
        tree, parallel = trees[name]
        found[name] = comparison(tree, settings.seed + number, parallel, settings)
    now, before = found["now"], found["before"]
    return {
        "round": number,
        "cells": len(now["metrics"]),
        "per hour": now["per hour"],
        "before": before["per hour"],
        "ratio": now["per hour"] / before["per hour"],
        "seconds": now["seconds"],
        "seconds before": before["seconds"],
        "difference": largest_difference(now["metrics"], before["metrics"]),
        "metrics": {name: each["metrics"] for name, each in found.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rounds that are not in the file, and print all of them."""
    parser = measured.parser_of(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of an older tree")
    parser.add_argument("--config", default="recipes/configs/copying/small_attention.yaml", help="in each tree")
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 1, 4, 10])
    parser.add_argument("--metric", default="recall")
    parser.add_argument("--parallel", type=int, default=2, help="cells that run side by side")
    parser.add_argument("--parallel_before", type=int, default=2, help="the same in the older tree")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.set_defaults(repeats=3)
    settings = measured.parsed(parser, arguments)
    settings.flags = ["--report_to", "none", "--save_strategy", "no", "--max_steps", str(settings.max_steps)]
    results: dict[str, Any] = {**measured.heading("comparison", settings), "rows": []}
    if settings.output and settings.output.exists():
        results["rows"] = measured.read_rows(settings.output, "comparison")
    for number in tqdm(range(len(results["rows"]), settings.repeats), "Rounds", unit="round"):
        results["rows"].append(run_round(number, settings))
        measured.write(settings.output, results)
    ratios = [row["ratio"] for row in results["rows"]]
    print(f"\n{table(results['rows'], COLUMNS)}\n")
    print(
        f"Cells an hour: {statistics.median(ratios):.2f} times as many, from {min(ratios):.2f} to {max(ratios):.2f}."
    )


if __name__ == "__main__":
    main()

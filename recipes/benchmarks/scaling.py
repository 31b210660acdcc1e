r"""How time and memory of `weighted_linear_cross_entropy` grow with the positions N and the vocabulary V.

    python recipes/benchmarks/scaling.py --output recipes/results/scaling.json --picture recipes/results/scaling.png

takes a minute or two. A few seconds, on a toy:

    python recipes/benchmarks/scaling.py --width 16 --positions 64 128 --vocabularies 500 1000 --repeats 2

Forward + backward in float32, every position a target, over a factor of 64 in N and in V. The work is 6 N V H
operations, so a slope of 1 in log time against log N is linear; where N or V is small, what every call costs makes it
less. The slope is that of the fastest runs. Each size lives in a process of its own, measured as in `loss_head.py`:
one at a time, in a rotating order, the first run for the memory alone. That is the process's peak above the inputs and
the gradients of both; the full logits would be N V floats.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from loss_head import Child
from matplotlib.figure import Figure

from hf_temporal.finetuning.tables import environment, spread, table, write
from hf_temporal.plots import COLORS, grid, saved

SWEPT = {"N": "positions", "V": "vocabulary"}
COLUMNS = ["swept", "N", "H", "V", "seconds", "noise", "fastest", "ns per logit", "MiB", "memory / full logits"]
SLOPES = ["swept", "factor", "slope of time", "MiB, smallest", "MiB, largest"]
FLOAT = 4


def measure(sizes: Sequence[tuple[int, int]], settings: argparse.Namespace, swept: str) -> list[dict[str, Any]]:
    """A row for each (N, V)."""
    H = settings.width
    with ExitStack() as stack:
        children = []
        for N, V in sizes:
            case = {"N": N, "H": H, "V": V, "dtype": torch.float32, "masked": 0.0, "seed": settings.seed}
            children.append(Child("ours", case, settings.threads))
            stack.callback(children[-1].end)
        peaks = [child.run()[1] for child in children]
        seconds: list[list[float]] = [[] for _ in children]
        for repeat in range(settings.repeats):
            for turn in range(len(children)):
                which = (repeat + turn) % len(children)
                seconds[which].append(children[which].run()[0])
    return [
        {
            "swept": swept,
            "N": N,
            "H": H,
            "V": V,
            "seconds": statistics.median(mine),
            "noise": spread(mine),
            "fastest": min(mine),
            "ns per logit": 1e9 * min(mine) / (N * V),
            "MiB": (peak - FLOAT * H * (N + V)) / 2**20,
            "memory / full logits": (peak - FLOAT * H * (N + V)) / (FLOAT * N * V),
            "all_seconds": mine,
        }
        for (N, V), peak, mine in zip(sizes, peaks, seconds, strict=True)
    ]


def slope(rows: Sequence[dict[str, Any]], swept: str) -> dict[str, Any]:
    """The least-squares slope of log time against log size, and the memory at both ends."""
    sizes, times = ([math.log(row[key]) for row in rows] for key in (swept, "fastest"))
    return {
        "swept": swept,
        "factor": rows[-1][swept] / rows[0][swept],
        "slope of time": statistics.linear_regression(sizes, times).slope,
        "MiB, smallest": rows[0]["MiB"],
        "MiB, largest": rows[-1]["MiB"],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Time above memory, against N on the left and V on the right, with the line of slope 1 and the full logits."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (swept, name) in enumerate(SWEPT.items()):
        rows = [row for row in results["rows"] if row["swept"] == swept]
        sizes = [row[swept] for row in rows]
        time, memory = axes[:, column]
        time.plot(sizes, [row["fastest"] for row in rows], "o-", color=COLORS[0], label="measured")
        last = rows[-1]["fastest"] / sizes[-1]
        time.plot(sizes, [last * size for size in sizes], "--", color=COLORS[-1], label=f"proportional to {swept}")
        memory.plot(sizes, [row["MiB"] for row in rows], "o-", color=COLORS[0], label="above inputs and gradients")
        full = [FLOAT * row["N"] * row["V"] / 2**20 for row in rows]
        memory.plot(sizes, full, "--", color=COLORS[-1], label="full logits")
        for each in (time, memory):
            each.set(xscale="log", yscale="log")
            each.legend(frameon=False)
            grid(each)
        fixed = "V" if swept == "N" else "N"
        time.set_title(f"{fixed} = {rows[0][fixed]:,}, H = {rows[0]['H']:,}", fontsize="medium")
        memory.set_xlabel(f"{swept}, {name}")
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MiB")
    saved(figure, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both sweeps, print their tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[256 << k for k in range(7)], help="the N swept")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2000 << k for k in range(7)], help="the V")
    parser.add_argument("--width", type=int, default=256, help="H of both sweeps")
    parser.add_argument("--fixed_vocabulary", type=int, default=8192, help="V while N is swept")
    parser.add_argument("--fixed_positions", type=int, default=1024, help="N while V is swept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "benchmark": "scaling",
        **environment(),
        "settings": {name: value for name, value in vars(settings).items() if name not in ("output", "picture")},
        "rows": [],
        "slopes": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    sweeps = {
        "N": [(N, settings.fixed_vocabulary) for N in settings.positions],
        "V": [(settings.fixed_positions, V) for V in settings.vocabularies],
    }
    for swept, sizes in sweeps.items():
        rows = measure(sizes, settings, swept)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        results["slopes"].append(slope(rows, swept))
        write(settings.output, results)
    print(table(results["slopes"], SLOPES))
    if settings.picture is not None:
        draw(results, settings.picture)
    return results


if __name__ == "__main__":
    main()

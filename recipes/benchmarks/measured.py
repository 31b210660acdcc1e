"""What the benchmarks share: processes that take turns, noise, memory, options, the figures' JSON file and picture."""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hf_temporal.tables import environment, table, write_json


class Child:
    """A process that runs `serve(connection, *arguments)`, which receives a message for each command and answers it.

    The modules in `preload` are imported before. What it prints into the file `log` is shown where it dies.
    """

    def __init__(
        self, name: str, serve: Callable[..., None], *arguments: Any, preload: list[str], log: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self.name = name
        self.log = log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Any:
        """Give the command and return the answer; a RuntimeError where the process ended without one."""
        with suppress(ConnectionError):  # what follows says why the process is gone
            self.connection.send(True)
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            said = self.log.read_text(encoding="utf-8", errors="replace")[-4000:] if self.log else ""
            message = f"{self.name!r} ended early with exit code {self.process.exitcode}"
            raise RuntimeError(f"{message}\n{said}".rstrip()) from error

    def close(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def print_into(log: Path) -> None:
    """Let everything that this process prints from now on go into a file."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def in_turn(children: Sequence[Child], repeats: int) -> list[list[Any]]:
    """The answers of each child, `repeats` of them, one child at a time and in an order that rotates."""
    answers: list[list[Any]] = [[] for _ in children]
    for repeat in range(repeats):
        for turn in range(len(children)):
            which = (repeat + turn) % len(children)
            answers[which].append(children[which].step())
    return answers


def memory() -> int:
    """The process's resident size in bytes; its largest so far where the system does not tell the present one."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else peak_memory()


def peak_memory() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> float:
    """(third − first quartile) / median: the noise of repeated measurements as a share of what was measured."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle


def parser_of(description: str | None, *, draws: bool = False) -> ArgumentParser:
    """A parser with the options that the benchmarks have in common, and those of the ones that draw a picture."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    if draws:
        parser.add_argument("--picture", type=Path, help="PNG file to draw")
        parser.add_argument("--redraw", type=Path, help="JSON file to draw the rows of, in place of measuring them")
    return parser


def parsed(parser: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """The settings, whose number of threads is put in force."""
    settings = parser.parse_args(arguments)
    if getattr(settings, "redraw", None) and not settings.picture:
        parser.error("--redraw without --picture; accepted: both, or neither.")
    torch.set_num_threads(settings.threads)
    return settings


def heading(benchmark: str, settings: Namespace) -> dict[str, Any]:
    """What a file of results begins with: machine, versions and settings."""
    asked = {name: value for name, value in vars(settings).items() if name not in ("output", "picture", "redraw")}
    if asked.get("before"):
        asked["before"] = commit_of(asked["before"])
    return {"benchmark": benchmark, **environment(), "settings": asked}


def commit_of(tree: Path) -> str:
    """The commit that a tree is a checkout of."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def carry_out(
    benchmark: str,
    settings: Namespace,
    measure: Callable[[Namespace], list[dict[str, Any]]],
    columns: Sequence[str],
) -> None:
    """Measure the rows of a benchmark, print a table of these columns, and write the file that was asked for."""
    results = heading(benchmark, settings)
    results["rows"] = measure(settings)
    print(f"\n{table(results['rows'], columns)}")
    write(settings.output, results)


def most_repeated(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the keys' values: that of most repeats, where several runs measured the same."""
    best = {tuple(row[key] for key in keys): row for row in sorted(rows, key=lambda row: len(row["all_seconds"]))}
    return [row for row in rows if best[tuple(row[key] for key in keys)] is row]


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results as a JSON file; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)


def read_rows(path: Path, benchmark: str) -> list[dict[str, Any]]:
    """The rows of a benchmark in the file that it wrote or in that of a machine, or a `ValueError` without any."""
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = [content] if content.get("benchmark") == benchmark else content.get(benchmark, [])
    rows = [row for run in runs for row in run["rows"]]
    if not rows:
        raise ValueError(
            f"{path} has no rows of {benchmark}; accepted: a file that this benchmark wrote, or a machine's."
        )
    return rows


def draw_bars(
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    case: Callable[[dict[str, Any]], str],
    name: Callable[[dict[str, Any]], str],
    panels: Sequence[tuple[str, float, str]],
    ours: str,
) -> None:
    """A line of panels for each `case`, with a bar by `name` for each row that has a value in the panel's column.

    `panels` are columns, what they are divided by, and labels. Bars whose name begins with `ours` are coloured.
    """
    from matplotlib.figure import Figure  # matplotlib takes its time

    from hf_temporal.plots import COLORS, grid, saved

    cases = list(dict.fromkeys(map(case, rows)))
    if not cases:
        return
    shown = {each: [row for row in rows if case(row) == each] for each in cases}
    heights = [0.9 + 0.28 * len(shown[each]) for each in cases]
    figure = Figure(figsize=(5.6 * len(panels), sum(heights)), layout="constrained")
    axes = figure.subplots(len(cases), len(panels), squeeze=False, height_ratios=heights)
    for line, each in zip(axes, cases, strict=True):
        for ax, (column, unit, label) in zip(line, panels, strict=True):
            there = [row for row in shown[each] if row.get(column) is not None]
            names = [name(row) for row in there]
            colors = [COLORS[0] if each_name.startswith(ours) else "0.6" for each_name in names]
            bars = ax.barh(names, [row[column] / unit for row in there], color=colors)
            ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
            if " / " in column:
                ax.axvline(1, color="black", linestyle="--", lw=1)
            ax.set(xlabel=label, title=each)
            ax.set_axisbelow(True)
            ax.invert_yaxis()
            ax.margins(x=0.12)
            grid(ax)
    saved(figure, path)

r"""One table over tasks, models and ways of weighting, each against p = 0 on the same seeds, from several comparisons.

It takes the summaries of `recipes/compare_powers.py`, in any order, and reads off their settings which task, model and
column a run belongs to. The tables are printed; the file holds every value by seed, from which they are made again:

    python recipes/laboratory/memory_table.py outputs/memory_*/summary.json --output outputs/memory_tasks.json \
        --picture outputs/memory_tasks.png
    python recipes/laboratory/memory_table.py --redraw outputs/memory_tasks.json --picture outputs/memory_tasks.png

Runs of one task are those whose settings agree in all but the model, p, its schedule and the mixture. So runs with a
schedule or a mixture, which need no p = 0 of their own, are paired with the p = 0 of the task and the model, seed by
seed. (The p = 0 of a comparison with a mixture is left out, since it mixes the usual loss with itself.)

What decides is the number of steps until the metric is reached, as a ratio. Where fewer than half of the paired runs
get there, with the column's weighting or at p = 0, it is the metric at the end, as a difference. A run that does not
get there counts with its last step. Told apart (better, worse) is what has a P-value below 0.05 after Holm's
correction for the columns of a row; the loss at the end is corrected likewise, for itself. Intervals are 95 % t
intervals, uncorrected; a figure without one is the same on all its seeds.
"""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_temporal.compare.merged import USUAL, Row, merged, read_merged, rows_of
from hf_temporal.compare.quantities import Difference, Quantity, number
from hf_temporal.plots import COLORS, grid, saved
from hf_temporal.tables import markdown, write_json

SEEDS = 5  # A cell says how many seeds it has where they are fewer.
LEAST = 3  # So many models told apart in one direction carry a sentence about a task.
CLOSE = (0.8, 1.25)  # Ratios from the one to the other count as about the same.
VERDICTS = ("better", "worse")
MARKERS = "osD^vPX"  # one more than COLORS, so that many columns differ in one of the two


def tables(content: Mapping[str, Any]) -> str:
    """The table and the counts of every task, in Markdown."""
    paragraphs = []
    for task in content["tasks"]:
        rows = rows_of(content, task)
        paragraphs += [f"## {task['title']}", _table(content["columns"], rows), _counts(content["columns"], rows)]
    return "\n\n".join(paragraphs)


def _table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [["model", *(f"{each.title}, {USUAL}" for each in (rows[0].metric, rows[0].steps)), *columns[1:]]]
    others = range(1, len(columns))
    lines += [
        [row.model, _usual(row.metric), _usual(row.steps), *(_cell(row, each) for each in others)] for row in rows
    ]
    counts = []
    for column in others:
        told = ", ".join(f"{len(_models(rows, [column], verdict))} {verdict}" for verdict in VERDICTS)
        counts.append(f"{told} of {sum(len(row.seeds(column)) > 1 for row in rows)}")
    return markdown([*lines, ["told apart", "", "", *counts]])


def _usual(quantity: Quantity) -> str:
    if not (values := quantity.values.get(0.0)):
        return "–"
    missed = _missed(quantity, 0, values)
    budget = f"> {number(quantity.budget)}"
    mean = number(quantity.mean(0.0)) + (f", {missed} of {len(values)} {budget}" if missed else "")
    return (budget if missed == len(values) else mean) + _seeds(values)


def _missed(quantity: Quantity, column: int, seeds: Collection[int]) -> int:
    return sum((column, seed) in quantity.bounds for seed in seeds)


def _cell(row: Row, column: int) -> str:
    """Ratio or difference, interval, runs that do not get there and, if told apart, the verdict; then the loss."""
    if not (seeds := row.seeds(column)):
        return "–"
    outcome = row.outcomes[column]
    missed = _missed(row.steps, column, seeds)
    effect = _effect(outcome.found) + (f", {missed} of {len(seeds)} > {number(row.steps.budget)}" if missed else "")
    title = "" if outcome.quantity.is_ratio else f"{outcome.quantity.title} "
    loss = _effect(replace(outcome.loss, interval=None))
    return f"{title}{effect}{_mark(outcome.found)}; loss {loss}{_mark(outcome.loss)}{_seeds(seeds)}"


def _effect(found: Difference) -> str:
    value, show = (found.difference, _signed) if found.ratio is None else (found.ratio, "{:.2f}".format)
    if value is None:
        return "not finite"
    return show(value) + (f" [{', '.join(map(show, found.interval))}]" if found.interval else "")


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _mark(found: Difference) -> str:
    return f" **{found.verdict}**" if found.verdict in VERDICTS else ""


def _seeds(seeds: Collection[int]) -> str:
    return "" if len(seeds) >= SEEDS else f" ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"


def _models(rows: Sequence[Row], columns: Sequence[int], verdict: str, *, of_loss: bool = False) -> list[str]:
    """The models that have this verdict in one of the columns."""
    found = [{row.outcomes[each].verdict(of_loss=of_loss) for each in columns if each in row.outcomes} for row in rows]
    return [row.model for row, verdicts in zip(rows, found, strict=True) if verdict in verdicts]


def _counts(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """For each column the models told apart, by name; how many models get there; and where their ratios lie."""
    low, high = CLOSE
    told = [f"{of}{verdict}" for of in ("", "loss ") for verdict in VERDICTS]
    reach = f"half of the runs have {rows[0].steps.title.removeprefix('steps until ')}"
    lines = [["column", *told, reach, f"ratio < {low}", f"{low} to {high}", f"> {high}"]]
    for index, name in enumerate(columns):
        there = [
            2 * _missed(row.steps, index, values) <= len(values)
            for row in rows
            if (values := row.steps.values.get(index))
        ]
        ratios = [ratio for row in rows if index in row.outcomes and (ratio := row.outcomes[index].found.ratio)]
        close, above = sum(low <= each <= high for each in ratios), sum(each > high for each in ratios)
        places = map(str, (len(ratios) - close - above, close, above)) if index else [""] * 3
        lines.append([name, *(_names(rows, [index]) if index else [""] * 4), f"{sum(there)} of {len(there)}", *places])
    lines.append(["any of them", *_names(rows, range(1, len(columns))), *[""] * 4])
    many = [
        f"{verdict} at {columns[index]}"
        for index in range(1, len(columns))
        for verdict in VERDICTS
        if len(_models(rows, [index], verdict)) >= LEAST
    ]
    return f"{markdown(lines)}\n\nTold apart in {LEAST} models or more: {'; '.join(many) or 'nothing'}."


def _names(rows: Sequence[Row], columns: Sequence[int]) -> list[str]:
    found = [_models(rows, columns, verdict, of_loss=of_loss) for of_loss in (False, True) for verdict in VERDICTS]
    return [f"{len(models)}: {', '.join(models)}" if models else "0" for models in found]


def draw(content: Mapping[str, Any], path: Path) -> Figure:
    """Draw, task by task, the ratio of every model and column with its interval, and differences where they decide."""
    names = content["columns"][1:]
    tasks = [rows_of(content, task) for task in content["tasks"]]
    heights = [len(rows) + 1 for rows in tasks]
    figure = Figure(figsize=(10, 1.6 + 0.5 * sum(heights)), layout="constrained")
    sizes = {"height_ratios": heights, "width_ratios": (3, 2)}
    every_axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row", sharex="col", gridspec_kw=sizes)
    for axes, task, rows in zip(every_axes, content["tasks"], tasks, strict=True):
        _draw_task(axes, rows, len(names))
        axes[0].set_title(task["title"], loc="left", fontweight="bold")
    found = [outcome.found for rows in tasks for row in rows for outcome in row.outcomes.values()]
    ratios = [1.0, *(each.ratio for each in found if each.ratio)]
    furthest = max([0.01, *(abs(each.difference or 0) for each in found)])
    every_axes[-1, 0].set_xlim(min(ratios) / 2, max(ratios) * 2)
    every_axes[-1, 0].set_xlabel(f"{tasks[0][0].steps.title}:\nratio to {USUAL} (left: fewer)")
    every_axes[-1, 1].set_xlim(-1.5 * furthest, 1.5 * furthest)
    every_axes[-1, 1].set_xlabel(
        f"{tasks[0][0].metric.title} at the end, where too few get there:\ndifference from {USUAL}"
    )
    handles = [
        Line2D([], [], color=color, marker=marker, label=name)
        for (color, marker), name in zip(map(_style, range(len(names))), names, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False)
    figure.supxlabel(
        "lines: 95 % intervals, cut off at the edge; filled: told apart after Holm's correction", fontsize="medium"
    )
    return saved(figure, path)


def _style(index: int) -> tuple[str, str]:
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def _draw_task(every_axes: Sequence[Axes], rows: Sequence[Row], columns: int) -> None:
    for axes, usual in zip(every_axes, (1, 0), strict=True):
        grid(axes)
        axes.grid(visible=False, axis="y")
        axes.axvline(usual, color="black", lw=1)
        for place in range(1, len(rows)):
            axes.axhline(place - 0.5, color="0.85", lw=0.8)
    for place, row in enumerate(rows):
        for column, outcome in row.outcomes.items():
            found = outcome.found
            axes, value = (
                (every_axes[0], found.ratio) if outcome.quantity.is_ratio else (every_axes[1], found.difference)
            )
            if value is None:
                continue
            y = place + 0.8 * ((column - 0.5) / columns - 0.5)
            color, marker = _style(column - 1)
            if found.interval:
                axes.plot(found.interval, (y, y), color=color, lw=1.6)
            fill = color if found.verdict in VERDICTS else "white"
            axes.plot(value, y, color=color, marker=marker, markersize=5, markerfacecolor=fill)
    every_axes[0].set_yticks(range(len(rows)), [row.model for row in rows])
    every_axes[0].set_ylim(len(rows) - 0.5, -0.5)
    every_axes[0].set_xscale("log")
    every_axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    every_axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    every_axes[0].xaxis.set_minor_formatter(NullFormatter())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="*", type=Path, help="The summary.json of each comparison.")
    parser.add_argument("--redraw", type=Path, help="A file of --output in their place.")
    parser.add_argument("--output", type=Path, help="The JSON file to write.")
    parser.add_argument("--picture", type=Path, help="The PNG to draw.")
    given = parser.parse_args(arguments)
    if bool(given.summaries) == bool(given.redraw):
        parser.error("accepted: either summaries or --redraw with a file")
    content = merged(given.summaries) if given.summaries else read_merged(given.redraw)
    print(tables(content))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output, content)
    if given.picture:
        draw(content, given.picture)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"memory_table.py: {error}")

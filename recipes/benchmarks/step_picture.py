"""The picture of `training_step.py`: time against stock, a panel for each model and what is trained of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_temporal.plots import COLORS, grid, saved

DRAWN = {"by hand": COLORS[1], "SFTTrainer": COLORS[4], "fused head": COLORS[0], "no head": "#BBBBBB"}
COLUMNS = 2
PANEL = ("model", "tuned", "dtype")


def plot_steps(rows: Sequence[dict[str, Any]], path: Path) -> Figure:
    """Time / stock as bars, one for each trainer, grouped by batch × length and share of targets; stock is the line.

    Args:
        rows: of the benchmark; those of other trainers than the ones drawn, or without a ratio, are left out.
        path: where to write the PNG; folders are made.
    """
    rows = [row for row in rows if row["trainer"] in DRAWN and row["time / stock"] is not None]
    panels = list(dict.fromkeys(tuple(row[key] for key in PANEL) for row in rows))
    trainers = [trainer for trainer in DRAWN if any(row["trainer"] == trainer for row in rows)]
    most = max((len(_cases(_of(rows, panel))) for panel in panels), default=1)
    columns = min(COLUMNS, max(1, len(panels)))
    lines = max(1, -(-len(panels) // COLUMNS))
    height = 0.7 + 0.15 * (len(trainers) + 1) * most
    figure = Figure(figsize=(5 * columns, 0.7 + lines * height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for each, panel in zip(axes, panels, strict=False):
        _draw(each, _of(rows, panel), trainers)
        what = {"lora": "LoRA", "full": "all weights"}.get(panel[1], panel[1])
        each.set_title(f"{panel[0]}, {what}, {panel[2]}", fontsize="medium")
    for above, unused in zip(axes[len(panels) - columns :], axes[len(panels) :], strict=False):
        above.tick_params(labelbottom=True)
        unused.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3 * columns, frameon=False)
    figure.supxlabel("seconds of a step / stock Trainer's", fontsize="medium")
    return saved(figure, path)


def _of(rows: Sequence[dict[str, Any]], panel: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [row for row in rows if tuple(row[key] for key in PANEL) == panel]


def _cases(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    return sorted({(row["batch × length"], row["share"]) for row in rows})


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], trainers: Sequence[str]) -> None:
    cases = _cases(rows)
    width = 1 / (len(trainers) + 1)
    middle = (len(trainers) - 1) / 2
    for index, trainer in enumerate(trainers):
        mine = {
            (row["batch × length"], row["share"]): row["time / stock"] for row in rows if row["trainer"] == trainer
        }
        places = [place + (index - middle) * width for place, case in enumerate(cases) if case in mine]
        values = [mine[case] for case in cases if case in mine]
        axes.barh(places, values, height=0.9 * width, color=DRAWN[trainer], label=trainer)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.axvline(1, color="#000000", linestyle="--", lw=1, label="stock", zorder=2.5)
    axes.set_yticks(range(len(cases)), [f"{shape}, {100 * share:g} %" for shape, share in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.margins(x=0.1)
    grid(axes)
    axes.grid(visible=False, axis="y")

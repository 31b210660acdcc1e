"""The pictures of the benchmarks: bars, a panel for each case and figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def draw_bars(
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    case: Callable[[dict[str, Any]], str],
    name: Callable[[dict[str, Any]], str],
    panels: Sequence[tuple[str, float, str]],
    ours: str,
) -> None:
    """A line of panels for each `case`, with a bar for each row that has a value in the column of the panel.

    `case` and `name` make the title of a row's panels and the label of its bar; `panels` are columns, the units that
    they are divided by, and labels. Bars whose name begins with `ours` are coloured; a ratio's 1 is a broken line.
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

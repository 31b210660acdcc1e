"""The pictures of one comparison over p, from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_temporal.power_plots import (
    PowerPanel,
    plot_curves_by_power,
    plot_loss_by_position_and_power,
    plot_memory_by_power,
    plot_metrics_by_power,
)

from .quantities import Quantity, number_of, title_of

PICTURES = {
    "metric_by_power.png": "What each p ends at",
    "loss_by_position.png": "Loss by position in the target at the last evaluation, mean over seeds",
    "memory.png": "Memory at the last evaluation, each seed thin, the mean thick, and its distance from the target's",
    "curves.png": "Every evaluation on the way",
}


def panel_of(quantity: Quantity, title: str | None = None) -> PowerPanel:
    """The panel that shows a quantity over p."""
    return PowerPanel(
        quantity.title + ("\n(hollow: not reached)" if quantity.bounds else ""),
        quantity.values,
        {power: (quantity.mean(power), quantity.interval(power)) for power in quantity.values},
        quantity.bounds,
        quantity.is_ratio,
        title,
    )


def draw_comparison(
    title: str, cells: Sequence[Mapping[str, Any]], decisive: Sequence[Quantity], output_dir: Path
) -> list[str]:
    """Draw the pictures that there are data for.

    Args:
        title: above each picture.
        cells: those of a `summary.json`; a picture is drawn if every finished one holds its data.
        decisive: the quantities of the picture over p.
        output_dir: the folder to write into.

    Returns:
        The names of the pictures.
    """
    by_power, by_position, by_lag, on_the_way = PICTURES
    plot_metrics_by_power([panel_of(each) for each in decisive], output_dir / by_power, title=title)
    drawn = {by_power}
    if curves := _by_power(cells, "curves"):
        all_runs = [run for runs in curves.values() for run in runs]
        panels = {
            title_of(name): {power: [_floats(run[name]) for run in runs] for power, runs in curves.items()}
            for name in all_runs[0]
            if all(name in run for run in all_runs)
        }
        plot_curves_by_power(panels, output_dir / on_the_way, title=title)
        drawn.add(on_the_way)
    if profiles := _by_power(cells, "bins"):
        means = {power: _mean_profile(each) for power, each in profiles.items()}
        plot_loss_by_position_and_power(means, output_dir / by_position, title=title)
        drawn.add(by_position)
    if memories := _by_power(cells, "memory"):
        ((target, *_), *_) = _by_power(cells, "target_memory").values()
        plot_memory_by_power(memories, target, output_dir / by_lag, title=title)
        drawn.add(by_lag)
    return [name for name in PICTURES if name in drawn]


def _by_power(cells: Sequence[Mapping[str, Any]], name: str) -> dict[float, list[Any]]:
    """What the finished cells hold under this name, by p; nothing unless all of them have it."""
    finished = [cell for cell in cells if cell["state"] == "finished"]
    if not all(cell.get(name) for cell in finished):
        return {}
    found: dict[float, list[Any]] = {}
    for cell in sorted(finished, key=lambda cell: float(cell["power"])):
        found.setdefault(float(cell["power"]), []).append(cell[name])
    return found


def _floats(values: Mapping[str, Any]) -> dict[int, float]:
    return {int(step): number_of(value) for step, value in values.items()}


def _mean_profile(profiles: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The mean over seeds of the loss in each bin; None where no seed has a token."""
    bins = []
    for same_bin in zip(*profiles, strict=True):
        losses = [number_of(each["loss"]) for each in same_bin if each["loss"] is not None]
        bins.append({**same_bin[0], "loss": fmean(losses) if losses else None})
    return {"bins": bins}

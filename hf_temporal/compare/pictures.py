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
    """All that is known of a quantity, to be drawn over p."""
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
    """Draw the pictures that there are data for; their names.

    Args:
        title: above each of them.
        cells: as `summary.json` has them; what every finished one holds is drawn.
        decisive: the quantities that stand in the picture over p.
        output_dir: where to write them.
    """
    by_power, by_position, by_lag, on_the_way = PICTURES
    plot_metrics_by_power([panel_of(each) for each in decisive], output_dir / by_power, title=title)
    drawn = {by_power}
    if curves := _by_power(cells, "curves"):
        names = dict.fromkeys(name for runs in curves.values() for run in runs for name in run)
        panels = {
            title_of(name): {power: [_floats(run[name]) for run in runs] for power, runs in curves.items()}
            for name in names
            if all(name in run for runs in curves.values() for run in runs)
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
    """What the finished cells of each p hold under this name; nothing unless all of them do."""
    finished = [cell for cell in cells if cell["state"] == "finished"]
    if not all(cell.get(name) for cell in finished):
        return {}
    powers = sorted({float(cell["power"]) for cell in finished})
    return {power: [cell[name] for cell in finished if float(cell["power"]) == power] for power in powers}


def _floats(values: Mapping[str, Any]) -> dict[int, float]:
    return {int(step): number_of(value) for step, value in values.items()}


def _mean_profile(profiles: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The mean over seeds of each bin's loss; None where no seed has a token there."""
    bins = []
    for same_bin in zip(*profiles, strict=True):
        losses = [number_of(each["loss"]) for each in same_bin if each["loss"] is not None]
        bins.append({**same_bin[0], "loss": fmean(losses) if losses else None})
    return {"bins": bins}

"""The pictures of one comparison over p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_temporal.evaluation import evaluation_profiles
from hf_temporal.finetuning.report import load_evaluations
from hf_temporal.power_plots import (
    PowerPanel,
    plot_curves_by_power,
    plot_loss_by_position_and_power,
    plot_memory_by_power,
    plot_metrics_by_power,
)

from .cells import Cell, Evaluations
from .quantities import Quantity, curve, title_of

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
    title: str, metric: str, runs: Mapping[Cell, Evaluations], decisive: Sequence[Quantity], output_dir: Path
) -> list[str]:
    """Draw the pictures that there are data for; their names."""
    by_power, by_position, by_lag, on_the_way = PICTURES
    plot_metrics_by_power([panel_of(each) for each in decisive], output_dir / by_power, title=title)
    powers = sorted({cell.power for cell in runs})
    curves = {
        title_of(name): {
            power: [curve(evaluations, name) for cell, evaluations in runs.items() if cell.power == power]
            for power in powers
        }
        for name in dict.fromkeys([metric, "loss"])
        if all(curve(evaluations, name) for evaluations in runs.values())
    }
    plot_curves_by_power(curves, output_dir / on_the_way, title=title)
    drawn = {by_power, on_the_way}
    profiles = {power: [_last_profile(cell) for cell in runs if cell.power == power] for power in powers}
    if all(all(each) for each in profiles.values()):
        means = {power: _mean_profile([each for each in profiles[power] if each]) for power in powers}
        plot_loss_by_position_and_power(means, output_dir / by_position, title=title)
        drawn.add(by_position)
    last = {cell: load_evaluations(cell.folder)[-1] for cell in runs}
    if all("memory" in each for each in last.values()):
        memories = {power: [each["memory"] for cell, each in last.items() if cell.power == power] for power in powers}
        target = next(iter(last.values()))["target_memory"]
        plot_memory_by_power(memories, target, output_dir / by_lag, title=title)
        drawn.add(by_lag)
    return [name for name in PICTURES if name in drawn]


def _last_profile(cell: Cell) -> dict[str, Any] | None:
    profiles = evaluation_profiles(cell.folder)
    return profiles[-1] if profiles else None


def _mean_profile(profiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of each bin's loss; None where no seed has a token there."""
    bins = []
    for same_bin in zip(*(profile["bins"] for profile in profiles), strict=True):
        losses = [each["loss"] for each in same_bin if each["loss"] is not None]
        bins.append({**same_bin[0], "loss": fmean(losses) if losses else None})
    return {"bins": bins}

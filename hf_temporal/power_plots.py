"""Pictures of what several p do, side by side, drawn as those of `hf_temporal.plots` are."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .plots import Curve, grid, middles_of, position_axis, power_label, saved, single_axes, stacked_axes, values_of

# Of several p, in their order: even steps in lightness, which colour blindness leaves in place; p = 0 is black.
POWER_COLORS = "plasma"


@dataclass(frozen=True)
class PowerPanel:
    """What was measured at several p, with several seeds each."""

    label: str  # of the axis
    values: Mapping[float, Mapping[int, float]]  # by p, then by seed
    means: Mapping[float, tuple[float, tuple[float, float] | None]]  # by p, with the 95 % interval where there is one
    bounds: frozenset[tuple[float, int]] = frozenset()  # p and seed of mere lower bounds, which are drawn hollow
    log: bool = False  # whether the axis is logarithmic
    title: str | None = None


def plot_metrics_by_power(panels: Sequence[PowerPanel | None], path: Path, *, title: str, columns: int = 1) -> Figure:
    """Draw a panel for each quantity: at each p every seed as a dot, and beside them their mean with its interval.

    The p stand in ascending order at equal distances, so that 0, negative ones and inf have their place. The panels
    of a row share one scale; None leaves a place empty.
    """
    colors = _power_colors({power for panel in panels if panel for power in panel.values})
    rows, width = -(-len(panels) // columns), max(len(colors), 4)
    size = (2.0 + 0.9 * width, 0.8 + 3.0 * rows) if columns == 1 else (1.0 + 0.55 * width * columns, 1.0 + 2.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    drawn = {index: (axes, panel) for index, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)) if panel}
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index in drawn)
    for index, (axes, panel) in drawn.items():
        _draw_panel(axes, panel, colors)
        axes.tick_params(labelbottom=index + columns not in drawn)
        axes.set_ylabel("" if index % columns else panel.label)
    for axes, panel in drawn.values():
        if panel.log:  # once the whole row is drawn: what is drawn on a logarithmic axis has rounded limits
            _log_axis(axes)
    grid[0, 0].set_xticks(range(len(colors)), [power_label(power) for power in colors])
    grid[0, 0].set_xlim(-0.5, len(colors) - 0.5)
    explained = "p of the weight $t^p$ (0: the usual loss)\ndots: one seed each, diamonds: mean and 95 % interval"
    figure.supxlabel(explained, fontsize="medium")
    figure.suptitle(title)
    return saved(figure, path)


def plot_loss_by_position_and_power(profiles: Mapping[float, Mapping[str, Any]], path: Path, *, title: str) -> Figure:
    """Draw mean loss over t/T for each p and, where p = 0 is among them, the differences from it below.

    The profiles, by p, have the form that `hf_temporal.evaluation.load_profiles` returns.
    """
    colors = _power_colors(profiles)
    losses = {power: values_of(profile, "loss") for power, profile in profiles.items()}
    shown = [losses]
    if 0.0 in losses and len(losses) > 1:
        shown.append({power: list(map(operator.sub, values, losses[0.0])) for power, values in losses.items()})
    figure, every_axes = stacked_axes(len(shown))
    for axes, values in zip(every_axes, shown, strict=True):
        curves = {power: [(middles_of(profiles[power]), values[power])] for power in profiles}
        _draw_powers(axes, curves, colors, marker="o", markersize=4, lw=2)
    every_axes[0].set(ylabel="mean loss per token (nats)", ylim=(0, None))
    if len(shown) == 2:
        every_axes[1].set_ylabel("difference from p = 0 (nats)")
    position_axis(every_axes[-1])
    return _saved_with_legend(figure, colors, title, path)


def plot_trials(trials: Sequence[tuple[float, float]], label: str, path: Path) -> Figure:
    """Draw one dot for each run of a search: p, and the value that it reached."""
    figure, axes = single_axes("p", label)
    axes.plot(*zip(*trials, strict=True), marker="o", linestyle="none")
    return saved(figure, path)


def plot_curves_by_power(
    curves: Mapping[str, Mapping[float, Sequence[Mapping[int, float]]]], path: Path, *, title: str
) -> Figure:
    """Draw a panel for each quantity over training steps: each seed thin, the mean at the steps of all seeds thick.

    The curves are given by the label of the axis, then by p: values by step, of one seed each.
    """
    colors = _power_colors({power for by_power in curves.values() for power in by_power})
    figure, every_axes = stacked_axes(len(curves))
    for axes, (label, by_power) in zip(every_axes, curves.items(), strict=True):
        seeds = {power: [(list(run), list(run.values())) for run in runs] for power, runs in by_power.items()}
        _draw_powers(axes, seeds, colors, lw=0.8, alpha=0.4)
        _draw_powers(axes, {power: [_mean_curve(runs)] for power, runs in by_power.items()}, colors, lw=2.5)
        axes.set_ylabel(label)
    axes.set_xlabel("training step")
    return _saved_with_legend(figure, colors, title, path)


def plot_power_report(
    loss: Sequence[float], weights: Mapping[float, Sequence[float]], path: Path, *, title: str
) -> Figure:
    """Draw each decile's share in the sum of all losses as bars, and in that of the weights as a curve for each p."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    middles = [(index + 0.5) / len(loss) for index in range(len(loss))]
    axes.bar(middles, [100 * share for share in loss], width=0.9 / len(loss), color="#BBBBBB", label="loss")
    colors = _power_colors(weights)
    percent = {power: [(middles, [100 * share for share in shares])] for power, shares in weights.items()}
    _draw_powers(axes, percent, colors, marker="o", markersize=4, lw=2)
    axes.set(ylabel="share of the whole (%)\nbars: loss, curves: weight under p", ylim=(0, None))
    position_axis(axes)
    return _saved_with_legend(figure, colors, title, path)


def plot_memory_by_power(
    memories: Mapping[float, Sequence[Sequence[float]]], target: Sequence[float], path: Path, *, title: str
) -> Figure:
    """Draw the memory functions at each p, of each seed and their mean, and below their distance from the target's."""
    colors = _power_colors(memories)
    figure, (above, below) = stacked_axes(2)
    lags, wanted = range(len(target)), torch.tensor(target)
    runs = {power: torch.tensor(each) for power, each in memories.items()}
    seeds = {power: [(lags, run.tolist()) for run in each] for power, each in runs.items()}
    _draw_powers(above, seeds, colors, lw=0.6, alpha=0.3)
    means = {power: [(lags, each.mean(0).tolist())] for power, each in runs.items()}
    _draw_powers(above, means, colors, lw=2)
    above.plot(lags, target, color="#009E73", linestyle=":", lw=2.5, zorder=3)
    errors = {power: [(lags, (each - wanted).abs().mean(0).tolist())] for power, each in runs.items()}
    _draw_powers(below, errors, colors, lw=2)
    above.set_ylabel("memory function\n(green, dotted: the target's)")
    below.set(xlabel="lag", ylabel="mean distance from the target's", yscale="log")
    return _saved_with_legend(figure, colors, title, path)


def _draw_panel(axes: Axes, panel: PowerPanel, colors: Mapping[float, Any]) -> None:
    seeds = sorted({seed for values in panel.values.values() for seed in values})
    width = 0.4 / max(1, len(seeds) - 1)
    for index, power in enumerate(colors):
        values = panel.values.get(power, {})
        for seed, value in values.items():
            hollow = (power, seed) in panel.bounds
            axes.plot(
                index - 0.1 - width * (len(seeds) - 1) / 2 + width * seeds.index(seed),
                value,
                marker="o",
                markersize=5,
                color=colors[power],
                markerfacecolor="white" if hollow else colors[power],
                alpha=0.75,
            )
        mean, interval = panel.means.get(power, (math.nan, None))
        if math.isfinite(mean):
            errors = None if interval is None else [[mean - interval[0]], [interval[1] - mean]]
            axes.errorbar(
                index + 0.28, mean, errors, marker="D", markersize=6, capsize=4, elinewidth=1.8, color=colors[power]
            )
    axes.set_title(panel.title or "", fontsize="medium")
    axes.margins(y=0.1)
    grid(axes)
    axes.grid(visible=False, axis="x")


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_powers(
    axes: Axes, curves: Mapping[float, Sequence[Curve]], colors: Mapping[float, Any], **style: Any
) -> None:
    """The curves of each p in its colour, those of p = 0 dashed and on top."""
    for power in sorted(curves, key=lambda power: (power == 0, power)):
        for x, y in curves[power]:
            axes.plot(x, y, color=colors[power], linestyle="--" if power == 0 else "-", **style)
    axes.margins(y=0.1)
    grid(axes)


def _mean_curve(runs: Sequence[Mapping[int, float]]) -> Curve:
    steps = sorted(set.intersection(*map(set, runs)))
    return steps, [sum(run[step] for run in runs) / len(runs) for step in steps]


def _power_colors(powers: Iterable[float]) -> dict[float, Any]:
    powers = sorted(powers)
    others = [power for power in powers if power != 0]
    shades = {power: 0.85 * rank / max(1, len(others) - 1) for rank, power in enumerate(others)}
    return {power: "#000000" if power == 0 else colormaps[POWER_COLORS](shades[power]) for power in powers}


def _saved_with_legend(figure: Figure, colors: Mapping[float, Any], title: str, path: Path) -> Figure:
    handles = [
        Line2D([], [], color=color, lw=2.5, linestyle="--" if power == 0 else "-", label=power_label(power))
        for power, color in colors.items()
    ]
    figure.legend(handles=handles, title="p", loc="outside right upper", frameon=False)
    figure.suptitle(title)
    return saved(figure, path)

"""Every picture of the project. Figures are made without pyplot, so no global state of matplotlib is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .weighting import TemporalWeighting

# Okabe & Ito's palette, told apart under every common colour blindness; line styles tell them apart in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), "-")
# Of several p, in their order: even steps in lightness, which colour blindness leaves in place; p = 0 is black.
POWER_COLORS = "plasma"
POSITION_LABEL = "position in the target, t/T (0 is its beginning, 1 its end)"

Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class PowerPanel:
    """What was measured at several p, with several seeds each.

    Args:
        label: of the axis.
        values: by p, then by seed.
        means: by p, each with its 95 % interval, None where there is none.
        bounds: p and seed of the values that are only lower bounds; they are drawn hollow.
        log: whether equal ratios are equally far apart.
        title: above the panel.
    """

    label: str
    values: Mapping[float, Mapping[int, float]]
    means: Mapping[float, tuple[float, tuple[float, float] | None]]
    bounds: frozenset[tuple[float, int]] = frozenset()
    log: bool = False
    title: str | None = None


def plot_loss_by_position(
    profiles: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Figure:
    """Mean loss over t/T, and accuracy below it where there is one, at the first and the last evaluation.

    Args:
        profiles: as `hf_temporal.profile.load_profiles` returns them, oldest first; those of another split than the
            first are left out.
        path: where to write the PNG; folders are made.
        title: above the picture.

    Raises:
        ValueError: `profiles` is empty.
    """
    if not profiles:
        raise ValueError("profiles=[] holds no evaluation; accepted: one profile or more, as load_profiles returns.")
    of_one_split = [profile for profile in profiles if profile["split"] == profiles[0]["split"]]
    shown = of_one_split if len(of_one_split) == 1 else [of_one_split[0], of_one_split[-1]]
    has_accuracy = any(not math.isnan(value) for profile in shown for value in _values(profile, "accuracy"))
    figure = Figure(figsize=(6.4, 5.6 if has_accuracy else 3.6), layout="constrained")
    axes = figure.subplots(2 if has_accuracy else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_bins(axes[0], shown, "loss")
    axes[0].set_ylabel("mean loss per token (nats)" if has_accuracy else "mean error per step")
    axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    if has_accuracy:
        _draw_bins(axes[1], shown, "accuracy", percent=True)
        axes[1].set_ylabel("next-token accuracy (%)")
    _position_axis(axes[-1])
    if title is not None:
        figure.suptitle(title)
    return _saved(figure, path)


def plot_recall_by_position(recalls: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> Figure:
    """The share of right tokens at each position of what was copied.

    Args:
        recalls: by the label of the curve, one value for each position from the first.
        path: where to write the PNG; folders are made.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, values), color, style in zip(recalls.items(), COLORS, LINE_STYLES, strict=False):
        axes.plot(range(1, len(values) + 1), values, color=color, linestyle=style, marker="o", lw=2, label=label)
    axes.set_xlabel("position among the copied tokens")
    axes.set_ylabel("recall")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    _grid(axes)
    return _saved(figure, path)


def plot_power_report(
    loss: Sequence[float], weights: Mapping[float, Sequence[float]], path: str | os.PathLike[str], *, title: str
) -> Figure:
    """Where the loss is, as bars by decile of t/T, and where each p puts the weight, as curves over them.

    Args:
        loss: share of each decile in the sum of all losses.
        weights: by p, the share of each decile in the sum of all weights.
        path: where to write the PNG; folders are made.
        title: above the picture.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    middles = [(index + 0.5) / len(loss) for index in range(len(loss))]
    axes.bar(middles, [100 * share for share in loss], width=0.9 / len(loss), color="#BBBBBB", label="loss")
    colors = _power_colors(weights)
    percent = {power: [(middles, [100 * share for share in shares])] for power, shares in weights.items()}
    _draw_powers(axes, percent, colors, marker="o", markersize=4, lw=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the whole (%)\nbars: loss, curves: weight under p")
    _position_axis(axes)
    _legend_of_powers(figure, colors)
    figure.suptitle(title)
    return _saved(figure, path)


def plot_memory(
    memories: Mapping[str, Sequence[float]], target: Sequence[float], path: str | os.PathLike[str]
) -> Figure:
    """The memory functions of models, and that of the target, over the lag.

    Args:
        memories: by the label of the curve, one value for each lag from 0.
        target: the same for the target.
        path: where to write the PNG; folders are made.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(target, color="#000000", linestyle="--", lw=2, label="target", zorder=3)
    for (label, values), color in zip(memories.items(), COLORS, strict=False):
        axes.plot(values, color=color, lw=2, label=label)
    axes.set_xlabel("lag")
    axes.set_ylabel("memory function")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    _grid(axes)
    return _saved(figure, path)


def plot_weights(path: str | os.PathLike[str]) -> Figure:
    """w = (t/T)^p rescaled to mean 1, over t/T for several p, written as a PNG; folders are made."""
    powers, length, top = (-0.5, 0.0, 1.0, 2.0, 4.0, math.inf), 200, 5.5
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    positions = torch.arange(1, length + 1)[None]
    time = (positions[0] / length).tolist()
    for power, color, style in zip(powers, COLORS, LINE_STYLES, strict=True):
        if math.isinf(power):
            axes.annotate("", xy=(1, top), xytext=(1, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
            axes.plot([], [], color=color, lw=2, label="p = ∞ (last token alone)")
        else:
            weights = TemporalWeighting(power=power).weights(positions)[0].tolist()
            axes.plot(time, weights, color=color, linestyle=style, lw=2, label=f"p = {_power_name(power)}")
    axes.set_xlabel(POSITION_LABEL)
    axes.set_ylabel("weight w (mean 1)")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, top)
    axes.legend(frameon=False, loc="upper center", ncols=2)
    _grid(axes)
    return _saved(figure, path)


def plot_metrics_by_power(
    panels: Sequence[PowerPanel | None], path: str | os.PathLike[str], *, title: str, columns: int = 1
) -> Figure:
    """A panel for each quantity: every seed as a dot, beside them their mean with its 95 % interval, p by p.

    The p stand in ascending order at equal distances, so that 0, negative ones and inf have their place. Of several
    `columns`, the panels of a row have one scale; None leaves a place empty.
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
    grid[0, 0].set_xticks(range(len(colors)), [_power_name(power) for power in colors])
    grid[0, 0].set_xlim(-0.5, len(colors) - 0.5)
    figure.supxlabel(
        "p of the weight $t^p$ (0: the usual loss)\ndots: one seed each, diamonds: mean and 95 % interval",
        fontsize="medium",
    )
    figure.suptitle(title)
    return _saved(figure, path)


def plot_loss_by_position_and_power(
    profiles: Mapping[float, Mapping[str, Any]], path: str | os.PathLike[str], *, title: str
) -> Figure:
    """Mean loss over t/T for each p and, where p = 0 is among them, the differences from it below.

    Args:
        profiles: by p, of the form that `hf_temporal.profile.load_profiles` returns.
        path: where to write the PNG; folders are made.
        title: above the picture.
    """
    colors = _power_colors(profiles)
    losses = {power: _values(profile, "loss") for power, profile in profiles.items()}
    shown = [losses]
    if 0.0 in losses and len(losses) > 1:
        differences = {
            power: [value - usual for value, usual in zip(values, losses[0.0], strict=True)]
            for power, values in losses.items()
        }
        shown.append(differences)
    figure = Figure(figsize=(7.6, 0.8 + 3.0 * len(shown)), layout="constrained")
    every_axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, values in zip(every_axes, shown, strict=True):
        curves = {power: [(_middles(profiles[power]), values[power])] for power in profiles}
        _draw_powers(axes, curves, colors, marker="o", markersize=4, lw=2)
    every_axes[0].set_ylabel("mean loss per token (nats)")
    every_axes[0].set_ylim(bottom=0)
    if len(shown) == 2:
        every_axes[1].set_ylabel("difference from p = 0 (nats)")
    _position_axis(every_axes[-1])
    _legend_of_powers(figure, colors)
    figure.suptitle(title)
    return _saved(figure, path)


def plot_curves_by_power(
    curves: Mapping[str, Mapping[float, Sequence[Mapping[int, float]]]], path: str | os.PathLike[str], *, title: str
) -> Figure:
    """A panel for each quantity over training steps: each seed thin, the mean over seeds thick.

    Args:
        curves: by the label of the axis, then by p: values by step, of one seed each. The mean is drawn at the steps
            that all seeds have.
        path: where to write the PNG; folders are made.
        title: above the picture.
    """
    colors = _power_colors({power for by_power in curves.values() for power in by_power})
    figure = Figure(figsize=(7.6, 0.8 + 3.0 * len(curves)), layout="constrained")
    every_axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, by_power) in zip(every_axes, curves.items(), strict=True):
        seeds = {power: [(list(run), list(run.values())) for run in runs] for power, runs in by_power.items()}
        _draw_powers(axes, seeds, colors, lw=0.8, alpha=0.4)
        _draw_powers(axes, {power: [_mean_curve(runs)] for power, runs in by_power.items()}, colors, lw=2.5)
        axes.set_ylabel(label)
    axes.set_xlabel("training step")
    _legend_of_powers(figure, colors)
    figure.suptitle(title)
    return _saved(figure, path)


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
    _grid(axes)
    axes.grid(visible=False, axis="x")


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_powers(
    axes: Axes, curves: Mapping[float, Sequence[Curve]], colors: Mapping[float, Any], **style: Any
) -> None:
    """The curves of each p in its colour, those of p = 0 dashed and on top."""
    for power in sorted(curves, key=lambda power: (power == 0, power)):
        for x, y in curves[power]:
            axes.plot(x, y, color=colors[power], linestyle="--" if power == 0 else "-", **style)
    axes.margins(y=0.1)
    _grid(axes)


def _mean_curve(runs: Sequence[Mapping[int, float]]) -> Curve:
    steps = sorted(set.intersection(*map(set, runs)))
    return steps, [sum(run[step] for run in runs) / len(runs) for step in steps]


def _power_colors(powers: Iterable[float]) -> dict[float, Any]:
    """A colour for each p, in ascending order."""
    powers = sorted(powers)
    others = [power for power in powers if power != 0]
    shades = {power: 0.85 * rank / max(1, len(others) - 1) for rank, power in enumerate(others)}
    return {power: "#000000" if power == 0 else colormaps[POWER_COLORS](shades[power]) for power in powers}


def _legend_of_powers(figure: Figure, colors: Mapping[float, Any]) -> None:
    handles = [
        Line2D([], [], color=color, lw=2.5, linestyle="--" if power == 0 else "-", label=_power_name(power))
        for power, color in colors.items()
    ]
    figure.legend(handles=handles, title="p", loc="outside right upper", frameon=False)


def _power_name(power: float) -> str:
    return "∞" if math.isinf(power) else f"{power:g}".replace("-", "−")


def _position_axis(axes: Axes) -> None:
    axes.set_xlabel(POSITION_LABEL)
    axes.set_xlim(0, 1)
    axes.set_xticks([index / 10 for index in range(11)])


def _values(profile: Mapping[str, Any], name: str) -> list[float]:
    """A column of the profile, NaN where a bin is empty."""
    return [math.nan if entry[name] is None else entry[name] for entry in profile["bins"]]


def _middles(profile: Mapping[str, Any]) -> list[float]:
    return [(entry["from"] + entry["to"]) / 2 for entry in profile["bins"]]


def _draw_bins(axes: Axes, profiles: Sequence[Mapping[str, Any]], name: str, *, percent: bool = False) -> None:
    """One line per profile through the middles of its bins, broken where a bin is empty."""
    for profile, color, style, marker in zip(profiles, COLORS, LINE_STYLES, "os", strict=False):
        values = [100 * value if percent else value for value in _values(profile, name)]
        axes.plot(_middles(profile), values, color=color, linestyle=style, marker=marker, lw=2, label=_label(profile))
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    _grid(axes)


def _label(profile: Mapping[str, Any]) -> str:
    step = profile["step"]
    return f"{profile['split']}, before training" if step == 0 else f"{profile['split']}, step {step:,}"


def _grid(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: Figure, path: str | os.PathLike[str]) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return figure

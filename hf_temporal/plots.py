"""Every picture of the project: each function draws a PNG at `path`, makes its folders and returns the figure.

Figures are made without pyplot, so no global state of matplotlib is touched.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .installed import require
from .weighting import TemporalWeighting

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    require("plots")
    raise

# Okabe & Ito's palette, told apart under every common colour blindness; line styles tell them apart in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), "-")
POSITION_LABEL = "position in the target, t/T (0 is its beginning, 1 its end)"

Curve = tuple[Sequence[float], Sequence[float]]


def plot_loss_by_position(
    profiles: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None
) -> Figure:
    """Draw mean loss over t/T, and accuracy below it where there is one, at the first and the last evaluation.

    `profiles` are as `hf_temporal.evaluation.load_profiles` returns them, oldest first, at least one; those of another
    split than the first are left out.
    """
    if not profiles:
        raise ValueError("profiles=[] holds no evaluation; accepted: one profile or more, as load_profiles returns.")
    of_one_split = [profile for profile in profiles if profile["split"] == profiles[0]["split"]]
    shown = of_one_split if len(of_one_split) == 1 else [of_one_split[0], of_one_split[-1]]
    has_accuracy = any(not math.isnan(value) for profile in shown for value in values_of(profile, "accuracy"))
    figure = Figure(figsize=(6.4, 5.6 if has_accuracy else 3.6), layout="constrained")
    axes = figure.subplots(2 if has_accuracy else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_bins(axes[0], shown, "loss")
    axes[0].set_ylabel("mean loss per token (nats)" if has_accuracy else "mean error per step")
    _legend_above(axes[0])
    if has_accuracy:
        _draw_bins(axes[1], shown, "accuracy", percent=True)
        axes[1].set_ylabel("next-token accuracy (%)")
    position_axis(axes[-1])
    if title is not None:
        figure.suptitle(title)
    return saved(figure, path)


def plot_recall_by_position(recalls: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> Figure:
    """Draw the share of right tokens at each position of what was copied, a curve for each label."""
    figure, axes = single_axes("position among the copied tokens", "recall")
    for (label, values), color, style in zip(recalls.items(), COLORS, LINE_STYLES, strict=False):
        axes.plot(range(1, len(values) + 1), values, color=color, linestyle=style, marker="o", lw=2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.02, 1.02)
    _legend_above(axes)
    return saved(figure, path)


def plot_memory(
    memories: Mapping[str, Sequence[float]], target: Sequence[float], path: str | os.PathLike[str]
) -> Figure:
    """Draw the memory functions of models, by the label of the curve, and that of the target over the lags from 0."""
    figure, axes = single_axes("lag", "memory function")
    axes.plot(target, color="#000000", linestyle="--", lw=2, label="target", zorder=3)
    for (label, values), color in zip(memories.items(), COLORS, strict=False):
        axes.plot(values, color=color, lw=2, label=label)
    _legend_above(axes, columns=3)
    return saved(figure, path)


def plot_weights(path: str | os.PathLike[str]) -> Figure:
    """Draw w = (t/T)^p, rescaled to mean 1, over t/T for several p."""
    powers, top = (-0.5, 0.0, 1.0, 2.0, 4.0, math.inf), 5.5
    figure, axes = single_axes(POSITION_LABEL, "weight w (mean 1)")
    positions = torch.arange(1, 201)[None]
    time = (positions[0] / 200).tolist()
    for power, color, style in zip(powers, COLORS, LINE_STYLES, strict=True):
        if math.isinf(power):
            axes.annotate("", xy=(1, top), xytext=(1, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
            axes.plot([], [], color=color, lw=2, label="p = ∞ (last token alone)")
        else:
            weights = TemporalWeighting(power=power).weights(positions)[0].tolist()
            axes.plot(time, weights, color=color, linestyle=style, lw=2, label=f"p = {power_label(power)}")
    axes.set(xlim=(0, 1.02), ylim=(0, top))
    axes.legend(frameon=False, loc="upper center", ncols=2)
    return saved(figure, path)


def power_label(power: float) -> str:
    """The power p as text, with ∞ and a minus sign."""
    return "∞" if math.isinf(power) else f"{power:g}".replace("-", "−")


def position_axis(axes: Axes) -> None:
    """Label the x axis as t/T, from 0 to 1."""
    axes.set(xlabel=POSITION_LABEL, xlim=(0, 1), xticks=[index / 10 for index in range(11)])


def values_of(profile: Mapping[str, Any], name: str) -> list[float]:
    """One value of each bin of a profile, NaN where the bin is empty."""
    return [math.nan if entry[name] is None else entry[name] for entry in profile["bins"]]


def middles_of(profile: Mapping[str, Any]) -> list[float]:
    """The middle of each bin of a profile, in t/T."""
    return [(entry["from"] + entry["to"]) / 2 for entry in profile["bins"]]


def _draw_bins(axes: Axes, profiles: Sequence[Mapping[str, Any]], name: str, *, percent: bool = False) -> None:
    """Draw one line for each profile through the middles of its bins, broken where a bin is empty."""
    for profile, color, style, marker in zip(profiles, COLORS, LINE_STYLES, "os", strict=False):
        values = [100 * value if percent else value for value in values_of(profile, name)]
        when = f"step {profile['step']:,}" if profile["step"] else "before training"
        label = f"{profile['split']}, {when}"
        axes.plot(middles_of(profile), values, color=color, linestyle=style, marker=marker, lw=2, label=label)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    grid(axes)


def _legend_above(axes: Axes, *, columns: int = 2) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0)


def single_axes(x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and their labels."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    grid(axes)
    return figure, axes


def stacked_axes(count: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with pairs of axes one below the other."""
    figure = Figure(figsize=(7.6, 0.8 + 3.0 * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def grid(axes: Axes) -> None:
    """Draw a light grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def saved(figure: Figure, path: str | os.PathLike[str]) -> Figure:
    """Write the figure as a PNG, making its folders, and return it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return figure

"""The pictures hold the numbers that they were given, and leave matplotlib as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from hf_temporal.plots import plot_loss_by_position, plot_memory, plot_recall_by_position, plot_weights
from hf_temporal.power_plots import (
    PowerPanel,
    plot_curves_by_power,
    plot_loss_by_position_and_power,
    plot_memory_by_power,
    plot_metrics_by_power,
    plot_power_report,
)
from hf_temporal.weighting import TemporalWeighting


def profile(step: int, *, split: str = "eval", accuracy: bool = True, empty: tuple[int, ...] = ()) -> dict[str, Any]:
    bins = [
        {
            "from": k / 10,
            "to": (k + 1) / 10,
            "loss": None if k in empty else 5.0 - 0.1 * k - 0.01 * step,
            "accuracy": 0.3 + 0.05 * k if accuracy and k not in empty else None,
            "count": 0 if k in empty else 7,
        }
        for k in range(10)
    ]
    return {"split": split, "step": step, "bins": bins}


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}


def assert_is_picture(path: Path) -> None:
    height, width, _ = plt.imread(path).shape
    assert height > 400
    assert width > 800


def test_first_and_last_evaluation_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "made" / "loss.png"
    profiles = [profile(0), profile(30), profile(1200), profile(1200, split="test")]
    figure = plot_loss_by_position(profiles, path, title="a run")
    loss, accuracy = figure.axes
    drawn = lines(loss)
    assert list(drawn) == ["eval, before training", "eval, step 1,200"]
    np.testing.assert_allclose(drawn["eval, step 1,200"], [5.0 - 0.1 * k - 12.0 for k in range(10)])
    np.testing.assert_allclose(lines(accuracy)["eval, before training"], [30 + 5 * k for k in range(10)])
    np.testing.assert_allclose(np.asarray(loss.get_lines()[0].get_xdata()), [0.05 + 0.1 * k for k in range(10)])
    assert "nats" in loss.get_ylabel()
    assert "%" in accuracy.get_ylabel()
    assert "t/T" in accuracy.get_xlabel()
    assert loss.get_legend() is not None
    assert figure.get_suptitle() == "a run"
    assert_is_picture(path)


def test_empty_bins_are_gaps_not_zeros(tmp_path: Path) -> None:
    figure = plot_loss_by_position([profile(5, empty=(0, 3))], tmp_path / "loss.png")
    for axes in figure.axes:
        (values,) = lines(axes).values()
        assert [math.isnan(value) for value in values] == [k in (0, 3) for k in range(10)]


def test_float_labels_have_no_accuracy_axes(tmp_path: Path) -> None:
    figure = plot_loss_by_position([profile(0, accuracy=False), profile(9, accuracy=False)], tmp_path / "loss.png")
    (axes,) = figure.axes
    assert "nats" not in axes.get_ylabel()
    assert_is_picture(tmp_path / "loss.png")


def test_no_profile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profiles=\[\]"):
        plot_loss_by_position([], tmp_path / "loss.png")


def test_weights_are_those_of_the_library(tmp_path: Path) -> None:
    (axes,) = plot_weights(tmp_path / "weights.png").axes
    drawn = lines(axes)
    expected = TemporalWeighting(power=2.0).weights(torch.arange(1, 201)[None])[0]
    np.testing.assert_array_equal(drawn["p = 2"], expected.numpy())
    finite = [values for values in drawn.values() if len(values)]
    assert len(finite) == len(drawn) - 1
    for values in finite:
        assert values.mean() == pytest.approx(1, abs=1e-5)
    assert_is_picture(tmp_path / "weights.png")


def test_every_seed_is_a_dot_and_every_mean_has_its_interval(tmp_path: Path) -> None:
    recall = PowerPanel(
        "recall",
        {4.0: {0: 0.9, 1: 0.8}, 0.0: {0: 0.5, 1: 0.7}, math.inf: {1: math.nan}, -1.0: {0: 0.1}},
        {4.0: (0.85, (0.7, 1.0)), 0.0: (0.6, (0.4, 0.9)), math.inf: (math.nan, None), -1.0: (0.1, None)},
    )
    steps = PowerPanel("steps", {0.0: {0: 3.0, 1: 300.0}}, {0.0: (30.0, None)}, frozenset({(0.0, 1)}), log=True)
    figure = plot_metrics_by_power([recall, steps], tmp_path / "made" / "powers.png", title="a comparison")
    above, below = figure.axes
    assert [label.get_text() for label in below.get_xticklabels()] == ["−1", "0", "4", "∞"]
    points = [
        (round(float(np.asarray(line.get_xdata())[0])), float(np.asarray(line.get_ydata())[0]), line.get_marker())
        for line in above.get_lines()
        if line.get_marker() in ("o", "D")
    ]
    dots = sorted(point for point in points if point[2] == "o" and not math.isnan(point[1]))
    assert [dot[:2] for dot in dots] == [(0, 0.1), (1, 0.5), (1, 0.7), (2, 0.8), (2, 0.9)]
    assert sorted(point[:2] for point in points if point[2] == "D") == [
        (0, 0.1), (1, pytest.approx(0.6)), (2, pytest.approx(0.85)),
    ]  # fmt: skip
    bars = [tuple(np.asarray(path.vertices)[:, 1]) for each in above.collections for path in each.get_paths()]
    assert sorted(bars) == [(pytest.approx(0.4), pytest.approx(0.9)), (pytest.approx(0.7), pytest.approx(1.0))]
    hollow = [line.get_markerfacecolor() for line in below.get_lines() if line.get_marker() == "o"]
    assert [face == "white" for face in hollow] == [False, True]
    assert (above.get_yscale(), below.get_yscale()) == ("linear", "log")
    assert (above.get_ylabel(), below.get_ylabel(), figure.get_suptitle()) == ("recall", "steps", "a comparison")
    assert_is_picture(tmp_path / "made" / "powers.png")


@pytest.mark.parametrize(("largest", "marks"), [(30.0, {1.0, 2.0, 5.0, 10.0, 20.0}), (1e7, {1.0, 10.0, 100.0, 1e6})])
def test_marks_of_many_decades_are_far_apart(tmp_path: Path, largest: float, marks: set[float]) -> None:
    panel = PowerPanel("norm", {0.0: {0: 1.0, 1: largest}}, {0.0: (1.0, None)}, log=True)
    (axes,) = plot_metrics_by_power([panel], tmp_path / "powers.png", title="norms").axes
    shown = {float(mark) for mark in axes.get_yticks()}
    assert shown > marks
    assert (2.0 in shown) == (largest < 1e4)


def test_small_multiples_share_a_scale_by_row(tmp_path: Path) -> None:
    def panel(title: str, **values: float) -> PowerPanel:
        by_power = {float(name[2:]): value for name, value in values.items()}
        return PowerPanel(
            "recall",
            {p: {0: v} for p, v in by_power.items()},
            {p: (v, None) for p, v in by_power.items()},
            title=title,
        )

    panels = [panel("a", p_0=0.1, p_2=0.2), panel("b", p_0=0.9), panel("c", p_2=5.0), panel("d"), panel("e", p_2=7.0)]
    figure = plot_metrics_by_power([*panels, None], tmp_path / "many.png", title="many", columns=2)
    a, b, c, d, e, _ = figure.axes
    assert [axes.get_title() for axes in figure.axes[:5]] == ["a", "b", "c", "d", "e"]
    assert [axes.get_visible() for axes in figure.axes] == [True] * 5 + [False]
    assert a.get_ylim() == b.get_ylim() != c.get_ylim() == d.get_ylim()
    assert a.get_ylim()[0] < 0.1
    assert a.get_ylim()[1] > 0.9
    assert [axes.get_ylabel() for axes in (a, b, c, d, e)] == ["recall", "", "recall", "", "recall"]
    shown = [axes.xaxis.get_major_ticks()[0].label1.get_visible() for axes in (a, b, c, d, e)]
    assert shown == [False, False, False, True, True]
    assert [label.get_text() for label in d.get_xticklabels()] == ["0", "2"]
    assert_is_picture(tmp_path / "many.png")


def test_loss_by_position_of_every_power_and_its_difference_from_none(tmp_path: Path) -> None:
    profiles = {4.0: profile(30, empty=(2,)), 0.0: profile(10), -0.5: profile(20)}
    figure = plot_loss_by_position_and_power(profiles, tmp_path / "loss.png", title="a comparison")
    losses, differences = figure.axes
    drawn = [np.asarray(line.get_ydata()) for line in differences.get_lines()]
    np.testing.assert_allclose(drawn[0], [-0.1] * 10)
    np.testing.assert_allclose(drawn[1], [-0.2 if k != 2 else math.nan for k in range(10)])
    np.testing.assert_array_equal(drawn[2], np.zeros(10))
    np.testing.assert_allclose(np.asarray(losses.get_lines()[2].get_ydata()), [4.9 - 0.1 * k for k in range(10)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["−0.5", "0", "4"]
    for line, power in zip(legend.get_lines(), (0, 2, 1), strict=True):
        assert to_rgb(line.get_color()) == to_rgb(losses.get_lines()[power].get_color()), "as in the panel"
    assert_is_picture(tmp_path / "loss.png")
    alone = plot_loss_by_position_and_power({4.0: profile(30)}, tmp_path / "alone.png", title="no p = 0")
    assert len(alone.axes) == 1


def test_curves_of_every_seed_and_their_mean(tmp_path: Path) -> None:
    curves = {
        "recall": {0.0: [{0: 0.0, 10: 0.4, 20: 0.5}, {0: 0.2, 10: 0.6}], 2.0: [{0: 0.1, 10: 0.9}]},
        "loss": {0.0: [{0: 3.0}, {0: 5.0}]},
    }
    figure = plot_curves_by_power(curves, tmp_path / "curves.png", title="a comparison")
    recall, loss = figure.axes
    thin = [np.asarray(line.get_ydata()).tolist() for line in recall.get_lines() if line.get_linewidth() < 1]
    thick = [np.asarray(line.get_ydata()).tolist() for line in recall.get_lines() if line.get_linewidth() > 1]
    assert thin == [[0.1, 0.9], [0.0, 0.4, 0.5], [0.2, 0.6]]
    assert thick == [[0.1, 0.9], [pytest.approx(0.1), pytest.approx(0.5)]]
    assert loss.get_lines()[-1].get_ydata() == [4.0]
    assert "step" in loss.get_xlabel()
    assert_is_picture(tmp_path / "curves.png")


def test_lightness_orders_the_powers(tmp_path: Path) -> None:
    """What is told apart by lightness is told apart under every colour blindness."""
    profiles = {power: profile(1) for power in (-1.0, 0.5, 1.0, 2.0, 4.0, 10.0, math.inf)}
    (legend,) = plot_loss_by_position_and_power(profiles, tmp_path / "loss.png", title="many").legends
    lightness = [np.dot(to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in legend.get_lines()]
    assert (np.diff(lightness) > 0.02).all()


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_weights(tmp_path / "weights.png")
    plot_curves_by_power({"recall": {0.0: [{0: 0.0, 9: 1.0}]}}, tmp_path / "curves.png", title="one")
    plot_loss_by_position([profile(0)], tmp_path / "loss.png")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_recall_is_drawn_from_the_first_position_on(tmp_path: Path) -> None:
    recalls = {"before training": [0.1, 0.2, 0.1], "step 9": [1.0, 0.5, 0.75]}
    figure = plot_recall_by_position(recalls, tmp_path / "recall.png")
    drawn = lines(figure.axes[0])
    assert {label: values.tolist() for label, values in drawn.items()} == recalls
    assert figure.axes[0].get_lines()[1].get_xdata()[0] == 1  # type: ignore[index]
    assert_is_picture(tmp_path / "recall.png")


def test_memory_functions_beside_the_target(tmp_path: Path) -> None:
    figure = plot_memory({"step 0": [0.0, 0.5], "step 9": [1.0, 0.25]}, [1.0, 0.0], tmp_path / "memory.png")
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].get_lines()}
    assert lines == {"target": [1.0, 0.0], "step 0": [0.0, 0.5], "step 9": [1.0, 0.25]}
    assert_is_picture(tmp_path / "memory.png")


def test_memory_functions_of_several_p(tmp_path: Path) -> None:
    memories = {0.0: [[0.0, 0.0], [1.0, 0.0]], 4.0: [[1.0, 0.5], [1.0, -0.1]]}
    figure = plot_memory_by_power(memories, [1.0, 0.5], tmp_path / "memory.png", title="a comparison")
    above, below = figure.axes
    curves = [np.asarray(line.get_ydata()).tolist() for line in above.get_lines()]
    expected = [[1.0, 0.5], [1.0, -0.1], [0.0, 0.0], [1.0, 0.0], [1.0, 0.2], [0.5, 0.0], [1.0, 0.5]]
    np.testing.assert_allclose(curves, expected, rtol=1e-6)
    errors = [np.asarray(line.get_ydata()).tolist() for line in below.get_lines()]
    np.testing.assert_allclose(errors, [[0.0, 0.3], [0.5, 0.5]], rtol=1e-6)
    assert_is_picture(tmp_path / "memory.png")


def test_where_the_loss_is_and_where_each_p_looks(tmp_path: Path) -> None:
    weights = {0.0: [0.5, 0.5], 2.0: [0.1, 0.9]}
    figure = plot_power_report([0.7, 0.3], weights, tmp_path / "powers.png", title="my data")
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert heights == pytest.approx([70, 30])
    curves = [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()]
    np.testing.assert_allclose(curves, [[10, 90], [50, 50]])
    assert_is_picture(tmp_path / "powers.png")

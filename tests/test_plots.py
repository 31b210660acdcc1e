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

from hf_temporal.plots import plot_loss_by_position, plot_weights
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


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_weights(tmp_path / "weights.png")
    plot_loss_by_position([profile(0)], tmp_path / "loss.png")
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before

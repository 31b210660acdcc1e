"""The statistics of a comparison over p, and its words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_temporal.compare.cells import Cell, power_name
from hf_temporal.compare.quantities import (
    Quantity,
    compare,
    direction_of,
    holm,
    mean_interval,
    number,
    paired_difference,
    quantities,
)

WORSE, BETTER, CLOSE = [0.5, 0.52, 0.49], [0.7, 0.71, 0.7], [0.52, 0.5, 0.5]


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def quantity(direction: int = 1, **values: list[float]) -> Quantity:
    """Values by p, p written as `p_4` for 4."""
    return Quantity("recall", direction, {float(name[2:]): by_seed(each) for name, each in values.items()})


def test_interval_of_the_mean_by_hand() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([0.7, 0.7, 0.7]) == (0.7, 0.7)
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, math.nan, 1.0]) is None


def test_paired_difference_by_hand_and_by_scipy() -> None:
    found = paired_difference({0: 3.0, 1: 5.0, 2: 4.0, 7: 9.0}, {0: 1.0, 2: 1.0, 1: 1.0, 5: 0.0})
    assert found.seeds == [0, 1, 2]
    assert (found.mean, found.usual, found.difference) == (4, 1, 3)
    assert found.d_z == pytest.approx(3.0)  # differences 2, 4, 3: mean 3, standard deviation 1
    assert found.interval == pytest.approx((3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5))
    assert found.p_value == pytest.approx(stats.ttest_rel([3, 5, 4], [1, 1, 1]).pvalue)


def test_ratios_are_compared_on_logarithms() -> None:
    steps = Quantity(
        "steps", -1, {0.0: by_seed([40.0, 100.0, 250.0]), 4.0: by_seed([10.0, 50.0, 50.0])}, is_ratio=True
    )
    found = compare(steps)[4.0]
    logs = np.log([[10, 50, 50], [40, 100, 250]])
    test = stats.ttest_rel(*logs)
    assert (found.mean, found.usual) == pytest.approx((25000 ** (1 / 3), 100))
    assert found.ratio == pytest.approx(40 ** (-1 / 3))  # of 1/4, 1/2, 1/5
    assert found.interval == pytest.approx(np.exp(test.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.difference is None
    assert steps.interval(4.0) == pytest.approx(np.exp(mean_interval(list(logs[0])) or ()))
    assert found.words == (
        "p = 4: better. 29.2 instead of 100 at p = 0, which is 0.292 times that [0.089, 0.958], d_z = −2.6, "
        "3 seeds; P-value 0.047."
    )


def test_the_same_steps_on_every_seed_are_their_mean_exactly() -> None:
    """A picture whose values differ by rounding alone has no axis."""
    steps = Quantity("steps", -1, {0.0: by_seed([20.0] * 3), 4.0: by_seed([30.0] * 3)}, is_ratio=True)
    assert (steps.mean(0.0), steps.interval(0.0)) == (20, (20, 20))
    assert (steps.mean(4.0), steps.interval(4.0)) == (30, (30, 30))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_cover_and_claims_are_rarely_false() -> None:
    """600 comparisons of three p that change nothing or, the last one, add 0.3, with seeds that differ more than p."""
    random = np.random.default_rng(0)
    covered, false_claims, repeats = 0, 0, 600
    for _ in range(repeats):
        seeds = random.normal(0, 3, 5)
        effects = {0.0: 0.0, 1.0: 0.0, 2.0: 0.0, 4.0: 0.3}
        values = {power: by_seed(list(seeds + effect + random.normal(0, 1, 5))) for power, effect in effects.items()}
        found = compare(Quantity("recall", 1, values))
        low, high = found[4.0].interval or (0, 0)
        covered += low < 0.3 < high
        false_claims += any(found[power].verdict != "not told apart" for power in (1.0, 2.0))
    assert 0.93 < covered / repeats < 0.97
    assert 0.005 < false_claims / repeats < 0.06


@pytest.mark.parametrize(
    ("direction", "values", "verdict"),
    [
        (1, BETTER, "better"),
        (-1, BETTER, "worse"),
        (0, BETTER, "higher"),
        (1, [0.1, 0.12, 0.1], "worse"),
        (-1, [0.1, 0.12, 0.1], "better"),
        (0, [0.1, 0.12, 0.1], "lower"),
        (1, CLOSE, "not told apart"),
    ],
)
def test_verdicts(direction: int, values: list[float], verdict: str) -> None:
    found = compare(quantity(direction, p_0=WORSE, p_2=values))[2.0]
    assert found.verdict == verdict
    assert found.words.startswith(f"p = 2: {verdict}.")


def test_more_powers_make_claims_harder() -> None:
    marginal = [0.62, 0.58, 0.6]
    alone = compare(quantity(p_0=WORSE, p_2=marginal))[2.0]
    among = compare(quantity(p_0=WORSE, p_2=marginal, p_4=CLOSE))[2.0]
    assert alone.p_value == among.p_value
    assert among.holm == pytest.approx(2 * (alone.holm or 0))
    assert (alone.verdict, among.verdict) == ("better", "not told apart")


def test_words_hold_the_size_of_the_effect() -> None:
    words = compare(quantity(p_0=WORSE, p_4=BETTER))[4.0].words
    assert words == (
        "p = 4: better. 0.703 instead of 0.503 at p = 0, which is +0.200 [+0.175, +0.225], d_z = 20.0, 3 seeds; "
        "P-value below 0.001."
    )


@pytest.mark.parametrize(
    ("usual", "values", "expected"),
    [
        ([0.5], [0.9], "p = 4: no claim from one seed. 0.900 instead of 0.500 at p = 0, which is +0.400."),
        (
            [0.5, 0.6],
            [0.7, 0.8],
            "p = 4: not told apart. 0.750 instead of 0.550 at p = 0, which is +0.200 on all 2 seeds alike, of which "
            "only the sign is tested; P-value 0.500.",
        ),
        (
            [1.0] * 3,
            [1.0] * 3,
            "p = 4: not told apart. 1 instead of 1 at p = 0, which is 0 on all 3 seeds alike, of which only the sign "
            "is tested; P-value 1.000.",
        ),
        ([0.5, 0.6], [math.nan, 0.7], "p = 4: not compared. A run ended without a finite value."),
        ([0.5, 0.6], [math.inf, 0.7], "p = 4: not compared. A run ended without a finite value."),
        ([], [0.7], "p = 4: not compared. No seed is finished both here and at p = 0."),
    ],
)
def test_words_where_the_data_say_little(usual: list[float], values: list[float], expected: str) -> None:
    found = compare(quantity(p_0=usual, p_4=values))[4.0]
    assert found.words == expected
    assert found.verdict == ("not told apart" if "not told apart" in expected else "not compared")
    assert (found.holm is None) == (found.verdict == "not compared")


def test_the_same_difference_on_many_seeds_is_told_apart_by_its_sign() -> None:
    assert compare(quantity(p_0=[0.5] * 6, p_4=[0.7] * 6))[4.0].p_value == 2**-5
    assert compare(quantity(p_0=[0.5] * 6, p_4=[0.7] * 6))[4.0].verdict == "better"


def test_directions() -> None:
    assert [direction_of(name) for name in ("recall", "rouge1", "exact_match")] == [1, 1, 1]
    assert [direction_of(name) for name in ("loss", "head_loss", "long_memory_error", "perplexity", "empty")] == [
        -1
    ] * 5
    assert direction_of("gen_len") == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.0, "1,234"),
        (27.34, "27.3"),
        (0.98349, "0.983"),
        (-0.00042, "−0.0004"),
        (0.0017, "0.0017"),
        (60 - 1e-13, "60"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("power", "name"), [(0.5, "0.5"), (4.0, "4"), (-1.0, "-1"), (math.inf, "inf"), (0.0, "0")])
def test_names_of_powers_are_read_back(power: float, name: str) -> None:
    assert power_name(power) == name
    assert float(name) == power


def test_steps_until_reached(tmp_path: Path) -> None:
    """Budget 30, since one run was evaluated no further: what is reached later counts as not reached."""
    curves = {
        (0.0, 0): {0: 0.1, 10: 0.2, 20: 0.3, 30: 0.4, 40: 0.9},
        (0.0, 1): {0: 0.1, 10: 0.2, 30: 0.8},
        (2.0, 0): {0: 0.1, 10: 0.9, 20: 0.3, 30: 0.5},
        (2.0, 1): {0: 0.8, 10: 0.9, 20: 0.9, 30: 0.9},
    }
    runs = {
        Cell(power, seed, tmp_path): {step: {"recall": value, "loss": 1 - value} for step, value in curve.items()}
        for (power, seed), curve in curves.items()
    }
    recall, steps, loss = quantities(runs, "recall", 0.8)
    assert recall.values == {0.0: {0: 0.9, 1: 0.8}, 2.0: {0: 0.5, 1: 0.9}}
    assert (loss.title, loss.direction) == ("loss", -1)
    assert steps.title == "steps until recall ≥ 0.8"
    assert steps.values == {0.0: {0: 30, 1: 30}, 2.0: {0: 10, 1: 1}}
    assert steps.bounds == {(0.0, 0)}
    assert (steps.budget, steps.direction) == (30, -1)
    assert "(runs that took longer than 30 count as that: 0 of 2, at p = 0 1 of 2)" in compare(steps)[2.0].words
    _, falling, *_ = quantities(runs, "loss", 0.25)
    assert falling.title == "steps until loss ≤ 0.25"
    assert falling.values == steps.values

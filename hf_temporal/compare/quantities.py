"""The statistics of a comparison: each p is tested against p = 0 on the same seeds, and the result said in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from .cells import Cell, Evaluations, curve, power_name

ALPHA = 0.05
THIRDS = ("short", "middle", "long")
SAME = 1e-9  # Differences whose range is less than this share of the values count as equal.
LOWER_IS_BETTER = ("loss", "error", "perplexity", "empty")
NEITHER_IS_BETTER = ("gen_len", "grad_norm", "grad_norm_spread")
RATIOS = ("memory_error", "gradient_error", "grad_norm")  # These span orders of magnitude.
# Metrics that are reported beside the one that decides, where every run measured them, with their titles.
BESIDE = {
    **{f"{third}_{kind}_error": f"{kind} error, {third} lags" for kind in ("memory", "gradient") for third in THIRDS},
    "loss": "loss",
    "first_token_loss": "loss, first token",
    "head_loss": "loss, first quarter",
    "tail_loss": "loss, last quarter",
    "last_token_loss": "loss, last token",
    "gen_len": "generated tokens",
    "empty": "empty texts",
    "grad_norm": "gradient norm",
    "grad_norm_spread": "spread of the gradient norm",
}

Values = dict[float, dict[int, float]]


@dataclass(frozen=True)
class Quantity:
    """One measured quantity of all runs."""

    title: str
    direction: int  # 1: higher is better, −1: lower is better, 0: neither
    values: Values  # by p, then by seed
    bounds: frozenset[tuple[float, int]] = frozenset()  # p and seed of the runs that did not reach the goal
    budget: float = math.inf  # the number of steps that counts for such runs
    is_ratio: bool = False  # means and tests on logarithms: geometric means, differences that are ratios

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Quantity:
        """Read one of the `quantities` of a `summary.json`."""
        values = {
            float(row["power"]): {int(seed): number_of(value) for seed, value in row["values"].items()}
            for row in record["by_power"]
        }
        bounds = frozenset((float(row["power"]), seed) for row in record["by_power"] for seed in row["not_reached"])
        budget = max((values[power][seed] for power, seed in bounds), default=math.inf)
        return cls(record["title"], record["direction"], values, bounds, budget, record["scale"] == "ratio")

    def mean(self, power: float) -> float:
        return self._back(fmean(self._scaled(power).values()))

    def interval(self, power: float) -> tuple[float, float] | None:
        found = mean_interval(list(self._scaled(power).values()))
        return found and (self._back(found[0]), self._back(found[1]))

    def against_0(self, power: float) -> Difference:
        """Compare this p with p = 0; the verdict is left open."""
        found = paired_difference(self._scaled(power), self._scaled(0.0))
        if not self.is_ratio or found.mean is None or found.usual is None or found.difference is None:
            return found
        interval = found.interval and (self._back(found.interval[0]), self._back(found.interval[1]))
        mean, usual, ratio = map(self._back, (found.mean, found.usual, found.difference))
        return replace(found, mean=mean, usual=usual, difference=None, ratio=ratio, interval=interval)

    def _scaled(self, power: float) -> dict[int, float]:
        values = self.values.get(power, {})
        if not self.is_ratio:
            return values
        return {seed: math.log(value) if value > 0 else math.nan for seed, value in values.items()}

    def _back(self, value: float) -> float:
        return float(f"{math.exp(value):.12g}") if self.is_ratio else value  # 20, not 20.000000000000004


def number_of(value: float | str | None) -> float:
    """Read a number of a `summary.json`, where "inf" stands for infinity and null for NaN."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Difference:
    """A p compared with p = 0 on the seeds that both have; None stands for what these seeds cannot tell.

    The P-value is that of the two-sided paired t-test; where the difference is the same on every seed, for which that
    is undefined, it is that of the sign alone, 2^(1 − seeds).
    """

    seeds: list[int]
    mean: float | None = None
    usual: float | None = None  # the mean at p = 0
    difference: float | None = None  # mean over seeds of (value at p − value at p = 0)
    ratio: float | None = None  # in its place by ratio: the geometric mean of (value at p / value at p = 0)
    interval: tuple[float, float] | None = None  # of the difference or ratio: the 95 % t interval
    d_z: float | None = None  # mean difference / standard deviation of the differences; by ratio, of the logarithms
    p_value: float | None = None
    holm: float | None = None  # the P-value corrected for the number of p compared
    verdict: str = "not compared"  # or better, worse (higher, lower where neither is better), not told apart
    words: str = ""


def direction_of(metric: str) -> int:
    """Return 1 where higher is better, −1 where lower is better, 0 where neither is."""
    return 0 if metric in NEITHER_IS_BETTER else -1 if metric.endswith(LOWER_IS_BETTER) else 1


def title_of(metric: str) -> str:
    """The metric's name in reports and pictures."""
    return BESIDE.get(metric, metric)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval x̄ ± t_{0.975, n−1} · s/√n; None for a single value or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    if np.ptp(values) <= SAME * np.abs(values).max():
        return values[0], values[0]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(1 - ALPHA)
    return float(low), float(high)


def paired_difference(values: Mapping[int, float], usual: Mapping[int, float]) -> Difference:
    """Compare values by seed with those at p = 0; verdict, words and correction are left open."""
    seeds = sorted(values.keys() & usual.keys())
    pairs = np.array([(values[seed], usual[seed]) for seed in seeds]).reshape(-1, 2)
    if not seeds or not np.isfinite(pairs).all():
        return Difference(seeds)
    differences = pairs[:, 0] - pairs[:, 1]
    mean, mean_usual = pairs.mean(0).tolist()
    found = Difference(seeds, mean, mean_usual, float(differences.mean()))
    if len(seeds) == 1:
        return found
    same = SAME * np.abs(pairs).max()
    if np.ptp(differences) <= same:
        return replace(found, p_value=1.0 if np.abs(differences).max() <= same else 2.0 ** (1 - len(seeds)))
    return replace(
        found,
        interval=mean_interval(differences.tolist()),
        d_z=float(differences.mean() / differences.std(ddof=1)),
        p_value=float(stats.ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct P-values for their number (Holm, 1979).

    With p_(1) ≤ … ≤ p_(m): p_(k) → max_{j ≤ k} min(1, (m − j + 1) p_(j)).
    """
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(np.sort(p_values) * np.arange(len(p_values), 0, -1))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def compare(quantity: Quantity) -> dict[float, Difference]:
    """Test every other p against p = 0, and correct for their number."""
    found = {power: quantity.against_0(power) for power in quantity.values if power != 0}
    tested = {power: each.p_value for power, each in found.items() if each.p_value is not None}
    for power, corrected in zip(tested, holm([*tested.values()]), strict=True):
        verdict = _verdict(found[power], quantity.direction) if corrected < ALPHA else "not told apart"
        found[power] = replace(found[power], holm=corrected, verdict=verdict)
    return {power: replace(each, words=_words(quantity, power, each)) for power, each in found.items()}


def _verdict(found: Difference, direction: int) -> str:
    rises = (found.mean or 0.0) > (found.usual or 0.0)
    better, worse = ("better", "worse") if direction else ("higher", "lower")
    return better if rises == (direction >= 0) else worse


def quantities(runs: Mapping[Cell, Evaluations], metric: str, reach: float | None) -> list[Quantity]:
    """The metric at the end of every run, the steps until it reaches `reach`, and the metrics of `BESIDE`.

    Steps are counted up to a budget, the last step at which every run was evaluated. A run that does not reach the
    value counts with the whole budget, so that means and tests are of min(steps, budget), which is known exactly for
    every run. A run that is there before its first step counts with 1. Steps are compared by ratio.
    """
    last = {cell: evaluations[max(evaluations)] for cell, evaluations in runs.items()}
    everywhere = set.intersection(*map(set, last.values()))
    names = [metric, *(name for name in BESIDE if name in everywhere - {metric})]
    compared = [
        Quantity(
            title_of(name),
            direction_of(name),
            _by_power({cell: found[name] for cell, found in last.items()}),
            is_ratio=name.endswith(RATIOS),
        )
        for name in names
    ]
    if reach is not None:
        compared.insert(1, _steps_until(reach, metric, {cell: curve(runs[cell], metric) for cell in runs}))
    return compared


def _steps_until(reach: float, metric: str, curves: Mapping[Cell, Mapping[int, float]]) -> Quantity:
    sign = direction_of(metric)
    budget = min(max(values) for values in curves.values())
    reached = {
        cell: [step for step, value in values.items() if step <= budget and sign * value >= sign * reach]
        for cell, values in curves.items()
    }
    return Quantity(
        f"steps until {title_of(metric)} {'≥' if sign > 0 else '≤'} {reach:g}",
        direction=-1,
        values=_by_power({cell: float(max(1, min(steps, default=budget))) for cell, steps in reached.items()}),
        bounds=frozenset((cell.power, cell.seed) for cell, steps in reached.items() if not steps),
        budget=budget,
        is_ratio=True,
    )


def _by_power(values: Mapping[Cell, float]) -> Values:
    powers = sorted({cell.power for cell in values})
    return {power: {cell.seed: value for cell, value in values.items() if cell.power == power} for power in powers}


def _words(quantity: Quantity, power: float, found: Difference) -> str:
    start, runs = f"p = {power_name(power)}:", len(found.seeds)
    if not runs:
        return f"{start} not compared. No seed is finished both here and at p = 0."
    if found.mean is None or found.usual is None:
        return f"{start} not compared. A run ended without a finite value."
    means = f"{number(found.mean)} instead of {number(found.usual)} at p = 0"
    missed = [[seed for seed in found.seeds if (each, seed) in quantity.bounds] for each in (power, 0.0)]
    if any(missed):
        here, usual = (f"{len(seeds)} of {runs}" for seeds in missed)
        means += f" (runs that took longer than {number(quantity.budget)} count as that: {here}, at p = 0 {usual})"
    show = _signed if found.ratio is None else number
    effect = _signed(found.difference or 0.0) if found.ratio is None else f"{number(found.ratio)} times that"
    if runs == 1:
        return f"{start} no claim from one seed. {means}, which is {effect}."
    if found.interval is None:
        change = f"{effect} on all {runs} seeds alike, of which only the sign is tested"
    else:
        low, high = map(show, found.interval)
        d_z = f"{found.d_z or 0.0:.1f}".replace("-", "−")
        change = f"{effect} [{low}, {high}], d_z = {d_z}, {runs} seeds"
    corrected = found.holm or 0.0
    probability = "below 0.001" if corrected < 0.001 else f"{corrected:.3f}"
    return f"{start} {found.verdict}. {means}, which is {change}; P-value {probability}."


def number(value: float) -> str:
    """Round by size: 0.0004, 0.983, 27.3, 1,234; a whole number gets no decimals."""
    if not math.isfinite(value):
        return "not finite"
    value = float(f"{value:.9g}")
    styles = ((100, ",.0f"), (10, ".1f"), (0.01, ".3f"), (0.001, ".4f"), (0, ".1g"))
    style = ",.0f" if value == round(value) else next(style for least, style in styles if abs(value) >= least)
    return format(value, style).replace("-", "−")


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)

"""What a comparison over p leaves: `summary.json`, `summary.md` and three pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_temporal.finetuning.tables import environment, table

from .cells import Cell, Evaluations, power_name
from .pictures import PICTURES, draw_comparison
from .quantities import ALPHA, RATIOS, Difference, Quantity, compare, number, quantities

SUMMARY_NAME = "summary.json"
REPORT_NAME = "summary.md"
HARDWARE = ("processor", "cores", "accelerator")
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
UNTOLD = ("not told apart", "not compared")
_NOTES = f"""\
- In the table: mean over seeds and its 95 % t interval; ↑ higher is better, ↓ lower is better. A cell without a word
  is not told apart from p = 0.
- Each p is compared with p = 0 on the same seeds by a paired t-test, two-sided. What stands in brackets behind a
  difference is its 95 % t interval; d_z is the mean difference divided by the differences' standard deviation.
- P-values are corrected for the number of p (Holm), not for the number of {{other}}; intervals are not corrected. Told
  apart is what has a corrected P-value below {ALPHA}. Not told apart does not mean equal: the interval says what is
  possible.
- A difference that is the same on every seed leaves the t-test nothing to estimate noise from. Its P-value is that of
  its sign, 2^(1 − seeds)."""
_STEPS_NOTE = """
- Steps are those of the first evaluation that shows the value, as fine as evaluations are dense. A run that does not
  get there within the steps that all runs have counts as having taken them all, in means and tests alike: what is
  compared is min(steps, budget), which needs no guess at when such a run would have got there.
- Steps are compared by ratio, as times to an event usually are: means are geometric, and the t-test is that of the
  logarithms."""
_ERRORS_NOTE = """
- Memory errors are root mean squares over the short, the middle and the long third of the lags. They and gradient
  norms are compared by ratio: means are geometric, and the t-test is that of the logarithms."""

Found = tuple[Quantity, dict[float, Difference]]


@dataclass(frozen=True)
class Outcome:
    """A comparison as it stands.

    Args:
        title: of report and pictures.
        metric: the one that decides, and `reach` the value of it that steps are counted to.
        cells: the whole grid.
        failed: exit status of the cells that failed just now.
        commands: of the comparison, and of its first cell.
        settings: as kept in the folder.
    """

    title: str
    metric: str
    reach: float | None
    cells: Sequence[Cell]
    failed: Mapping[Cell, int]
    commands: tuple[str, str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """What decides, and all that was found in words and as a table."""

    decisive: Sequence[Found]
    words: str


def write_summary(outcome: Outcome, output_dir: Path) -> Findings:
    """Write all five files from the cells that are finished.

    `summary.json`, in which "inf" stands for infinity and null for NaN or for what the data cannot say:

    - `version` 2, `title`, `metric`, `reach`, `commands`, `settings` (the recipe, its configuration and the flags
      beside it), `environment` (date, system, hardware, versions);
    - `powers`, `seeds`;
    - `cells`: of each p and seed `power`, `seed`, `folder`, `state` ("finished", "failed" or "not run"),
      `exit_status` (of one that failed), `step` and `metrics` (of the last evaluation);
    - `quantities`: of each `title`, `direction` (1: higher is better, −1: lower, 0: neither), `scale` ("difference" or
      "ratio") and `by_power`: `power`, `values` (by seed), `not_reached` (the seeds whose value is the budget of
      steps), `mean` (geometric where the scale is that of ratios), `interval` (95 %), and for p ≠ 0 `against_0` with
      `seeds`, `mean`, `usual`, `difference` or `ratio`, `interval`, `d_z`, `p_value`, `holm`, `verdict` and `words`,
      see `recipes.comparison.Difference`.

    Raises ValueError where no cell is finished, or one has no evaluation with the metric.
    """
    runs = {cell: cell.evaluations(outcome.metric) for cell in outcome.cells if cell.finished}
    if not runs:
        raise ValueError(f"{output_dir} holds no finished cell; accepted: one or more")
    found = [(each, compare(each)) for each in quantities(runs, outcome.metric, outcome.reach)]
    summary = _summary(outcome, runs, found)
    write_plain_json(output_dir / SUMMARY_NAME, summary)
    decisive = found[: 1 if outcome.reach is None else 2]
    pictures = draw_comparison(outcome.title, outcome.metric, runs, [quantity for quantity, _ in decisive], output_dir)
    findings = f"{_conclusions(decisive)}\n\n{_results_table(found)}"
    report = _report(outcome, findings, summary["environment"], pictures)
    (output_dir / REPORT_NAME).write_text(report, encoding="utf-8")
    return Findings(decisive, findings)


# ---- summary.json


def _summary(outcome: Outcome, runs: Mapping[Cell, Evaluations], found: Sequence[Found]) -> dict[str, Any]:
    return {
        "version": 2,
        "title": outcome.title,
        "metric": outcome.metric,
        "reach": outcome.reach,
        "powers": sorted({cell.power for cell in outcome.cells}),
        "seeds": sorted({cell.seed for cell in outcome.cells}),
        "quantities": [quantity_record(quantity, differences) for quantity, differences in found],
        "cells": [_cell_state(outcome, cell, runs.get(cell)) for cell in outcome.cells],
        "commands": outcome.commands,
        "settings": outcome.settings,
        "environment": environment(),
    }


def quantity_record(quantity: Quantity, differences: Mapping[float, Difference]) -> dict[str, Any]:
    """One of `quantities` in `summary.json`."""
    return {
        "title": quantity.title,
        "direction": quantity.direction,
        "scale": "ratio" if quantity.is_ratio else "difference",
        "by_power": [_row(quantity, power, differences.get(power)) for power in quantity.values],
    }


def _row(quantity: Quantity, power: float, difference: Difference | None) -> dict[str, Any]:
    values = quantity.values[power]
    row: dict[str, Any] = {
        "power": power,
        "values": values,
        "not_reached": [seed for seed in values if (power, seed) in quantity.bounds],
        "mean": quantity.mean(power),
        "interval": quantity.interval(power),
    }
    return row | ({"against_0": asdict(difference)} if difference else {})


def _cell_state(outcome: Outcome, cell: Cell, evaluations: Evaluations | None) -> dict[str, Any]:
    state: dict[str, Any] = {"power": cell.power, "seed": cell.seed, "folder": cell.name}
    if evaluations:
        step = max(evaluations)
        return state | {"state": "finished", "step": step, "metrics": evaluations[step]}
    if cell in outcome.failed:
        return state | {"state": "failed", "exit_status": outcome.failed[cell]}
    return state | {"state": "not run"}


def write_plain_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write it in terms of JSON, see `_plain`."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value in terms of JSON, which has no infinity ("inf" stands for it) and no NaN (null)."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# ---- summary.md


def _report(outcome: Outcome, findings: str, about: Mapping[str, Any], pictures: Sequence[str]) -> str:
    parts = [
        f"# {outcome.title}: which p?",
        findings,
        missing_cells(outcome),
        *(f"![{PICTURES[name]}]({name})" for name in pictures),
        how_to_read(outcome, uncorrected="columns"),
        how_it_was_made(outcome, about),
    ]
    return "\n\n".join(parts) + "\n"


def how_to_read(outcome: Outcome, *, uncorrected: str) -> str:
    """The section on statistics; P-values are not corrected for the number of `uncorrected`."""
    notes = _NOTES.format(other=uncorrected) + (_STEPS_NOTE if outcome.reach is not None else "")
    notes += _ERRORS_NOTE if outcome.metric.endswith(RATIOS) else ""
    return f"## How to read it\n\n{notes}"


def how_it_was_made(outcome: Outcome, about: Mapping[str, Any]) -> str:
    """The section on commands, hardware and versions."""
    seeds = sorted({cell.seed for cell in outcome.cells})
    comparison, cell = outcome.commands
    hardware = ", ".join(f"{name} {value}" for name, value in about["hardware"].items() if name in HARDWARE)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n\n".join(
        [
            "## How it was made",
            f"```\n{comparison}\n```",
            "Each cell is one command with its own p, seed and folder, `--dry_run` prints them all; the first:",
            f"```\n{cell}\n```",
            f"- seeds: {', '.join(map(str, seeds))}\n- hardware: {hardware}\n- versions: {versions}\n"
            f"- summary of {about['date']}",
        ]
    )


def _conclusions(found: Sequence[Found]) -> str:
    """One line per quantity that sorts the p by verdict, then one sentence per p."""
    lines = []
    for quantity, differences in found:
        lines.append(f"**{quantity.title}**, compared with p = 0: {conclusion(differences)}.\n")
        lines += [f"- {difference.words}" for difference in differences.values()]
        lines.append("")
    return "\n".join(lines).rstrip()


def conclusion(differences: Mapping[float, Difference]) -> str:
    """The p sorted by verdict."""
    by_verdict: dict[str, list[str]] = {}
    for power, difference in sorted(differences.items(), key=lambda item: (item[1].verdict in UNTOLD, item[0])):
        by_verdict.setdefault(difference.verdict, []).append(power_name(power))
    found = "; ".join(f"{verdict} at p = {', '.join(powers)}" for verdict, powers in by_verdict.items())
    return found or "no other p is finished"


def _results_table(found: Sequence[Found]) -> str:
    columns = ["p", "seeds", *(f"{quantity.title}{ARROWS[quantity.direction]}" for quantity, _ in found)]
    rows = []
    for power, values in found[0][0].values.items():
        cells = [table_cell(quantity, power, differences.get(power)) for quantity, differences in found]
        rows.append(dict(zip(columns, [power_name(power), str(len(values)), *cells], strict=True)))
    return table(rows, columns)


def table_cell(quantity: Quantity, power: float, difference: Difference | None) -> str:
    """Mean, interval and, where it is told apart from p = 0, the verdict."""
    values = quantity.values[power]
    missed = sum((power, seed) in quantity.bounds for seed in values)
    if missed == len(values):
        text = f"> {number(quantity.budget)}"
    else:
        text = number(quantity.mean(power))
        if interval := quantity.interval(power):
            text += f" [{number(interval[0])}, {number(interval[1])}]"
        if missed:
            text += f", {missed} of {len(values)} > {number(quantity.budget)}"
    told = difference is not None and difference.verdict not in UNTOLD
    return f"{text} **{difference.verdict}**" if difference is not None and told else text


def missing_cells(outcome: Outcome) -> str:
    """Which are not finished."""
    missing = [cell for cell in outcome.cells if not cell.finished]
    if not missing:
        return f"All {len(outcome.cells)} cells are finished."
    names = [
        f"p = {power_name(cell.power)} with seed {cell.seed}"
        + (f" (failed with exit status {outcome.failed[cell]})" if cell in outcome.failed else "")
        for cell in missing
    ]
    return f"Not finished, {len(missing)} of {len(outcome.cells)} cells: {'; '.join(names)}."

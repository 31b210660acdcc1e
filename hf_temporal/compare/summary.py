"""`summary.json`: all that a comparison found, from which its report and its pictures are made."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_temporal.hub.privacy import without_tokens
from hf_temporal.tables import environment

from .cells import Cell, Evaluations, curve
from .grid import Comparison
from .quantities import Quantity, compare, quantities

SUMMARY_NAME = "summary.json"
VERSION = 3


def summary_of(comparison: Comparison, command: str, failed: Mapping[Cell, int]) -> dict[str, Any]:
    """The summary of the finished cells, ready to be written as JSON.

    In it "inf" stands for infinity, and null for NaN and for what the data cannot tell:

    - `version` 3, `title`, `metric`, `reach`, `powers`, `seeds`, `commands` (of the comparison and of its first cell),
      `settings` (the recipe, its configuration and further flags), `environment` (date, system, hardware, versions);
    - `cells`: for each p and seed `power`, `seed`, `folder`, `state` ("finished", "failed" or "not run") and
      `exit_status` (if it failed). A finished one has `step` and `metrics` of its last evaluation and, for the
      pictures, `curves` (the metric and the loss by step) and, where the run has them, `bins` (the loss by position)
      and `memory` with `target_memory`;
    - `quantities`: for each `title`, `direction` (1: higher is better, −1: lower, 0: neither), `scale` ("difference"
      or "ratio") and `by_power`: `power`, `values` (by seed), `not_reached` (the seeds whose value is the budget of
      steps), `mean` (geometric on the scale of ratios), `interval` (95 %), and for p ≠ 0 `against_0` with the fields
      of `hf_temporal.compare.quantities.Difference`.

    Where flags are varied, `combinations` takes the place of these two. Each has `values` (the varied values by name),
    `folder`, `cells`, `quantities` and `command` (of its first cell).

    A finished cell that has no evaluation with the metric is a `ValueError`.
    """
    arguments, cells = comparison.arguments, comparison.cells()
    first, of_first = next(iter(cells.items()))
    parts = [_part(each, failed) for each in comparison.combinations()]
    summary = {
        "version": VERSION,
        "title": comparison.output_dir.name,
        "metric": arguments.metric,
        "reach": arguments.reach,
        "powers": sorted(arguments.powers),
        "seeds": sorted(arguments.seeds),
        **({"combinations": parts} if arguments.vary else {name: parts[0][name] for name in ("quantities", "cells")}),
        "commands": [without_tokens(command), without_tokens(of_first.shown(first))],
        "settings": comparison.settings(),
        "environment": environment(),
    }
    return dict(_plain(summary))


def read_summary(path: Path) -> dict[str, Any]:
    """Read a `summary.json`, or raise a `ValueError` where it is none, or one of another version."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = f"{str(path)!r} is no summary of a comparison ({error!r})"
        raise ValueError(f"{given}; accepted: a summary.json") from None
    if version != VERSION:
        raise ValueError(f"{str(path)!r} is a summary of version {version}; accepted: version {VERSION}")
    return found


def _part(comparison: Comparison, failed: Mapping[Cell, int]) -> dict[str, Any]:
    """The cells and quantities of one combination."""
    metric, cells = comparison.arguments.metric, list(comparison.cells())
    runs = {cell: cell.evaluations(metric) for cell in cells if cell.finished}
    compared = quantities(runs, metric, comparison.arguments.reach) if runs else []
    return {
        "values": comparison.values,
        "folder": comparison.output_dir.name,
        "quantities": [_quantity(each) for each in compared],
        "cells": [_cell(cell, metric, runs.get(cell), failed.get(cell)) for cell in cells],
        "command": without_tokens(comparison.shown(cells[0])),
    }


def _quantity(quantity: Quantity) -> dict[str, Any]:
    differences = compare(quantity)
    by_power = [
        {
            "power": power,
            "values": values,
            "not_reached": [seed for seed in values if (power, seed) in quantity.bounds],
            "mean": quantity.mean(power),
            "interval": quantity.interval(power),
            **({"against_0": asdict(differences[power])} if power in differences else {}),
        }
        for power, values in quantity.values.items()
    ]
    scale = "ratio" if quantity.is_ratio else "difference"
    return {"title": quantity.title, "direction": quantity.direction, "scale": scale, "by_power": by_power}


def _cell(cell: Cell, metric: str, evaluations: Evaluations | None, exit_status: int | None) -> dict[str, Any]:
    about: dict[str, Any] = {"power": cell.power, "seed": cell.seed, "folder": cell.name}
    if not evaluations:
        failed = exit_status is not None
        return {**about, **({"state": "failed", "exit_status": exit_status} if failed else {"state": "not run"})}
    last = max(evaluations)
    curves = {name: curve(evaluations, name) for name in dict.fromkeys([metric, "loss"])}
    return {
        **about,
        "state": "finished",
        "step": last,
        "metrics": evaluations[last],
        "curves": {name: values for name, values in curves.items() if values},
        **cell.drawn(),
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it: "inf" for infinity, null for NaN."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

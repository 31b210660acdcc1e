"""Several comparisons over p merged: tasks by models by ways of weighting, each against p = 0 on the same seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_temporal.tables import environment

from .cells import power_name
from .grid import flag_name
from .quantities import ALPHA, Difference, Quantity, compare, holm, number_of
from .summary import read_summary

USUAL = "p = 0"
# What differs between the runs of a comparison; and with its default what may differ between those of a task.
OF_A_RUN = ("output_dir", "seed", "temporal_power")
OF_A_COLUMN = {"temporal_mixture": "1", "temporal_power_schedule": "constant", "temporal_power_start": "0"}

Settings = frozenset[tuple[str, str]]


class Column(NamedTuple):
    """How the runs of a column are weighted."""

    mixture: float
    schedule: str
    start: float
    power: float

    @property
    def name(self) -> str:
        is_constant = self.schedule == "constant"
        powers = "" if is_constant else f"{power_name(self.start)} → "
        parts = [f"λ = {self.mixture:g}"] if self.mixture < 1 else []
        parts += [f"p = {powers}{power_name(self.power)}"]
        return ", ".join(parts if is_constant or self.schedule == "linear" else [*parts, self.schedule])

    @property
    def is_a_mixed_0(self) -> bool:
        return self.mixture < 1 and self.schedule == "constant" and self.power == 0


@dataclass(frozen=True)
class Outcome:
    """How a column of a row compares with p = 0."""

    quantity: Quantity  # the one that decides
    found: Difference
    loss: Difference

    def verdict(self, *, of_loss: bool) -> str:
        return (self.loss if of_loss else self.found).verdict

    def record(self) -> dict[str, Any]:
        """The outcome as JSON has it; the words of a difference speak of p and are left out."""
        differences = {"against_0": asdict(self.found), "loss_against_0": asdict(self.loss)}
        for each in differences.values():
            del each["words"]
        return {"decided_by": self.quantity.title, **differences}


@dataclass(frozen=True)
class Row:
    """A model on a task. In its quantities the number of the column takes the place of p; that of p = 0 is 0."""

    model: str
    metric: Quantity
    steps: Quantity
    outcomes: Mapping[int, Outcome]

    def seeds(self, column: int) -> list[int]:
        return self.outcomes[column].found.seeds if column in self.outcomes else []


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """What the summaries hold, task by task and model by model, ready to be written as JSON.

    It has `metric`, `reach`, `columns` (their names, p = 0 first), `tasks`, `commands` and `environment`. Each task
    has `title` and `models`, and each of these `model`, `quantities` (as in a summary, with `by_column` in the place
    of `by_power`) and `compared`: by column the title of the quantity that decides (`decided_by`), `against_0` and
    `loss_against_0` with the fields of `hf_temporal.compare.quantities.Difference`.

    Raises:
        ValueError: A file is no summary, has another metric or goal than the first or none, has a run that another
            file has with other values, or is of a task of which no file has p = 0.
    """
    summaries = {path: read_summary(path) for path in paths}
    first = summaries[paths[0]]
    tasks: dict[Settings, Task] = {}
    columns: set[Column] = set()
    for path, summary in summaries.items():
        _check_goal(path, summary, paths[0], first)
        titles = (*_deciding(summary), "loss")
        for part in summary.get("combinations", [summary]):
            settings, model, how = _settings(summary, part.get("values", {}))
            task = tasks.setdefault(settings, Task(path))
            for quantity in part["quantities"]:
                for record in quantity["by_power"]:
                    column = _column(how, number_of(record["power"]))
                    if quantity["title"] in titles and not column.is_a_mixed_0:
                        columns.add(column)
                        task.add(path, model, column.name, quantity, record)
                        if column.name == USUAL:
                            task.title = task.title or summary["title"]
    for settings, task in tasks.items():
        if not task.title:
            others = [other for other, each in tasks.items() if each.title]
            raise ValueError(f"{str(task.path)!r} has no {USUAL} to be compared with; {_accepted(settings, others)}")
    content = {
        "metric": first["metric"],
        "reach": first["reach"],
        "columns": [each.name for each in sorted(columns, key=lambda each: (-each.mixture, each[1:]))],
        "tasks": [
            {
                "title": task.title,
                "models": [{"model": name, "quantities": [*each.values()]} for name, each in task.models.items()],
            }
            for task in tasks.values()
        ],
        "commands": [summary["commands"][0] for summary in summaries.values()],
        "environment": environment(),
    }
    for each in content["tasks"]:
        for model, row in zip(each["models"], rows_of(content, each), strict=True):
            model["compared"] = {content["columns"][index]: one.record() for index, one in row.outcomes.items()}
    return content


@dataclass
class Task:
    """What was measured on a task, as it is gathered."""

    path: Path  # of the first summary
    title: str = ""  # of the first summary with p = 0
    models: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # by model, then by title: quantities

    def add(self, path: Path, model: str, column: str, quantity: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Take in the values of a column, or raise a `ValueError` where a seed has another one already."""
        title = quantity["title"]
        about = {name: quantity[name] for name in ("title", "direction", "scale")}
        kept = self.models.setdefault(model, {}).setdefault(title, about | {"by_column": {}})
        known = kept["by_column"].setdefault(column, {"values": {}, "not_reached": []})
        for seed, value in record["values"].items():
            if known["values"].setdefault(seed, value) != value:
                raise ValueError(
                    f"{str(path)!r} has {title} = {value} for {model} at {column} with seed {seed}, and another file "
                    f"{known['values'][seed]}; accepted: each run once"
                )
        known["not_reached"] = sorted({*known["not_reached"], *record["not_reached"]})


def _check_goal(path: Path, summary: Mapping[str, Any], first_path: Path, first: Mapping[str, Any]) -> None:
    for name in ("metric", "reach"):
        if summary[name] is None:
            raise ValueError(f"{str(path)!r} has {name}=None; accepted: the summary of a comparison with --reach")
        if summary[name] != first[name]:
            raise ValueError(
                f"{str(path)!r} has {name}={summary[name]!r}; accepted: {first[name]!r}, as {str(first_path)!r} has it"
            )
    for part in summary.get("combinations", [summary]):
        if part["quantities"] and "loss" not in [each["title"] for each in part["quantities"][2:]]:
            raise ValueError(f"{str(path)!r} has metric={summary['metric']!r}; accepted: one with the loss beside it")


def _deciding(summary: Mapping[str, Any]) -> list[str]:
    """The titles of the metric and of the steps until it is reached, which a summary has first."""
    parts = summary.get("combinations", [summary])
    return [each["title"] for part in parts for each in part["quantities"][:2]]


def _settings(summary: Mapping[str, Any], values: Mapping[str, str]) -> tuple[Settings, str, list[str]]:
    """The settings that the runs of a task share, as text; the model; and mixture, schedule and start of a column."""
    given = summary["settings"]
    flags: dict[str, str] = {}
    name = ""
    for word in [*given["overrides"], *(f"--{each}={value}" for each, value in values.items())]:
        if word.startswith("--"):
            name = flag_name(word)
            flags[name] = word.partition("=")[2]
        else:
            flags[name] = f"{flags[name]} {word}".lstrip()
    others = {each: value for each, value in given.items() if each not in ("config", "overrides", "vary")}
    found = {each: str(value).lower() for each, value in (others | (given["config"] or {}) | flags).items()}
    how = [found.pop(each, usual) for each, usual in OF_A_COLUMN.items()]
    model = found.pop("model_type", "")
    task = frozenset(item for item in found.items() if item[0] not in OF_A_RUN)
    return task, model, how


def _column(how: Sequence[str], power: float) -> Column:
    """The column of mixture, schedule and start of p, given as text; a schedule that stays where it is is constant."""
    mixture, schedule, start = how
    if schedule == "constant" or float(start) == power:
        return Column(float(mixture), "constant", power, power)
    return Column(float(mixture), schedule, float(start), power)


def _accepted(settings: Settings, others: Sequence[Settings]) -> str:
    """Say what a task without p = 0 needs beside it, with the names that the nearest other task has otherwise."""
    accepted = "accepted: together with a comparison of the same settings that has it"
    if not others:
        return accepted
    nearest = min((sorted({name for name, _ in settings ^ other}) for other in others), key=len)
    return f"{accepted}; the nearest task differs in {', '.join(nearest)}"


def rows_of(content: Mapping[str, Any], task: Mapping[str, Any]) -> list[Row]:
    """The rows of a task, compared anew from their values by seed."""
    rows = []
    for each in task["models"]:
        metric, steps, loss = (_quantity(content["columns"], record) for record in each["quantities"])
        steps = replace(steps, is_ratio=True)  # Older summaries have differences.
        columns = sorted(metric.values.keys() - {0.0})
        quantities = {column: steps if _decides(steps, column) else metric for column in columns}
        found, losses = _against_0(quantities), _against_0(dict.fromkeys(columns, loss))
        outcomes = {int(column): Outcome(quantities[column], found[column], losses[column]) for column in columns}
        rows.append(Row(each["model"], metric, steps, outcomes))
    return rows


def _quantity(columns: Sequence[str], record: Mapping[str, Any]) -> Quantity:
    by_power = [{**each, "power": columns.index(name)} for name, each in record["by_column"].items()]
    return Quantity.of_record({**record, "by_power": by_power})


def _decides(steps: Quantity, column: float) -> bool:
    """Whether at least half of the paired runs get there, both in this column and at p = 0."""
    seeds = steps.values[column].keys() & steps.values.get(0.0, {}).keys()
    return all(2 * sum((each, seed) in steps.bounds for seed in seeds) <= len(seeds) for each in (0.0, column))


def _against_0(quantities: Mapping[float, Quantity]) -> dict[float, Difference]:
    """Compare each column with p = 0 in its quantity, and correct for all columns together."""
    found = {
        column: compare(replace(each, values={0.0: each.values.get(0.0, {}), column: each.values[column]}))[column]
        for column, each in quantities.items()
    }
    tested = {column: each.p_value for column, each in found.items() if each.p_value is not None}
    for column, corrected in zip(tested, holm([*tested.values()]), strict=True):
        verdict = found[column].verdict if corrected < ALPHA else "not told apart"
        found[column] = replace(found[column], holm=corrected, verdict=verdict)
    return found


def read_merged(path: Path) -> dict[str, Any]:
    """Read what `merged` made, or raise a `ValueError`."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for task in content["tasks"]:
            rows_of(content, task)
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = f"{str(path)!r} holds no merged comparisons ({error!r})"
        raise ValueError(f"{given}; accepted: a file that memory_table.py wrote") from None
    return content

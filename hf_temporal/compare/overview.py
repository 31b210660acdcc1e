"""What a comparison over p and further settings leaves above those of its combinations: a table, words, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_temporal.finetuning.tables import environment, table
from hf_temporal.power_plots import PowerPanel, plot_metrics_by_power

from .cells import power_name
from .pictures import panel_of
from .report import (
    ARROWS,
    REPORT_NAME,
    SUMMARY_NAME,
    Found,
    Outcome,
    conclusion,
    how_it_was_made,
    how_to_read,
    missing_cells,
    quantity_record,
    table_cell,
    write_plain_json,
)

PICTURE = "metric_by_power.png"
MOST_COLUMNS = 5
NOTE = """
- Each combination is compared for itself. A P-value is corrected for the p of its row alone, since each row is a
  question of its own and its answer is to be the one in its own summary: of twenty rows without any effect, up to
  one on average tells a p apart."""


@dataclass(frozen=True)
class Part:
    """One combination.

    Args:
        values: of what is varied.
        outcome: its comparison as it stands.
        found: the quantities that decide; none where no cell is finished.
    """

    values: Mapping[str, str]
    outcome: Outcome
    found: Sequence[Found]

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


def write_overview(outcome: Outcome, parts: Sequence[Part], output_dir: Path) -> str:
    """Write `summary.json`, `summary.md` and a picture of all combinations; the words and the table.

    `summary.json` has `version`, `title`, `metric`, `reach`, `powers`, `seeds`, `commands`, `settings` and
    `environment` as that of a combination, see `hf_temporal.compare.report.write_summary`, and `combinations`: of each
    `values` (of what is varied, by name), `folder`, `cells`, `finished` (how many of them), `failed` (exit status by
    cell), and of what decides the `quantities`.
    """
    about = environment()
    write_plain_json(output_dir / SUMMARY_NAME, _summary(outcome, parts, about))
    _draw(outcome.title, parts, output_dir / PICTURE)
    findings = "\n".join(map(_conclusion, parts)) + f"\n\n{_table(parts)}"
    missing = [
        f"- {part.name}: {missing_cells(part.outcome)}" for part in parts if _finished(part) < len(part.outcome.cells)
    ]
    report = [
        f"# {outcome.title}: which p?",
        findings,
        "\n".join(missing) or missing_cells(outcome),
        f"![What each p ends at]({PICTURE})",
        how_to_read(outcome, uncorrected="rows") + NOTE,
        how_it_was_made(outcome, about),
    ]
    (output_dir / REPORT_NAME).write_text("\n\n".join(report) + "\n", encoding="utf-8")
    return findings


def _summary(outcome: Outcome, parts: Sequence[Part], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": 1,
        "title": outcome.title,
        "metric": outcome.metric,
        "reach": outcome.reach,
        "powers": sorted({cell.power for cell in outcome.cells}),
        "seeds": sorted({cell.seed for cell in outcome.cells}),
        "combinations": [
            {
                "values": part.values,
                "folder": part.outcome.title,
                "cells": len(part.outcome.cells),
                "finished": _finished(part),
                "failed": {
                    cell.name: part.outcome.failed[cell] for cell in part.outcome.cells if cell in outcome.failed
                },
                "quantities": [quantity_record(*each) for each in part.found],
            }
            for part in parts
        ],
        "commands": outcome.commands,
        "settings": outcome.settings,
        "environment": about,
    }


def _finished(part: Part) -> int:
    return sum(cell.finished for cell in part.outcome.cells)


def _conclusion(part: Part) -> str:
    if not part.found:
        return f"- {part.name}: no cell is finished."
    found = "; ".join(f"**{quantity.title}** {conclusion(differences)}" for quantity, differences in part.found)
    return f"- [{part.name}]({quote(part.outcome.title)}/{REPORT_NAME}), compared with p = 0: {found}."


def _table(parts: Sequence[Part]) -> str:
    powers = sorted({cell.power for part in parts for cell in part.outcome.cells})
    rows = []
    for part in parts:
        for quantity, differences in part.found:
            counts = {len(values) for values in quantity.values.values()}
            row = {**part.values, "compared": f"{quantity.title}{ARROWS[quantity.direction]}"}
            row["seeds"] = " to ".join(map(str, sorted({min(counts), max(counts)})))
            for power in quantity.values:
                row[f"p = {power_name(power)}"] = table_cell(quantity, power, differences.get(power))
            rows.append(row)
    return table(rows, [*parts[0].values, "compared", "seeds", *(f"p = {power_name(power)}" for power in powers)])


def _draw(title: str, parts: Sequence[Part], path: Path) -> None:
    """What decides as small multiples, a block of rows each; the values of the last varied setting go along a row."""
    titles = ["\n".join(part.values.values()) for part in parts]
    along = len({list(part.values.values())[-1] for part in parts})
    columns = min(along, MOST_COLUMNS)
    blocks: list[PowerPanel | None] = []
    for index in range(max(len(part.found) for part in parts)):
        block = [
            panel_of(part.found[index][0], title) if part.found else PowerPanel("", {}, {}, title=title)
            for part, title in zip(parts, titles, strict=True)
        ]
        label = max((panel.label for panel in block), key=len)  # tells of hollow dots where one panel has some
        blocks += [*(replace(panel, label=label) for panel in block), *([None] * (-len(block) % columns))]
    plot_metrics_by_power(blocks, path, title=f"{title}: {' / '.join(parts[0].values)}", columns=columns)

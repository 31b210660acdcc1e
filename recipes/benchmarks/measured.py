"""What the benchmarks share: the noise of a measurement, and the JSON file that figures are kept in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_temporal.finetuning.tables import environment, table

__all__ = ["environment", "read_rows", "spread", "table", "write"]


def spread(values: Sequence[float]) -> float:
    """(third − first quartile) / median: the noise of repeated measurements as a share of what was measured."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results as a JSON file that appears whole or not at all; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)


def read_rows(path: Path, benchmark: str) -> list[dict[str, Any]]:
    """The rows of a benchmark, from the file that it wrote or from that of a machine, which lists the runs of several.

    Raises:
        ValueError: the file has none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = [content] if content.get("benchmark") == benchmark else content.get(benchmark, [])
    rows = [row for run in runs for row in run["rows"]]
    if not rows:
        raise ValueError(
            f"{path} has no rows of {benchmark}; accepted: a file that this benchmark wrote, or a machine's."
        )
    return rows

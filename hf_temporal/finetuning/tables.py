"""What every benchmark tells beside its figures, and how it tells them: a table on the screen, JSON in a file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hf-temporal", "torch", "transformers", "accelerate", "peft", "numpy")


def environment() -> dict[str, Any]:
    """Hardware, threads and versions that the figures belong to."""
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        hardware["accelerator"] = torch.cuda.get_device_name()
    installed = {package.metadata["Name"]: package.version for package in distributions()}
    versions = {"python": platform.python_version(), **{name: installed.get(name, "source") for name in PACKAGES}}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": when, "system": platform.platform(), "hardware": hardware, "versions": versions}


def spread(values: Sequence[float]) -> float:
    """(third − first quartile) / median: the noise of repeated measurements as a share of what was measured."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the given columns of the rows; floats with three significant digits."""
    cells = [list(columns), ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(f"| {line} |" for line in lines)


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results as JSON, making the folder; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

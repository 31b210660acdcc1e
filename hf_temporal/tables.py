"""Figures as a Markdown table or JSON file, and the machine and the versions that they were measured with."""

import json
import os
import platform
import re
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


def write_json(path: Path, content: Any, *, line_by_line: str | None = None) -> None:
    """Write a file that appears whole or not at all, indented.

    With `line_by_line` the list of that name in a mapping gets a line for each item, which is written much faster.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) if line_by_line is None else _lines(content, line_by_line)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _lines(content: dict[str, Any], name: str) -> str:
    items = ",\n".join(json.dumps(each, ensure_ascii=False) for each in content[name])
    head = json.dumps({each: value for each, value in content.items() if each != name} | {name: []})
    return f"{head.removesuffix(']}')}\n{items}\n]}}"


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the given columns of the rows; floats with three significant digits."""
    return markdown([list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The lines, of which the first is the head, as a Markdown table."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*ruled, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in ruled]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:(.*)", information.read_text(encoding="utf-8") if information.exists() else "")
    return found[1].strip() if found else platform.processor() or platform.machine()

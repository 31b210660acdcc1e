"""The benchmarks but that of the loss run, at the size of a toy, and write what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks import memory_models, reduction, timeline, training_step

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(benchmark: Any, *arguments: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "folder" / "results.json"
        benchmark.main(["--output", str(output), *arguments])
        return json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def test_training_step(run: Run) -> None:
    results, printed = run(
        training_step,
        "--model",
        "toy",
        "--repeats",
        "3",
        "--length",
        "64",
        "--targets",
        "8",
        "--tuned",
        "lora",
        "--threads",
        "1",
    )
    rows = results["rows"]
    assert [row["trainer"] for row in rows] == ["stock Trainer", "fused head", "full logits", "no head"]
    for row in rows:
        assert len(row["all_seconds"]) == 3
        assert min(row["all_seconds"]) > 0.0
        assert row["seconds"] == sorted(row["all_seconds"])[1]
        assert row["MiB"] > 0.0
        assert f"{row['seconds']:.3g}" in printed
    assert rows[0]["time / stock"] == rows[0]["memory / stock"] == 1.0
    assert results["settings"]["seed"] == 0
    assert {"torch", "transformers"} <= results["versions"].keys()
    assert results["hardware"]["processor"]


def test_timeline(run: Run) -> None:
    results, printed = run(timeline, "--rows", "2", "--length", "300", "--repeats", "3", "--threads", "1")
    assert len(results["rows"]) == 18
    for row in results["rows"]:
        assert row["both [ms]"] > max(row["t [ms]"], row["w [ms]"]) > 0.0
        assert row["both [ms]"] >= row["fastest [ms]"]
        assert f"{row['both [ms]']:.3g}" in printed


def test_memory_models(run: Run) -> None:
    results, printed = run(memory_models, "--repeats", "3", "--length", "20", "--batch_size", "2", "--threads", "1")
    rows = results["rows"]
    assert [row["family"] for row in rows[::2]] == ["linear_rnn", "tanh_rnn", "tcn", "state_space", "attention"]
    for reference, ours in zip(rows[::2], rows[1::2], strict=True):
        assert reference["family"] == ours["family"]
        assert reference["time / reference"] == 1.0
        ratios = sorted(a / b for a, b in zip(ours["all_seconds"], reference["all_seconds"], strict=True))
        assert ours["time / reference"] == ratios[1] > 0.0
        assert f"{ours['seconds']:.3g}" in printed


def test_reduction(run: Run) -> None:
    """Beside the stock trainer's, a step takes one reduction of four float64, under "batch" one of an int64 too."""
    results, printed = run(reduction, "--processes", "2", "--repeats", "3", "--gradients", "1000")
    assert [(row["what"], row["collectives"], row["bytes per rank"]) for row in results["rows"]] == [
        ("stock Trainer", 1, 8),
        ("sequence", 2, 8 + 32),
        ("batch", 3, 8 + 32 + 8),
        ("tokens", 2, 8 + 32),
        ("all-reduce of 1,000 gradients", 1, 4000),
    ]
    for row in results["rows"]:
        assert row["processes"] == 2
        assert row["microseconds"] > 0.0
        assert f"{row['microseconds']:.3g}" in printed

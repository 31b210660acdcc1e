"""The benchmarks of start-up, evaluation, ROUGE and scaling run at the size of a toy, and write what they print."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation
import pytest
import rouge
import scaling
import startup
import torch
from step_trainers import MODELS
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_run import Tiny

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(benchmark: Any, *arguments: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "folder" / "results.json"
        benchmark.main(["--output", str(output), *arguments])
        return json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def test_evaluation(run: Run) -> None:
    flags = ("--model", "toy", "--rows", "4", "--length", "16", "--batch_size", "2", "--rounds", "3", "--threads", "1")
    results, printed = run(evaluation, *flags, "--shares", "1", "0.25")
    rows = results["rows"]
    kinds = [(row["share"], row["target tokens"], row["trainer"]) for row in rows]
    assert kinds == [
        (1, 4 * 15, "stock Trainer"),
        (1, 4 * 15, "TemporalWeightTrainer"),
        (0.25, 4 * 4, "stock Trainer"),
        (0.25, 4 * 4, "TemporalWeightTrainer"),
    ]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert len(stock["all_seconds"]) == len(ours["all_seconds"]) == 3
        ratios = [a / b for a, b in zip(ours["all_seconds"], stock["all_seconds"], strict=True)]
        assert ours["time / stock"] == statistics.median(ratios) > 0
        assert stock["inside"] is None
        assert 0 < ours["inside"] < 100
        assert f"{ours['seconds']:.3g}" in printed


def test_half_of_the_labels_are_what_the_model_ranks_first() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS["toy"])).eval()
    settings = evaluation.argparse.Namespace(seed=0, model="toy", rows=4, length=17, batch_size=2)
    rows = evaluation.rows_for(model, settings, 1.0)
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        right = model(ids).logits.argmax(-1)[:, :-1] == labels[:, 1:]
    assert right[:, 1::2].all()
    assert right[:, ::2].float().mean() < 0.2


def test_rouge(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of the CPU's that runs as two busy cores would have it."""
    monkeypatch.setattr(rouge, "cpu_seconds", lambda: 2 * time.perf_counter())
    results, printed = run(rouge, "--pairs", "40", "--words", "10", "--rounds", "2", "--processes", "2")
    one, all_cores = results["rows"]
    assert (one["processes"], all_cores["processes"]) == (1, 2)
    assert one["time / one process"] == 1
    ratios = [a / b for a, b in zip(all_cores["all_seconds"], one["all_seconds"], strict=True)]
    assert all_cores["time / one process"] == statistics.median(ratios)
    for row in (one, all_cores):
        assert row["CPU use"] == pytest.approx(1, rel=0.1)
        assert f"{row['seconds']:.3g}" in printed


def test_the_time_of_child_processes_counts() -> None:
    before = rouge.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    assert rouge.cpu_seconds() - before > 0.05


def test_rouge_pairs_are_neither_equal_nor_strangers() -> None:
    pairs = rouge.make_pairs(50, 30, seed=0)
    shared = [
        len(set(one.split()) & set(other.split())) / len(set(other.split()))
        for one, other in zip(pairs["predictions"], pairs["references"], strict=True)
    ]
    assert 0.4 < statistics.mean(shared) < 0.8
    assert 25 < statistics.mean(len(text.split()) for text in pairs["references"]) < 35


def test_scaling(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "scaling.png"
    flags = ("--width", "8", "--fixed_positions", "256", "--fixed_vocabulary", "4096", "--repeats", "2")
    sizes = ("--positions", "128", "4096", "--vocabularies", "1024", "2048")
    results, printed = run(scaling, *flags, *sizes, "--threads", "1", "--picture", str(picture))
    assert [(row["N"], row["V"]) for row in results["rows"]] == [(128, 4096), (4096, 4096), (256, 1024), (256, 2048)]
    assert [(row["swept"], row["factor"]) for row in results["slopes"]] == [("N", 32), ("V", 2)]
    assert results["slopes"][0]["slope of time"] > 0.2
    large = results["rows"][1]
    assert large["memory / full logits"] == pytest.approx(large["MiB"] / 64)
    assert large["MiB"] < 48
    for row in results["rows"]:
        assert row["fastest"] == min(row["all_seconds"]) > 0
        assert f"{row['seconds']:.3g}" in printed
    assert picture.stat().st_size > 10_000


def test_the_slope_of_what_is_linear_is_one() -> None:
    rows = [{"N": N, "fastest": 3e-6 * N, "MiB": 1.0} for N in (256, 1024, 16384)]
    assert scaling.slope(rows, "N")["slope of time"] == pytest.approx(1)
    assert scaling.slope(rows, "N")["factor"] == 64


def _recipe(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the launched recipes: a script that takes no time."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "toy.py").write_text(code)
    monkeypatch.setattr(startup, "REPOSITORY", folder)
    monkeypatch.setattr(startup, "LAUNCH", [sys.executable])
    monkeypatch.setattr(startup, "RECIPES", {"some/toy": "toy"})


def test_startup(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of transformers and hf_temporal, too: modules that take no time."""
    monkeypatch.setattr(startup, "TRAINER", "import json")
    monkeypatch.setattr(startup, "OURS", "import csv")
    _recipe(
        tmp_path, "import sys; print(\"{'loss': '1.5'}\\n\", {'train_loss': 1.5}, sys.argv, flush=True)", monkeypatch
    )
    results, printed = run(startup, "--rounds", "2", "--recipe_rounds", "1", "--seed", "3")
    assert [row["what"] for row in results["rows"]] == [
        "import json, a process",
        "import json; import csv, a process",
        "import csv, behind it",
        "accelerate launch, nothing",
        "first step of some/toy",
    ]
    assert [len(row["all_seconds"]) for row in results["rows"]] == [2, 2, 2, 1, 1]
    process, _, added, *_ = results["rows"]
    assert 0 < added["seconds"] < process["seconds"]
    assert results["settings"]["passed on"] == ["--seed", "3"]
    for row in results["rows"]:
        assert f"{row['seconds']:.3g}" in printed


@pytest.mark.parametrize(
    ("code", "message"), [("print('no news')", "logged no loss:\nno news"), ("exit(3)", "ended with 3")]
)
def test_a_recipe_that_fails_is_told(code: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _recipe(tmp_path, code, monkeypatch)
    with pytest.raises(RuntimeError, match=message):
        startup.first_step("some/toy", [])


def test_the_time_to_the_demos_first_step(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    """The recipe itself, with a tiny model and without the launcher."""
    monkeypatch.setattr(startup, "LAUNCH", [sys.executable])
    flags = ["--model_name_or_path", str(tiny.model), *tiny.data_flags, "--use_cpu", "--report_to", "none"]
    assert 1 < startup.first_step("summarization/smollm2_lora_docstrings", flags) < 300

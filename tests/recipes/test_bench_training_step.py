"""The benchmarks of a training step and of encoding run at the size of a toy, and write what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoding
import pytest
import step_trainers
import training_step
from step_trainers import Job, build_trainer
from transformers import PreTrainedTokenizerFast

from hf_temporal.finetuning.models import ModelArguments
from tests.tiny_summarization import tiny_tokenizer

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(benchmark: Any, *arguments: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "folder" / "results.json"
        benchmark.main(["--output", str(output), *arguments])
        return json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


TOY = ("--shapes", "2x32", "--shares", "0.25", "--repeats", "3", "--tuned", "lora", "--threads", "1")


def test_training_step(run: Run, tmp_path: Path) -> None:
    first, printed = run(training_step, "--models", "toy", *TOY)
    assert [row["trainer"] for row in first["rows"]] == _trainers("toy")
    for row in first["rows"]:
        assert len(row["all_seconds"]) == 3
        assert min(row["all_seconds"]) > 0.0
        assert row["seconds"] == sorted(row["all_seconds"])[1]
        assert row["MiB"] > 0.0
        assert f"{row['seconds']:.3g}" in printed
    assert first["rows"][0]["time / stock"] == first["rows"][0]["memory / stock"] == 1.0
    assert first["settings"]["seed"] == 0
    assert {"torch", "transformers"} <= first["versions"].keys()
    assert first["hardware"]["processor"]
    assert first["hardware"]["instructions"]

    picture = tmp_path / "pictures" / "steps.png"
    second, printed = run(training_step, "--models", "toy", "toy T5", *TOY, "--picture", str(picture))
    assert second["rows"][: len(first["rows"])] == first["rows"]  # there already, not measured again
    rows = second["rows"][len(first["rows"]) :]
    assert [(row["model"], row["trainer"]) for row in rows] == [("toy T5", each) for each in _trainers("toy T5")]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "SFTTrainer on toy T5 is left out: " in printed


def _trainers(model: str) -> list[str]:
    return [trainer for trainer in step_trainers.TRAINERS if not step_trainers.why_not(trainer, model)]


def test_a_case_that_fails_leaves_the_others(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(job: Job, trainers: list[str]) -> list[dict[str, Any]]:
        measured.append((job.share, trainers))
        if job.share == 0.5 and len(measured) < 3:
            raise RuntimeError("fused head ended early, exit code -9")
        return [{"trainer": trainer, "seconds": 1.0, "time / stock": 1.0} for trainer in trainers]

    monkeypatch.setattr(training_step, "measure", measure)
    asked = [*TOY, "--models", "toy", "--shares", "0.5", "1", "--trainers", "stock", "by hand", "fused head"]
    with pytest.raises(SystemExit, match=r"not measured:\ntoy, lora, float32, 2×32, 0\.5: fused head ended early"):
        run(training_step, *asked)
    results, _ = run(training_step, *asked, "--at_once", "2")  # the other case is there, and does for any at_once
    assert measured == [
        (0.5, ["stock", "by hand", "fused head"]),
        (1.0, ["stock", "by hand", "fused head"]),
        (0.5, ["stock", "by hand"]),
        (0.5, ["stock", "fused head"]),
    ]
    assert [(row["share"], row["trainer"]) for row in results["rows"]] == [
        (share, trainer) for share in (1.0, 0.5) for trainer in ("stock", "by hand", "fused head")
    ]
    run(training_step, *asked, "--trainers", "stock", "fused head", "no head")
    assert measured[4:] == [(share, ["stock", "fused head", "no head"]) for share in (0.5, 1.0)]
    with pytest.raises(ValueError, match="was measured with seed=0; accepted: 1, or another --output"):
        run(training_step, *asked, "--seed", "1")
    assert len(json.loads((tmp_path / "folder" / "results.json").read_text(encoding="utf-8"))["rows"]) == 8


def test_a_group_that_fails_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(_job: Job, trainers: list[str]) -> list[dict[str, Any]]:
        measured.append(trainers)
        if "SFTTrainer" in trainers:
            raise RuntimeError("SFTTrainer ended early, exit code -9")
        return [{"trainer": trainer, "seconds": 1.0, "time / stock": 1.0} for trainer in trainers]

    monkeypatch.setattr(training_step, "measure", measure)
    monkeypatch.setattr(training_step, "why_not", lambda *_: None)
    asked = [*TOY, "--models", "toy", "--at_once", "2", "--trainers", "stock", "SFTTrainer", "fused head"]
    with pytest.raises(SystemExit, match="SFTTrainer ended early"):
        run(training_step, *asked)
    assert measured == [["stock", "SFTTrainer"], ["stock", "fused head"]]
    results, _ = run(training_step, *asked[:-2], "fused head")
    assert [row["trainer"] for row in results["rows"]] == ["stock", "fused head"]
    assert len(measured) == 2  # both were in the file


@pytest.mark.parametrize("model", ["toy", "toy T5"])
def test_peers_train_the_same(model: str, tmp_path: Path) -> None:
    """Weights by hand are ours at p = 1, fused or not; SFTTrainer's loss, where there is one, is stock's."""
    losses = {}
    for trainer in _trainers(model):
        job = Job(model, "full", "float32", batch_size=3, length=24, share=0.5, trainer=trainer, repeats=1)
        losses[trainer] = build_trainer(job, str(tmp_path)).train().training_loss
    assert losses["by hand"] == pytest.approx(losses["full logits"], abs=1e-5)
    assert losses["by hand"] == pytest.approx(losses["fused head"], abs=1e-5)
    assert losses.get("SFTTrainer", losses["stock"]) == pytest.approx(losses["stock"], abs=1e-5)
    assert abs(losses["by hand"] - losses["stock"]) > 1e-3


def test_a_picture_of_figures_that_are_there(tmp_path: Path) -> None:
    """Of the file of a machine, which lists the runs of several benchmarks."""
    picture, machine = tmp_path / "steps.png", tmp_path / "machine.json"
    machine.write_text(json.dumps({"training_step": [{"rows": [{**ROW, "model": "a", "trainer": "no head"}]}]}))
    training_step.main(["--redraw", str(machine), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    machine.write_text(json.dumps({"loss_head": []}))
    with pytest.raises(ValueError, match="has no rows of training_step; accepted: a file that this benchmark wrote"):
        training_step.main(["--redraw", str(machine), "--picture", str(picture)])
    with pytest.raises(SystemExit):
        training_step.main(["--redraw", str(machine)])


ROW = {
    "tuned": "lora",
    "dtype": "float32",
    "batch × length": "8×160",
    "share": 0.15,
    "time / stock": 0.8,
    "memory / stock": 0.9,
    "all_seconds": [1.0],
}


def test_a_panel_for_each_model_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("hf_temporal.plots.saved", lambda figure, _: figures.append(figure))
    rows = [{**ROW, "model": model, "trainer": "fused head"} for model in ("a", "b", "c")]
    training_step.draw([*rows, {**rows[0], "all_seconds": [], "time / stock": 2.0}], tmp_path / "steps.png")
    assert [panel.get_title() for panel in figures[0].axes] == [
        f"{model}, lora, float32" for model in "abc" for _ in range(2)
    ]
    assert [bar.get_width() for bar in figures[0].axes[0].patches] == [0.8]  # that of most repeats
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["fused head, 8×160, 15%"]


# ---- encoding


def test_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", minversion="1.16")

    def load(_: ModelArguments, __: None) -> tuple[None, PreTrainedTokenizerFast]:
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return None, tokenizer

    monkeypatch.setattr(encoding, "load_causal_lm", load)
    output = tmp_path / "results.json"
    encoding.main(["--conversations", "20", "--repeats", "2", "--output", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [row["what"] for row in results["rows"]] == ["TRL's SFTTrainer", "ours"]
    assert results["rows"][0]["rate"] == 1.0
    assert all(len(row["all_seconds"]) == 2 for row in results["rows"])
    assert min(results["rows"][1]["all_seconds"]) > 0
    assert "conversations a second" in capsys.readouterr().out

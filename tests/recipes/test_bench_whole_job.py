"""The benchmark of the whole job: its trainers, its table, and the commands that it keeps; LoRA products by hand."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lora_products
import pytest
import torch
import whole_job

from tests.tiny_run import Tiny


@pytest.mark.parametrize("function", [lora_products.OneFunction, lora_products.Sum])
def test_other_ways_of_a_lora_layer_have_its_values_and_gradients(function: Any) -> None:
    torch.manual_seed(0)
    shapes = [(2, 5, 4), (6, 4), (3, 4), (6, 3)]
    x, W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = [x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_()]
    expected = x @ W.T + 0.7 * (x @ A.T) @ B.T
    torch.testing.assert_close(function.apply(*inputs, 0.7), expected)
    assert torch.autograd.gradcheck(lambda *given: function.apply(*given, 0.7), inputs)


@pytest.fixture
def config(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    flags = [flag.removeprefix("--") for flag in tiny.data_flags]
    settings: dict[str, Any] = {
        "model_name_or_path": str(tiny.model),
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    settings |= {"use_peft": True, "do_train": True, "use_cpu": True, "max_target_length": 12, "logging_steps": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(whole_job, "CONFIG", str(path))
    monkeypatch.setattr(whole_job, "GROUPED", 4)
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path / "cache"))
    return path


@pytest.mark.usefixtures("config")
def test_every_trainer_has_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", minversion="1.16.0")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    rows: dict[str, list[list[int]]] = {}
    for kind in (whole_job.OURS, whole_job.PADDED, whole_job.SFT, whole_job.FLOOR):
        trainer = whole_job.trainer_of(kind, 40, 2, 2, 1, str(tmp_path / "out"))
        rows[kind] = sorted(trainer.train_dataset["input_ids"])
        trainer.train()
        assert trainer.state.global_step == 2
    assert len(rows[whole_job.OURS]) == 4
    assert all(each == rows[whole_job.OURS] for each in rows.values())


def test_a_row_of_the_table_by_hand() -> None:
    found = {"ours": {"rounds": [1.0, 3.0, 2.0], "MiB": 30.0}, "peer": {"rounds": [2.0, 4.0, 2.0], "MiB": 40.0}}
    row = whole_job.compared("part", found)
    expected = {"seconds": 2.0, "time": 0.75, "low": 0.5, "high": 1.0, "memory": 0.75}
    assert {key: row[key] for key in expected} == expected
    assert (row["what"], row["against"]) == ("ours", "peer")


def test_commands_take_turns_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[str, str]] = []

    def command(tree: Path, folder: str, *extra: str) -> dict[str, Any]:
        assert Path(folder).parent == Path(tempfile.gettempdir())
        given.append(("now" if tree == whole_job.ROOT else "before", extra[-1]))
        seconds = 1.0 if tree == whole_job.ROOT else 2.0
        return {"seconds": seconds, "MiB": 10 * seconds, "metrics": [{"eval_runtime": seconds / 4}]}

    monkeypatch.setattr(whole_job, "command", command)
    monkeypatch.setattr(whole_job.measured, "commit_of", lambda _: "0123abc")
    own = ["--parts", "demo", "--before", str(tmp_path), "--output", str(tmp_path / "found.json")]
    whole_job.main([*own, "--seeds", "0"])
    whole_job.main([*own, "--seeds", "0", "1"])
    assert given == [("before", "0"), ("now", "0"), ("now", "1"), ("before", "1")]
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [(row["part"], row["time"], len(row["all"]["now"]["rounds"])) for row in found["rows"]] == [
        ("demo", 0.5, 2),
        ("its first evaluation", 0.5, 2),
    ]
    assert "its first evaluation" in capsys.readouterr().out


def test_the_demo_needs_an_older_tree(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        whole_job.main(["--parts", "demo"])
    assert "--parts demo needs --before" in capsys.readouterr().err

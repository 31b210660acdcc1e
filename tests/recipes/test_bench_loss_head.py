"""The benchmark of the loss head runs at the size of a toy, and writes what it prints."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import loss_head
import pytest
import torch


def test_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folder" / "loss_head.json"
    peers = [peer for peer in loss_head.PEERS if peer != "TRL"]
    loss_head.main(
        [
            "--peers", *peers, "--shapes", "512,128,16384", "--masked", "0.75", "--dtypes", "float32",
            "--repeats", "3", "--threads", "1", "--output", str(output),
            "--picture", str(tmp_path / "loss_head.png"),
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert (tmp_path / "loss_head.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["peer"]: row for row in results["rows"]}
    assert [*rows] == [peer for peer in peers if peer != "ours, 16 bits emulated"]
    assert len(results["rows"]) == len(rows)
    for row in rows.values():
        assert (row["N"], row["H"], row["V"], row["dtype"], row["masked"]) == (512, 128, 16384, "float32", 0.75)
        assert len(row["all_seconds"]) == 3
        assert min(row["all_seconds"]) > 0
        assert row["seconds"] == sorted(row["all_seconds"])[1]
        stock = rows["stock mean"]
        ratios = [a / b for a, b in zip(row["all_seconds"], stock["all_seconds"], strict=True)]
        assert row["time / stock"] == statistics.median(ratios)
        assert row["memory / stock"] == row["MiB"] / stock["MiB"]
        assert f"{row['seconds']:.3g}" in printed
    assert rows["three products"]["time / products"] == rows["… of the targets"]["time / products of targets"] == 1
    head, logits = 128 * 16384 / 2**18, 512 * 16384 / 2**18
    assert logits + head <= rows["three products"]["MiB"] <= 1.5 * (logits + head)
    assert logits / 4 + head <= rows["ours"]["MiB"] < rows["stock mean"]["MiB"]
    assert results["settings"]["seed"] == 0
    assert "torch" in results["versions"]
    assert results["hardware"]["processor"]


@pytest.mark.parametrize("masked", [0.0, 0.75])
def test_peers_with_weights_have_the_same_gradients(masked: float) -> None:
    gradients = []
    for peer in ("weights by hand", *(f"torch {policy}" for policy in loss_head.POLICIES), "ours"):
        inputs = loss_head.Inputs.make(40, 8, 100, dtype=torch.float32, masked=masked, seed=0)
        assert int((inputs.targets == -100).sum()) == 40 * masked
        loss_head.PEERS[peer](inputs)
        assert inputs.hidden.grad is not None
        assert inputs.head.grad is not None
        gradients.append((inputs.hidden.grad, inputs.head.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_peer_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="'ours' ended early with exit code 1"):
        loss_head.Child("ours", {"no": "case"}, threads=1).run()


def test_a_picture_of_the_runs_with_most_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file of a machine, which lists runs; a case is drawn once, whatever else was measured."""
    case = {"N": 64, "H": 16, "V": 500, "dtype": "float32"}
    few, many, other = (
        {**case, "masked": masked, "peer": "ours", "MiB": 1.0, "all_seconds": seconds}
        for masked, seconds in ((0.75, [1.0]), (0.75, [1.0, 2.0]), (0.5, [1.0]))
    )
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({"loss_head": [{"rows": [few]}, {"rows": [many]}, {"rows": [few, other]}]}))
    drawn: list[Any] = []
    monkeypatch.setattr(loss_head, "draw", lambda rows, path: drawn.append((rows, path)))
    asked = ["--shapes", "64,16,500", "--dtypes", "float32", "--masked", "0.75"]
    picture = tmp_path / "head.png"
    loss_head.main([*asked, "--redraw", str(machine), "--picture", str(picture)])
    assert drawn == [([many], picture)]

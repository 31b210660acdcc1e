"""The benchmark of the loss head runs at the size of a toy, and writes what it prints."""

from __future__ import annotations

import json
import statistics
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import head_peers
import loss_head
import pytest
import torch
from head_peers import PEERS, Inputs, Peer
from measured import Child

CPU_CASE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "seed": 0, "masked": 0.0}


def test_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folder" / "loss_head.json"
    loss_head.main(
        [
            "--shapes", "512,128,16384", "--masked", "0.75", "--dtypes", "float32", "--check", "24,16,100",
            "--repeats", "3", "--threads", "1", "--output", str(output),
            "--picture", str(tmp_path / "loss_head.png"),
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert (tmp_path / "loss_head.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["peer"]: row for row in results["rows"]}
    assert [*rows] == [peer for peer in PEERS if PEERS[peer].device is None]
    assert len(results["rows"]) == len(rows)
    trl = rows.pop("TRL")
    assert trl["all_seconds"] or trl["note"] == "failed: No module named 'trl'"
    for row in rows.values():
        assert (row["N"], row["H"], row["V"], row["dtype"], row["masked"]) == (512, 128, 16384, "float32", 0.75)
        assert len(row["all_seconds"]) == 3
        assert min(row["all_seconds"]) > 0
        assert row["seconds"] == sorted(row["all_seconds"])[1]
        for other, column in {"three products": "time / products", "stock mean": "time / stock"}.items():
            pairs = zip(row["all_seconds"], rows[other]["all_seconds"], strict=True)
            assert row[column] == statistics.median([a / b for a, b in pairs])
        assert row["memory / stock"] == row["MiB"] / rows["stock mean"]["MiB"]
        assert f"{row['seconds']:.3g}" in printed
    assert rows["three products"]["time / products"] == rows["… of the targets"]["time / products of targets"] == 1
    head, logits = 128 * 16384 / 2**18, 512 * 16384 / 2**18
    assert logits + head <= rows["three products"]["MiB"] <= 1.5 * (logits + head)
    assert logits / 4 + head <= rows["ours"]["MiB"] < rows["stock mean"]["MiB"]
    right = {(row["peer"], row["of"]) for row in results["checks"] if row["right"]}
    assert {("ours", of) for of in ("loss", "hidden", "head")} <= right
    assert {("ours, scale and bias", of) for of in ("loss", "hidden", "head", "bias")} <= right
    assert results["settings"]["seed"] == 0
    assert "torch" in results["versions"]
    assert results["hardware"]["processor"]


@pytest.mark.parametrize("masked", [0.0, 0.75])
def test_peers_with_weights_have_the_same_gradients(masked: float) -> None:
    gradients = []
    policies = [f"torch {policy}" for policy in head_peers.POLICIES]
    for peer in ("weights by hand", *policies, "ours", "ours, PyTorch pass"):
        inputs = Inputs.make(40, 8, 100, dtype=torch.float32, masked=masked, seed=0)
        assert int((inputs.targets == -100).sum()) == 40 * masked
        PEERS[peer].run(inputs)
        assert inputs.hidden.grad is not None
        assert inputs.head.grad is not None
        gradients.append((inputs.hidden.grad, inputs.head.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_peer_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="'ours' ended early with exit code 1"):
        Child("ours", loss_head.serve, "ours", {"no": "case"}, 1, preload=[]).step()


def test_ours_that_is_wrong_ends_in_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(inputs: Inputs) -> torch.Tensor:
        return 1.01 * head_peers.ours(inputs)

    monkeypatch.setitem(PEERS, "ours", Peer(wrong))
    monkeypatch.setattr(loss_head, "measure", lambda *_: [{"peer": "ours"}])
    output = tmp_path / "loss_head.json"
    toy = ["--dtypes", "float32", "--masked", "0", "--shapes", "24,16,100", "--check", "24,16,100"]
    with pytest.raises(SystemExit, match=r"more than 2.0 × the error of full logits(.|\n)*ours +\| hidden"):
        loss_head.main([*toy, "--peers", "ours", "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8"))["rows"] == [{"peer": "ours"}]


def test_a_peer_that_fails_or_is_not_installed_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Inputs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.25 GiB.\nMore.")

    monkeypatch.setitem(PEERS, "greedy", Peer(fail))
    monkeypatch.setitem(PEERS, "missing", Peer(lambda _: import_module("not_a_package").loss))
    case = {**CPU_CASE, "N": 8, "H": 4, "V": 20}
    notes = {row["peer"]: row["note"] for row in loss_head.check(case, ["greedy", "missing"])}
    assert notes == {"greedy": "failed: out of memory", "missing": "failed: No module named 'not_a_package'"}
    sent: list[Any] = []
    connection: Any = SimpleNamespace(send=sent.append)
    loss_head.serve(connection, "greedy", case, 1)
    assert sent == ["failed: out of memory"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        loss_head.main(["--device", "cuda"])
    assert "finds no CUDA device here; accepted: --device cpu" in capsys.readouterr().err


def test_a_run_on_a_gpu_is_timed_after_another_and_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    peer = Peer(lambda _: done.append("run"))
    assert loss_head.timed(peer, Inputs.make(8, 4, 20, dtype=torch.float32, seed=0), on_gpu=True) > 0
    assert done == ["run", "synchronize", "run", "synchronize", "empty_cache"]


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

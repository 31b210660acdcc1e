"""The benchmark of the loss head on a GPU runs through on a CPU at the size of a toy, and writes what it prints."""

from __future__ import annotations

import json
import statistics
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loss_head_gpu
import pytest
import torch
from head_peers import BY_HAND, FALLBACK, OURS, PEERS, PRODUCTS, STOCK, Inputs, Peer
from loss_head_gpu import Bench, elapsed, main
from matplotlib import pyplot as plt

CPU = torch.device("cpu")
TOY = ["--device", "cpu", "--dtype", "float32", "--check", "24,16,100", "--shapes", "24,16,100", "32,8,300"]


def make_inputs() -> Inputs:
    return Inputs.make(24, 16, 100, dtype=torch.float32, device=CPU, seed=0, bias=False)


def test_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folder" / "gpu.json"
    main([*TOY, "--repeats", "3", "--chunk-sizes", "7", "--output", str(output)])
    printed = capsys.readouterr().out
    results = json.loads(output.read_text(encoding="utf-8"))
    rows = [row for row in results["rows"] if row["N"] == 24]
    assert [row["peer"] for row in rows] == [*PEERS, "ours, chunks of 7"]
    assert len(results["rows"]) == 2 * len(rows)
    by_peer = {row["peer"]: row for row in rows}
    for peer in (PRODUCTS, OURS, FALLBACK, STOCK, BY_HAND, "torch chunked", "ours, chunks of 7"):
        row = by_peer[peer]
        assert row["seconds"] == statistics.median(row["all_seconds"])
        products = by_peer[PRODUCTS]["all_seconds"]
        ratios = [a / b for a, b in zip(row["all_seconds"], products, strict=True)]
        assert row["time / products"] == statistics.median(ratios)
        assert f"{row['seconds']:.3g}" in printed
    assert by_peer["CCE exact"]["note"] == by_peer["Liger mean"]["note"] == "needs a GPU"
    assert by_peer["CCE exact"]["seconds"] is None
    parts = [row["part"] for row in results["parts"] if row["N"] == 24]
    assert parts == ["logits", "gradient of hidden", "gradient of head, added"]
    checked = {(row["options"], row["peer"], row["of"]) for row in results["checks"] if row["right"]}
    assert {("none", OURS, of) for of in ("loss", "hidden", "head")} <= checked
    assert {("bias, scale, cap, smoothing", FALLBACK, of) for of in ("loss", "hidden", "head", "bias")} <= checked
    assert min(plt.imread(output.with_suffix(".png")).shape[:2]) > 300


def test_peers_with_weights_have_the_same_gradients() -> None:
    inputs = make_inputs()
    gradients = []
    for peer in (each for each in PEERS.values() if each.weighted and not each.missing(CPU)):
        inputs.clear()
        peer.run(inputs)
        gradients.append((inputs.hidden.grad, inputs.head.grad))
    assert len(gradients) >= 4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_ours_that_is_wrong_ends_in_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = PEERS[OURS].loss

    def wrong(inputs: Inputs, **options: float) -> torch.Tensor:
        loss = right(inputs, **options)
        assert loss is not None
        return 1.01 * loss

    monkeypatch.setitem(loss_head_gpu.PEERS, OURS, Peer(wrong, has_options=True))
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match=r"more than 2.0 × the error of full logits(.|\n)*ours +\| hidden"):
        main([*TOY[:6], "--shapes", "8,8,20", "--peers", PRODUCTS, OURS, "--repeats", "1", "--output", str(output)])
    assert len(json.loads(output.read_text(encoding="utf-8"))["rows"]) == 5


def test_a_peer_that_fails_or_is_not_installed_is_a_line() -> None:
    def fail(_: Inputs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.25 GiB.\nMore.")

    bench = Bench({"greedy": Peer(fail)}, make_inputs(), CPU)
    assert bench.first("greedy") == {"note": "failed: out of memory"}
    missing = Peer(fail, module="not_a_package").missing(CPU)
    assert missing == "cannot be imported: No module named 'not_a_package'"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device here; a toy runs with --device cpu"):
        main([])


def test_memory_and_waits_are_those_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's counters are stood in for."""
    calls: list[Any] = []
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "memory_allocated": 3 * 2**20,
        "max_memory_allocated": 10 * 2**20,
        "get_sync_debug_mode": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)

    def waiting(inputs: Inputs) -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return PEERS[STOCK].loss(inputs) or inputs.hidden.sum()

    bench = Bench({"waiting": Peer(waiting)}, make_inputs(), CPU)
    bench.is_cuda = True
    with pytest.warns(UserWarning, match="synchronizing"):  # that of the first run, which is not counted
        assert bench.first("waiting") == {"MiB": 7.0, "waits": 1, "Triton calls": 0}
    assert calls == ["warn", 0]


def test_seconds_are_those_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Any) -> float:
            assert other is not self
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    device: Any = SimpleNamespace(type="cuda")
    runs: list[int] = []
    assert elapsed(lambda: runs.append(1), device) == 1.5
    assert runs == [1]

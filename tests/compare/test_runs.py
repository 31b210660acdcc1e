"""The cells of a comparison over p: their running, failing, killing and going on."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare import runs
from hf_temporal.compare.cells import Cell
from hf_temporal.compare.main import main
from hf_temporal.compare.runs import cell_environment, ending
from recipes import finetune_causal_lm
from tests.tiny_run import Tiny

from .stub_recipe import LAUNCHED_DIRECTLY, starts, summary_of


def test_finished_cells_are_kept_and_others_added(flags: list[str], tmp_path: Path) -> None:
    assert main(flags) == 0
    assert main([*flags, "--seeds", "0", "1", "2", "3", "--powers", "0", "2", "inf"]) == 0
    counts = starts(tmp_path / "out")
    assert set(counts.values()) == {1}
    assert {"p2_seed0", "p0_seed3", "p1_seed0"} <= counts.keys()
    assert summary_of(tmp_path / "out")["powers"] == [0, 2, "inf"]


def test_combinations_run_seed_by_seed_in_one_queue(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    begun: list[str] = []
    start = runs.start

    def noted(comparison: Any, cell: Cell, server: Any) -> Any:
        begun.append(cell.folder.relative_to(tmp_path / "out").as_posix())
        return start(comparison, cell, server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "start", noted)
        assert main([*flags, "--powers", "0", "1", "--vary", "gain=0.1,0.2", "--max_parallel", "3"]) == 0
    expected = [f"{gain}/p{power}_seed{seed}" for seed in (0, 1, 2) for gain in (0.1, 0.2) for power in (0, 1)]
    assert begun == expected
    output = capfd.readouterr()
    assert all(f"{name}: recall " in output.out for name in expected)
    assert "12/12" in output.err


def test_no_token_and_no_home_is_written_down(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("seed: 0\nhub_token: not_even_like_a_token\n", encoding="utf-8")
    secrets = ["--config", str(config), "--offset", "0.01"]
    assert main([*flags, "--powers", "0", "1", *secrets]) == 0
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert [str(path) for path, content in written.items() if b"not_even_like_a_token" in content] == []
    logs = [path for path in written if path.name in ("log.txt", "summary.json", "summary.md")]
    assert len(logs) == 6 + 2
    assert [str(path) for path in logs if str(tmp_path).encode() in written[path]] == []
    assert b"--config ~/config.yaml" in written[tmp_path / "out" / "p1_seed0" / "log.txt"]
    assert main([*flags, "--powers", "0", "1", *secrets]) == 0  # it is the same comparison


def test_a_failed_cell_leaves_the_others_alone(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--fail", "p1_seed1"]) == 1
    output = capfd.readouterr()
    log = tmp_path / "out" / "p1_seed1" / "log.txt"
    assert f"p1_seed1 failed with exit status 3: {log}" in output.out
    assert "the cell's last words" in output.out
    assert "the cell's last words" in log.read_text("utf-8")
    assert sum(starts(tmp_path / "out").values()) == 9
    report = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "Not finished, 1 of 9 cells: p = 1 with seed 1 (failed with exit status 3)." in report
    (failed,) = [cell for cell in summary_of(tmp_path / "out")["cells"] if cell["state"] != "finished"]
    assert failed == {"power": 1, "seed": 1, "folder": "p1_seed1", "state": "failed", "exit_status": 3}
    against = summary_of(tmp_path / "out")["quantities"][0]["by_power"][1]["against_0"]
    assert against["seeds"] == [0, 2]
    assert main([*flags, "--fail", "p1_seed1", "--max_parallel", "0"]) == 1
    assert "p = 1 with seed 1." in (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert starts(tmp_path / "out")["p1_seed1"] == 1


def test_a_comparison_that_cannot_work_ends_with_its_first_cell(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--no_such_flag", "3"]) == 1
    output = capfd.readouterr()
    assert "unrecognized arguments: --no_such_flag 3" in output.out
    assert "No cell has come to its end yet, so no other is started." in output.out
    assert [path.name for path in (tmp_path / "out").glob("p*")] == ["p0_seed0"]
    assert not (tmp_path / "out" / "summary.md").exists()


def test_a_wrong_metric_is_told_after_the_first_cell(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metric='recal' is not among what p0_seed0 measured: gen_len, head_loss"):
        main([*flags, "--metric", "recal"])
    assert len(starts(tmp_path / "out")) == 1
    assert main(flags) == 0


def test_cells_run_side_by_side(flags: list[str], tmp_path: Path) -> None:
    """The first cells wait for a file that is made when two have begun, and no third one has by then."""
    go = tmp_path / "go"
    both = runs.start
    begun: list[str] = []

    def start(comparison: Any, cell: Cell, server: Any) -> Any:
        begun.append(cell.name)
        if len(begun) == 2:
            assert not go.exists()
            go.touch()
        return both(comparison, cell, server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "start", start)
        assert main([*flags, "--wait", str(go), "--max_parallel", "2"]) == 0
    assert begun[:2] == ["p0_seed0", "p1_seed0"]
    assert set(starts(tmp_path / "out").values()) == {1}


def test_cells_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("HF_TEMPORAL_CORES", raising=False)
    shared = cell_environment(3)
    assert (shared["OMP_NUM_THREADS"], shared["HF_TEMPORAL_CORES"]) == ("1", "2")
    assert cell_environment(20)["HF_TEMPORAL_CORES"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    shared = cell_environment(3)
    assert (shared["OMP_NUM_THREADS"], shared["HF_TEMPORAL_CORES"]) == ("5", "5")


# ---- interruption


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pid_of(output_dir: Path, name: str) -> int:
    return int((output_dir / name / "starts").read_text().split()[0])


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.fixture
def _as_at_a_terminal() -> Iterator[None]:
    """Nothing is ignored, as it is where the tests themselves run under `nohup` or in the background."""
    usual: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("_as_at_a_terminal")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_interrupts_the_comparison_ends_its_cells(
    flags: list[str], tmp_path: Path, how: signal.Signals, capfd: Any
) -> None:
    output_dir, names = tmp_path / "out", ("p0_seed0", "p1_seed0")

    def interrupt() -> None:
        wait_until(lambda: all((output_dir / name / "starts").exists() for name in names))
        time.sleep(0.2)
        os.kill(os.getpid(), how)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*flags, "--max_parallel", "2", "--wait", str(tmp_path / "go")]) == 130
    thread.join()
    assert "the same command goes on from here" in capfd.readouterr().err
    assert not any(is_alive(pid_of(output_dir, name)) for name in names)
    assert not list(output_dir.glob("*/all_results.json"))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


@pytest.mark.usefixtures("_as_at_a_terminal")
def test_interrupted_while_the_imports_are_made(flags: list[str], stub: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    text = f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    (tmp_path / "asleep.py").write_text(text, encoding="utf-8")
    stub.write_text("import asleep\n", encoding="utf-8")

    def interrupt() -> None:
        wait_until(lambda: begun.exists() and begun.read_text() != "")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(flags) == 130
    thread.join()
    assert not is_alive(int(begun.read_text()))
    assert starts(tmp_path / "out") == {}


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending({}):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_and_continued_runs_no_cell_twice_at_a_time(
    flags: list[str],
    tmp_path: Path,
    child_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    """The cell that outlives the killed comparison is waited for by the next one, which then does the rest."""
    output_dir, go = tmp_path / "out", tmp_path / "go"
    flags = [*flags, "--wait", str(go)]
    killed = subprocess.Popen([sys.executable, "-c", LAUNCHED_DIRECTLY, *flags], env=child_environment)
    wait_until((output_dir / "p0_seed0" / "starts").exists)
    killed.kill()
    killed.wait()
    assert is_alive(pid_of(output_dir, "p0_seed0"))
    begin, tries = runs.start, []

    def start(comparison: Any, cell: Cell, server: Any) -> Any:
        process = begin(comparison, cell, server)
        tries.append((cell.name, process is not None))
        if len(tries) == 3:
            go.touch()
        return process

    monkeypatch.setattr(runs, "start", start)
    assert main(flags) == 0
    assert tries[:3] == [("p0_seed0", False)] * 3
    assert capfd.readouterr().out.count("p0_seed0 is still being run by a process of an earlier comparison") == 1
    assert set(starts(output_dir).values()) == {1}
    assert len(starts(output_dir)) == 9


def test_a_cell_that_was_killed_is_started_again(flags: list[str], tmp_path: Path) -> None:
    """What it left is left in place, for the recipe to go on from."""
    folder = tmp_path / "out" / "p0_seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint-2").mkdir()
    (folder / "log.txt").write_text("of the first time\n")
    assert main([*flags, "--powers", "0", "1"]) == 0
    assert (folder / "checkpoint-2").is_dir()
    log = (folder / "log.txt").read_text("utf-8")
    assert log.startswith("of the first time\n$ accelerate launch ")
    with (folder / "log.txt").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- the real thing


def test_a_recipe_launched_for_real(tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]) -> None:
    output_dir = tmp_path / "out"
    script = Path(finetune_causal_lm.__file__)
    recipe_flags = tiny.flags(output_dir, "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1")
    position = recipe_flags.index("--output_dir")
    del recipe_flags[position : position + 2]
    command = [
        *(sys.executable, str(script.parent / "compare_powers.py"), str(script), *recipe_flags),
        *("--powers", "0", "4", "--seeds", "1", "--metric", "rouge1", "--output_dir", str(output_dir)),
        *("--accelerate_config", str(script.parent / "accelerate" / "cpu.yaml"), "--max_parallel", "2"),
    ]
    run = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "p = 4: no claim from one seed." in run.stdout
    usual, four = summary_of(output_dir)["cells"]
    assert (usual["step"], four["step"]) == (2, 2)
    assert usual["metrics"]["loss"] != four["metrics"]["loss"]
    assert "generated tokens" in (output_dir / "summary.md").read_text("utf-8")

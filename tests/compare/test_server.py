"""Cells that are forked: they are what `accelerate launch` would have started, and none is lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare import runs
from hf_temporal.compare import server as server_module
from hf_temporal.compare.runs import cell_environment
from hf_temporal.compare.server import LOST, Forked, Server
from recipes import finetune_causal_lm
from recipes.compare_powers import main, read_arguments
from tests.tiny_run import REPOSITORY, Tiny

from .stub_recipe import starts, summary_of

PROBE = """
from __future__ import annotations
import sys
path_before = list(sys.path)
imported_before = "recipes.finetune_seq2seq" in sys.modules
import json, os, signal, subprocess, threading, time
from pathlib import Path

sys.path.insert(0, "REPOSITORY")

import torch
from accelerate.state import AcceleratorState, PartialState
from recipes import finetune_causal_lm
from recipes import finetune_seq2seq
from hf_temporal.finetuning.run import share_cores

share_cores()
found = {
    "imported_before": imported_before,
    "environment": dict(os.environ),
    "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    "path": [str(Path(each).resolve()) for each in path_before],
    "file": __file__,
    "main": sys.modules["__main__"].__file__,
    "folder": os.getcwd(),
    "stdin": sys.stdin.read(),
    "stdout": os.path.realpath("/proc/self/fd/1"),
    "buffered": sys.stdout.line_buffering,
    "signals": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "state": [PartialState._shared_state, AcceleratorState._shared_state],
    "threads": torch.get_num_threads(),
    "product": float((torch.ones(600, 600) @ torch.ones(600, 600)).sum()),
    "open": [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if each.is_file() or each.name == "0"],
}
print(json.dumps(found))
"""


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Any]:
    """A function that makes a server of a script's text, launched by Python itself, and tells whether it is ready."""
    servers = []

    def serve(text: str, **environment: str) -> tuple[Server, list[str], bool]:
        script = tmp_path / "script.py"
        script.write_text(text, encoding="utf-8")
        server = Server((sys.executable,), script, {**os.environ, "OMP_NUM_THREADS": "1", **environment})
        servers.append(server)
        return server, [str(script)], server.is_ready()

    yield serve
    for server in servers:
        server.close()


def started(server: Server, argv: list[str], log: Path) -> Forked:
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        forked = server.start(argv, file.fileno())
    assert forked is not None
    return forked


def is_locked(log: Path) -> bool:
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_forked_cell_is_what_accelerate_launch_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But that its imports are made; each reads the same, with the same environment, and no state is there before."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "HF_TEMPORAL_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    script, log = Path("probe.py"), tmp_path / "log.txt"
    script.write_text(PROBE.replace("REPOSITORY", str(REPOSITORY)), encoding="utf-8")
    environment = cell_environment(1)
    assert environment["OMP_NUM_THREADS"] == "1"
    command = [str(script), "--config=a b", "--flag"]
    server = Server(runs.LAUNCHER, script, environment)
    try:
        assert server.is_ready()
        assert started(server, command, log).wait(60) == 0, log.read_text("utf-8")
    finally:
        server.close()
    launched = tmp_path / "launched.txt"
    with launched.open("wb") as file:
        subprocess.run([*runs.LAUNCHER, *command], env=environment, stdin=subprocess.DEVNULL, stdout=file, check=True)
    forked, usual = (json.loads(path.read_text("utf-8").splitlines()[-1]) for path in (log, launched))
    assert (forked.pop("imported_before"), usual.pop("imported_before")) == (True, False)
    assert (forked.pop("stdout"), usual.pop("stdout")) == (str(log), str(launched))
    assert set(forked.pop("open")) == {os.devnull, str(log)}
    del usual["open"]
    assert forked == usual
    assert forked["threads"] == os.cpu_count()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("pass", 0),
        ("import sys\nsys.exit(3)", 3),
        ("import sys\nsys.exit('words')", 1),
        ("raise EOFError", 1),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import no_such_module", 1),
    ],
)
def test_how_a_cell_ends_is_known(plain: Any, tmp_path: Path, text: str, status: int) -> None:
    server, argv, ready = plain(text)
    assert ready
    for _ in range(2):
        forked = started(server, argv, tmp_path / "log.txt")
        assert forked.wait(20) == status
        assert forked.poll() == forked.wait() == status
    assert ("no_such_module" in (tmp_path / "log.txt").read_text("utf-8")) == ("no_such" in text)


def test_a_cell_has_a_session_of_its_own_and_its_lock_goes_with_its_processes(plain: Any, tmp_path: Path) -> None:
    text = (
        "import os, subprocess\nsubprocess.Popen(['sleep', '600'])\nprint(os.getpid() == os.getsid(0), os.getppid())"
    )
    server, argv, _ = plain(text)
    log = tmp_path / "log.txt"
    forked = started(server, argv, log)
    assert forked.wait(20) == 0
    alone, watcher = log.read_text("utf-8").split()
    assert alone == "True"
    time.sleep(0.2)
    assert not Path(f"/proc/{watcher}").exists()
    assert is_locked(log)
    os.killpg(forked.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while is_locked(log):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_cell_outlives_its_server_and_its_end_is_told(plain: Any, tmp_path: Path) -> None:
    go, log = tmp_path / "go", tmp_path / "log.txt"
    server, argv, _ = plain(
        "import os, sys, time\nprint(os.getpid(), flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.02)\nsys.exit(5)"
    )
    forked, abandoned = started(server, argv, log), started(server, argv, tmp_path / "other.txt")
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.1)
    assert forked.poll() is None
    server.close()
    with (tmp_path / "late.txt").open("ab") as file:
        assert server.start(argv, file.fileno()) is None
    os.kill(int(Path(f"/proc/{abandoned.pid}/stat").read_text().split()[3]), signal.SIGKILL)  # its watcher
    assert abandoned.wait(20) == LOST
    assert is_locked(tmp_path / "other.txt")
    go.touch()
    assert forked.wait(20) == 5
    assert int(log.read_text("utf-8")) == forked.pid


def test_a_cell_that_nobody_waits_for_does_not_begin(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an interruption between a request and its answer."""
    server, argv, _ = plain("print('begun')")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    log = tmp_path / "log.txt"
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "Forked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(server, argv, log)
    while is_locked(log):
        time.sleep(0.05)
    assert log.read_text() == ""
    assert started(server, argv, log).wait(20) == 0


def test_what_must_not_be_forked_is_launched(plain: Any, flags: list[str], tmp_path: Path) -> None:
    assert not plain("pass", MASTER_ADDR="127.0.0.1")[2]
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    assert not plain("import threads")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setattr(Server, "start", None)
        assert main([*flags, "--powers", "0", "--seeds", "0", "1"]) == 0
    assert set(starts(tmp_path / "out").values()) == {1}


def test_the_script_itself_is_not_run_for_its_imports(plain: Any, tmp_path: Path) -> None:
    text = f"import os\nopen({str(tmp_path / 'ran')!r}, 'a').write('x')"
    server, argv, _ = plain(text)
    assert not (tmp_path / "ran").exists()
    assert started(server, argv, tmp_path / "log.txt").wait(20) == 0
    assert (tmp_path / "ran").read_text() == "x"


def test_random_names_of_data_differ_between_cells(plain: Any, tmp_path: Path) -> None:
    server, argv, _ = plain(
        "from datasets.fingerprint import generate_random_fingerprint\nprint(generate_random_fingerprint())"
    )
    for name in "ab":
        assert started(server, argv, tmp_path / name).wait(60) == 0
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()


def test_a_forked_recipe_gives_what_its_command_gives(
    tiny: Tiny, tmp_path: Path, child_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = tmp_path / "out"
    script = Path(finetune_causal_lm.__file__)
    recipe_flags = tiny.flags(output_dir, "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1")
    grid = ["--powers", "0", "4", "--seeds", "1", "--metric", "rouge1"]
    monkeypatch.setattr(os, "environ", {**os.environ, **child_environment})
    monkeypatch.setattr(runs, "subprocess", None)  # no cell is launched
    assert main([str(script), *recipe_flags, *grid]) == 0
    again = read_arguments([str(script), *recipe_flags, *grid, "--output_dir", str(tmp_path / "again")])
    cell = list(again.cells())[1]
    subprocess.run([*runs.LAUNCHER, *again.command(cell)], env=child_environment, check=True)
    forked, launched = (output_dir / cell.name, cell.folder)
    name = "adapter_model.safetensors"
    assert (forked / name).read_bytes() == (launched / name).read_bytes()
    metrics = summary_of(output_dir)["cells"][1]["metrics"]
    last = json.loads((launched / "evaluations.json").read_text("utf-8"))["evaluations"][-1]["metrics"]
    timed = ("runtime", "per_second")
    assert {name: value for name, value in metrics.items() if not name.endswith(timed)} == {
        name.removeprefix("eval_"): value for name, value in last.items() if not name.endswith(timed)
    }

"""Cells that are forked: they are what `accelerate launch` would have started, and none is lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hf_temporal.compare import runs, server
from hf_temporal.compare.main import main, read_arguments
from hf_temporal.compare.runs import cell_environment
from hf_temporal.compare.server import Forked, Server, imports_of, may_fork
from recipes import finetune_causal_lm
from tests.tiny_run import REPOSITORY, Tiny

from .stub_recipe import starts, summary_of

PROBE = """
import sys
imported_before = "torch" in sys.modules
import json, os, signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from hf_temporal.finetuning.process import share_cores

share_cores()
found = {
    "imported_before": imported_before,
    "environment": {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "KMP_"))},
    "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    "path": str(Path(sys.path[0]).resolve()),
    "file": __file__,
    "folder": os.getcwd(),
    "stdin": os.path.realpath("/proc/self/fd/0"),
    "stdout": os.path.realpath("/proc/self/fd/1"),
    "session": os.getsid(0) == os.getpid(),
    "signals": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "state": [PartialState._shared_state, AcceleratorState._shared_state],
    "threads": torch.get_num_threads(),
    "product": float((torch.ones(600, 600) @ torch.ones(600, 600)).sum()),
}
print(json.dumps(found))
"""


def started(script: Path, log: Path, *flags: str) -> Forked:
    serving = Server(script, cell_environment(1))
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        forked = serving.start([str(script), *flags], file.fileno())
    assert forked is not None
    return forked


def script_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def is_locked(log: Path) -> bool:
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_forked_cell_is_what_accelerate_launch_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But that its imports are made; accelerate's own settings are those that it has without them.

    Those of Intel's OpenMP, KMP_*, are set by accelerate 1.10 even where nobody asked for the CPU, later not.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "HF_TEMPORAL_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    script, log, launched = Path("probe.py"), tmp_path / "log.txt", tmp_path / "launched.txt"
    script.write_text(PROBE, encoding="utf-8")
    assert started(script, log, "--config=a b", "--flag").wait(120) == 0, log.read_text("utf-8")
    with launched.open("wb") as file:
        subprocess.run(
            [*runs.LAUNCHER, str(script), "--config=a b", "--flag"],
            env=cell_environment(1),
            stdin=subprocess.DEVNULL,
            stdout=file,
            check=True,
        )
    forked, usual = (json.loads(path.read_text("utf-8").splitlines()[-1]) for path in (log, launched))
    assert (forked.pop("imported_before"), usual.pop("imported_before")) == (True, False)
    assert (forked.pop("stdout"), usual.pop("stdout")) == (str(log), str(launched))
    assert forked.pop("session")
    del usual["session"]
    assert forked == usual
    assert (forked["environment"]["OMP_NUM_THREADS"], forked["threads"]) == ("1", os.cpu_count())


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("pass", 0),
        ("import sys\nsys.exit(3)", 3),
        ("raise EOFError", 1),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import no_such_module", 1),
        ("import atexit\natexit.register(print, 'words at the end, no_such_module')", 0),
    ],
)
def test_how_a_cell_ends_is_known(tmp_path: Path, text: str, status: int) -> None:
    forked = started(script_of(tmp_path, text), tmp_path / "log.txt")
    assert forked.wait(120) == status
    assert forked.poll() == forked.wait() == status
    assert ("no_such_module" in (tmp_path / "log.txt").read_text("utf-8")) == ("no_such" in text)


def test_the_lock_goes_with_all_processes_of_a_cell(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    forked = started(script_of(tmp_path, "import subprocess\nsubprocess.Popen(['sleep', '600'])"), log)
    assert forked.wait(120) == 0
    assert is_locked(log)
    os.killpg(forked.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while is_locked(log):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_cell_that_runs_on_is_told(tmp_path: Path) -> None:
    forked = started(script_of(tmp_path, "import time\ntime.sleep(600)"), tmp_path / "log.txt")
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.1)
    assert forked.poll() is None
    forked.send_signal(signal.SIGTERM)
    assert forked.wait(20) == -signal.SIGTERM
    forked.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("why", ["environment", "configuration"])
def test_what_must_not_be_forked_is_launched(
    why: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert may_fork()
    if why == "environment":
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    else:
        monkeypatch.setattr(server, "default_config_file", str(script_of(tmp_path, "")))
    assert not may_fork()
    monkeypatch.setattr(Server, "start", None)
    assert main([*flags, "--powers", "0", "--seeds", "0", "1"]) == 0
    assert set(starts(tmp_path / "out").values()) == {1}


def test_the_script_itself_is_not_run_for_its_imports(tmp_path: Path) -> None:
    text = "import os, json.decoder as decoder\nfrom pathlib import Path\nfrom . import b\nif True:\n    import c\n"
    assert imports_of(script_of(tmp_path, text)) == ["os", "json.decoder", "pathlib"]


def test_a_cell_finds_what_recipes_import_late_and_does_not_collect_what_cells_share(tmp_path: Path) -> None:
    text = "import gc, sys\nprint('hf_temporal.plots' in sys.modules, gc.get_freeze_count() > 10_000)"
    assert started(script_of(tmp_path, text), tmp_path / "log.txt").wait(120) == 0
    assert (tmp_path / "log.txt").read_text("utf-8") == "True True\n"


def test_random_names_of_data_differ_between_cells(tmp_path: Path) -> None:
    text = "from datasets.fingerprint import generate_random_fingerprint\nprint(generate_random_fingerprint())"
    script = script_of(tmp_path, text)
    for name in "ab":
        assert started(script, tmp_path / name).wait(120) == 0
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
    cores = {"HF_TEMPORAL_CORES": child_environment["OMP_NUM_THREADS"]}  # a cell's share: sums depend on the threads
    subprocess.run([*runs.LAUNCHER, *again.command(cell)], env={**child_environment, **cores}, check=True)
    forked, launched = (output_dir / cell.name, cell.folder)
    name = "adapter_model.safetensors"
    assert (forked / name).read_bytes() == (launched / name).read_bytes()
    metrics = summary_of(output_dir)["cells"][1]["metrics"]
    last = json.loads((launched / "evaluations.json").read_text("utf-8"))["evaluations"][-1]["metrics"]
    timed = ("runtime", "per_second")
    assert {name: value for name, value in metrics.items() if not name.endswith(timed)} == {
        name.removeprefix("eval_"): value for name, value in last.items() if not name.endswith(timed)
    }

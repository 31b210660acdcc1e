"""Cells without their imports: a process that has made them once forks for every cell.

`accelerate launch` starts it, so that the environment is that of a cell which it had started itself:

    accelerate launch recipes/comparison/server.py recipes/finetune_causal_lm.py

The requests come through its standard input, a socket that a `Server` holds the other end of. When that end is closed
it ends; the cells go on.
"""

from __future__ import annotations

import ast
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

LOST = 255  # exit status of a cell whose end nobody saw
FORKS_ALONG = "jemalloc_bg_thd"  # the thread of pyarrow's allocator, which has handlers for forks


class Forked:
    """A cell of a `Server`, with what a `Popen` has."""

    def __init__(self, pid: int, report: Connection) -> None:
        self.pid = pid
        self._report = report
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; TimeoutExpired where it still runs after so many seconds."""
        if self._status is None:
            if not self._report.poll(timeout):
                raise subprocess.TimeoutExpired(f"cell {self.pid}", timeout or 0)
            try:
                self._status = int(self._report.recv())
            except (EOFError, OSError):
                self._status = LOST
        return self._status


class Server:
    """This file as a process of its own, until `close`.

    Args:
        launcher: the command that starts a script.
        recipe: of all cells.
        environment: of all cells.
    """

    def __init__(self, launcher: Sequence[str], recipe: Path, environment: Mapping[str, str]) -> None:
        self._requests, there = Pipe()
        self._process = subprocess.Popen(
            [*launcher, __file__, str(recipe)],
            stdin=there.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        there.close()

    def is_ready(self) -> bool:
        """Whether it forks cells, once it has made their imports; where it may not, they have to be launched."""
        with suppress(EOFError, OSError):
            return bool(self._requests.recv())
        return False

    def start(self, argv: Sequence[str], log: int) -> Forked | None:
        """A cell that writes into `log`; None where the server is gone."""
        report, there = Pipe()
        with suppress(EOFError, OSError):
            with there:
                self._requests.send(list(argv))
                for descriptor in (log, there.fileno()):
                    send_handle(self._requests, descriptor, self._process.pid)
            forked = Forked(report.recv(), report)
            report.send("go")
            return forked
        return None

    def close(self) -> None:
        """End it; its cells go on."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._requests.close()


# ---- the process


def preload(recipe: Path) -> None:
    """Make the imports at the top of a script, not the script's own doing; one that fails is left to the cells."""
    path = [str(recipe.resolve().parent), *sys.path[1:]]  # a script's
    sys.path = [str(Path(__file__).resolve().parents[2]), *path]
    for node in ast.parse(recipe.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            with suppress(Exception):
                exec(compile(ast.Module([node], []), str(recipe), "exec"), {})
    sys.path = path


def next_cell(requests: Connection) -> list[str] | None:
    """Fork a process for every request: its script and flags there; None in the server, once nobody asks any more."""
    while True:
        try:
            argv: list[str] = requests.recv()
            log, report = recv_handle(requests), Connection(recv_handle(requests))
        except EOFError:
            return None
        if not os.fork():
            requests.close()
            _become_cell(log, report)
            return argv
        os.close(log)
        report.close()


def _become_cell(log: int, report: Connection) -> None:
    """Fork once more: the cell in a session of its own, told to go once its process id is known; its end told here."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if cell := os.fork():
        os.close(log)
        status = os.waitstatus_to_exitcode(os.waitpid(cell, 0)[1])
        with suppress(OSError):
            report.send(status)
        os._exit(0)
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        report.send(os.getpid())
        report.recv()
    except (EOFError, OSError):  # whoever asked for the cell is gone
        os._exit(1)
    report.close()
    if fingerprint := sys.modules.get("datasets.fingerprint"):
        fingerprint.fingerprint_rng.seed()  # or all cells would name different data alike


def may_fork() -> bool:
    """Whether this process is the only one of its launch, and has no thread that a fork would leave behind."""
    names = {path.parent.name: path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    is_alone = names.pop(str(os.getpid()), None) is not None and set(names.values()) <= {FORKS_ALONG}
    return is_alone and "MASTER_ADDR" not in os.environ


def main() -> None:
    """Serve; in a cell, be the recipe."""
    requests = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    preload(Path(sys.argv[1]))
    if not may_fork():
        return
    requests.send("ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if argv := next_cell(requests):
        sys.argv = argv
        runpy.run_path(str(Path(argv[0]).absolute()), run_name="__main__")


if __name__ == "__main__":
    main()

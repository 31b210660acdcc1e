"""The cells of a comparison as processes: started, watched, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from huggingface_hub.utils import tqdm

from hf_temporal.hub.privacy import without_tokens

from .cells import Cell, lock
from .grid import Comparison
from .quantities import number, title_of
from .server import Forked, Server, may_fork

LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
LOG_LINES = 20
INTERVAL = 0.1  # seconds between two looks at the running cells
GRACE = 30  # seconds that a cell has to end when it is told to

Process = subprocess.Popen[bytes] | Forked


def start(comparison: Comparison, cell: Cell, server: Server | None) -> Process | None:
    """Run a cell in a session of its own; None where a process of an earlier comparison still runs it.

    The server forks it, where there is one; otherwise it is launched.

    The lock is on the log file and goes with its descriptor to every process of the cell, which write there: it is
    held for as long as one of them lives, whoever started them.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        if not lock(log):
            return None
        log.write(f"$ {without_tokens(comparison.shown(cell))}\n".encode())
        log.flush()
        if server and (forked := server.start(comparison.command(cell), log.fileno())):
            return forked
        return subprocess.Popen(
            [*LAUNCHER, *comparison.command(cell)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=cell_environment(comparison.arguments.max_parallel),
            start_new_session=True,
        )


def cell_environment(max_parallel: int) -> dict[str, str]:
    """This process's, with each cell's share of the cores, which its recipe spreads over its own processes.

    OMP_NUM_THREADS, the threads of one process, is as `accelerate launch` would set it, unless the user has.
    """
    share = str(max(1, (os.cpu_count() or 1) // max_parallel))
    return {"OMP_NUM_THREADS": "1", "HF_TEMPORAL_CORES": os.environ.get("OMP_NUM_THREADS", share), **os.environ}


@contextmanager
def ending(running: Mapping[Cell, Process]) -> Iterator[None]:
    """Whatever ends this process, but SIGKILL, ends the cells that are still running, with all their processes.

    A signal that is ignored, as SIGHUP is under `nohup`, stays so.
    """
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    for each, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for process in running.values():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in running.values():
            _signal(process, signal.SIGKILL)
            process.wait()
        for each, handler in handlers.items():
            signal.signal(each, handler)


def _signal(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)  # to it alone, as a cell that was only just forked has no session yet
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Runs:
    """The cells of a comparison, those of all its combinations together, run `max_parallel` at a time.

    A failed cell leaves the others alone, unless none has ever come to its end: then no other is started.

    Attributes:
        failed: exit status of the cells that failed.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.failed: dict[Cell, int] = {}
        self._comparison = comparison
        self._cells = cells = comparison.cells()
        self._done = [cell for cell in cells if cell.finished]
        self._waiting = [cell for cell in cells if not cell.finished]
        self._busy: set[Cell] = set()
        self._begun: dict[Cell, float] = {}
        self._running: dict[Cell, Process] = {}
        arguments = comparison.arguments
        self._server = None
        if self._waiting and arguments.max_parallel and not arguments.accelerate_config and may_fork():
            self._server = Server(comparison.recipe, cell_environment(arguments.max_parallel))

    def run(self) -> None:
        """Until each cell is finished or has failed.

        Raises:
            ValueError: a finished cell has no evaluation with the metric.
        """
        metric = self._comparison.arguments.metric
        for cell in self._done:
            cell.evaluations(metric)
        total = len(self._done) + len(self._waiting)
        with tqdm(total=total, initial=len(self._done), unit="cell") as bar, ending(self._running):
            while self._waiting or self._running:
                ended = [cell for cell, process in self._running.items() if process.poll() is not None]
                for cell in ended:
                    bar.write(self._end(cell))
                    bar.update()
                if self.failed and not self._done:
                    self._waiting.clear()
                self._start(bar)
                time.sleep(INTERVAL)

    def _start(self, bar: Any) -> None:
        """Fill the free places; a cell that is run by an earlier comparison's process takes one, too."""
        free = self._comparison.arguments.max_parallel - len(self._running)
        for cell in self._waiting[: max(0, free)]:
            process = None if cell.finished else start(self._cells[cell], cell, self._server)
            if cell.finished and process is None:
                self._waiting.remove(cell)
                self._done.append(cell)
                bar.update()
            elif process is not None:
                self._waiting.remove(cell)
                self._running[cell] = process
                self._begun[cell] = time.monotonic()
            elif cell not in self._busy:
                self._busy.add(cell)
                bar.write(
                    f"{self._name(cell)} is still being run by a process of an earlier comparison: waiting for it"
                )

    def _end(self, cell: Cell) -> str:
        """Book the end of a cell; a line that tells it."""
        status = self._running.pop(cell).wait()
        if cell.finished:
            self._done.append(cell)
            metric = self._comparison.arguments.metric
            evaluations = cell.evaluations(metric)
            step, minutes = max(evaluations), (time.monotonic() - self._begun[cell]) / 60
            value = number(evaluations[step][metric])
            return f"{self._name(cell)}: {title_of(metric)} {value} at step {step:,}, {minutes:.1f} minutes"
        line = f"{self._name(cell)} failed with exit status {status}: {cell.log}"
        if not self.failed:
            end = cell.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            line += "".join(f"\n    {each}" for each in end)
        if not self._done:
            line += "\nNo cell has come to its end yet, so no other is started."
        self.failed[cell] = status
        return line

    def _name(self, cell: Cell) -> str:
        return cell.folder.relative_to(self._comparison.output_dir).as_posix()

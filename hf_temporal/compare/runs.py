"""The cells of a comparison as processes: they are started, watched and ended."""

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
INTERVAL = 0.1  # Seconds between two looks at the running cells.
GRACE = 30  # Seconds that a cell has to end when it is told to.

Process = subprocess.Popen[bytes] | Forked


def start(comparison: Comparison, cell: Cell, server: Server | None) -> Process | None:
    """Start a cell in a session of its own, forked by the server if there is one, else by `accelerate launch`.

    The log file is locked. Every process of the cell writes there and so inherits the lock, which is held for as long
    as one of them lives.
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
    """The environment of a cell: that of this process, and in HF_TEMPORAL_CORES the cell's share of the cores.

    OMP_NUM_THREADS, the threads of one process, is what `accelerate launch` sets, unless the user has set it.
    """
    share = str(max(1, (os.cpu_count() or 1) // max_parallel))
    return {"OMP_NUM_THREADS": "1", "HF_TEMPORAL_CORES": os.environ.get("OMP_NUM_THREADS", share), **os.environ}


@contextmanager
def ending(running: Mapping[Cell, Process]) -> Iterator[None]:
    """End the cells that are still running, with all their processes, when this process ends, unless by SIGKILL.

    A signal that is ignored, such as SIGHUP under `nohup`, stays ignored.
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
        process.send_signal(number)  # A cell that was only just forked has no session of its own yet.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Runs:
    """Runs the cells of a comparison, those of all its combinations in one queue, `max_parallel` at a time.

    When a cell fails, the others go on, unless none has been finished yet: then no further cell is started.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.failed: dict[Cell, int] = {}  # their exit statuses
        self._arguments = arguments = comparison.arguments
        self._output_dir = comparison.output_dir
        self._cells = cells = comparison.cells()
        self._done = [cell for cell in cells if cell.finished]
        self._waiting = [cell for cell in cells if not cell.finished]
        self._busy: set[Cell] = set()
        self._begun: dict[Cell, float] = {}
        self._running: dict[Cell, Process] = {}
        self._server = None
        if self._waiting and arguments.max_parallel and not arguments.accelerate_config and may_fork():
            self._server = Server(comparison.recipe, cell_environment(arguments.max_parallel))

    def run(self) -> None:
        """Run until each cell is finished or has failed; a `ValueError` tells a cell that lacks the metric."""
        for cell in self._done:
            cell.evaluations(self._arguments.metric)
        with tqdm(total=len(self._cells), initial=len(self._done), unit="cell") as bar, ending(self._running):
            while self._waiting or self._running:
                for cell in [cell for cell, process in self._running.items() if process.poll() is not None]:
                    bar.write(self._end(cell))
                    bar.update()
                if self.failed and not self._done:
                    self._waiting.clear()
                self._start(bar)
                time.sleep(INTERVAL)

    def _start(self, bar: Any) -> None:
        """Fill the free places; a cell that a process of an earlier comparison runs takes one, too."""
        free = self._arguments.max_parallel - len(self._running)
        for cell in self._waiting[: max(0, free)]:
            process = None if cell.finished else start(self._cells[cell], cell, self._server)
            if process is not None:
                self._waiting.remove(cell)
                self._running[cell] = process
                self._begun[cell] = time.monotonic()
            elif cell.finished:
                self._waiting.remove(cell)
                self._done.append(cell)
                bar.update()
            elif cell not in self._busy:
                self._busy.add(cell)
                name = self._name(cell)
                bar.write(f"{name} is still being run by a process of an earlier comparison: waiting for it")

    def _end(self, cell: Cell) -> str:
        """Book the end of a cell, and say in a line how it ended."""
        status = self._running.pop(cell).wait()
        if cell.finished:
            self._done.append(cell)
            metric = self._arguments.metric
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
        return cell.folder.relative_to(self._output_dir).as_posix()

"""What the benchmarks share: processes that take turns, noise, memory, and the JSON file of the figures."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_temporal.finetuning.tables import environment, table

__all__ = [
    "Child",
    "ended",
    "environment",
    "in_turn",
    "memory",
    "peak_memory",
    "read_rows",
    "spread",
    "table",
    "write",
]


class Child:
    """A process that runs `serve(connection, *arguments)` and answers on command.

    Args:
        name: for the error message.
        serve: receives a message for each command, and sends what it found.
        preload: modules that are imported once, in the process that all are forked from.
        log: a file that the process prints to, for the error message.
    """

    def __init__(
        self, name: str, serve: Callable[..., None], *arguments: Any, preload: list[str], log: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self.name = name
        self.log = log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Any:
        """Give the command and return the answer."""
        with suppress(ConnectionError):  # receive() says why the process is gone
            self.connection.send(True)
        return self.receive()

    def receive(self) -> Any:
        """The next thing that the process sends.

        Raises:
            RuntimeError: it ended without one, for want of memory perhaps; the message holds what it printed.
        """
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            said = self.log.read_text(encoding="utf-8", errors="replace")[-4000:] if self.log else ""
            message = f"{self.name!r} ended early with exit code {self.process.exitcode}"
            raise RuntimeError(f"{message}\n{said}".rstrip()) from error

    def end(self) -> None:
        """Stop the process."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


@contextmanager
def ended(children: Iterator[Child]) -> Iterator[list[Child]]:
    """The children in a list; they end with the block."""
    with ExitStack() as stack:
        started = []
        for child in children:
            started.append(child)
            stack.callback(child.end)
        yield started


def in_turn(children: Sequence[Child], repeats: int) -> list[list[Any]]:
    """The answers of each child, `repeats` of them, one child at a time and in an order that rotates."""
    answers: list[list[Any]] = [[] for _ in children]
    for repeat in range(repeats):
        for turn in range(len(children)):
            which = (repeat + turn) % len(children)
            answers[which].append(children[which].step())
    return answers


def memory() -> int:
    """The process's resident size in bytes; its largest so far where the system does not tell the present one."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else peak_memory()


def peak_memory() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def spread(values: Sequence[float]) -> float:
    """(third − first quartile) / median: the noise of repeated measurements as a share of what was measured."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results as a JSON file that appears whole or not at all; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)


def read_rows(path: Path, benchmark: str) -> list[dict[str, Any]]:
    """The rows of a benchmark, from the file that it wrote or from that of a machine, which lists the runs of several.

    Raises:
        ValueError: the file has none.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = [content] if content.get("benchmark") == benchmark else content.get(benchmark, [])
    rows = [row for run in runs for row in run["rows"]]
    if not rows:
        raise ValueError(
            f"{path} has no rows of {benchmark}; accepted: a file that this benchmark wrote, or a machine's."
        )
    return rows

"""Cells without their imports: the fork server of the standard library makes them once, and forks for every cell."""

from __future__ import annotations

import ast
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file


class Forked:
    """A cell of a `Server`, with what a `Popen` has."""

    def __init__(self, process: BaseProcess, pid: int) -> None:
        self.pid = pid
        self._process = process

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; TimeoutExpired where it still runs after so many seconds."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(f"cell {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """Forks the cells of a recipe, all with the same environment; it ends with this process, the cells do not."""

    def __init__(self, recipe: Path, environment: Mapping[str, str]) -> None:
        # by this one a recipe knows that it was launched, and takes its share of the cores
        self._environment = {"ACCELERATE_MIXED_PRECISION": "no", **environment}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *imports_of(recipe)])
        before = dict(os.environ)
        os.environ.update(environment)  # for the server, whose libraries read it when they are imported
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, argv: Sequence[str], log: int) -> Forked | None:
        """A cell that writes into the file `log`; None where the server is gone, as its imports ended it."""
        with Connection(os.dup(log)) as file, suppress(EOFError, OSError):
            process = self._context.Process(target=_be_cell, args=(list(argv), self._environment, file))
            process.start()
            return Forked(process, process.pid or 0)
        return None


def may_fork() -> bool:
    """Whether a cell is one process on the CPU with nothing that `accelerate launch` would have to set."""
    settings = "MASTER_ADDR" in os.environ or Path(default_config_file).is_file()
    return not settings and not torch.accelerator.is_available()


def imports_of(recipe: Path) -> list[str]:
    """The modules that a script imports at its top."""
    nodes = ast.parse(recipe.read_text(encoding="utf-8")).body
    plain = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def _be_cell(argv: list[str], environment: Mapping[str, str], log: Connection) -> None:
    """In the process of the cell: a session, streams and an environment of its own, then the recipe."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    log.close()
    os.environ.clear()
    os.environ.update(environment)
    if fingerprint := sys.modules.get("datasets.fingerprint"):
        fingerprint.fingerprint_rng.seed()  # or all cells would name different data alike
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(str(Path(argv[0]).absolute()), run_name="__main__")
    finally:
        atexit._run_exitfuncs()

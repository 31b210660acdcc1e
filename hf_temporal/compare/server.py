"""Cells that share their imports: the standard library's fork server makes them once and is forked for every cell."""

import ast
import atexit
import gc
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file

IMPORTED_LATE = ["hf_temporal.plots"]  # by a recipe, once it has trained


class Forked(ForkServerProcess):
    """A process of a `Server`, with the methods of `Popen`."""

    pid: int  # once it is started

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(f"cell {self.pid}", timeout or 0)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, number)


class Server:
    """Forks the cells of a recipe, all with one environment. The server ends with this process, its cells do not."""

    def __init__(self, recipe: Path, environment: Mapping[str, str]) -> None:
        # This variable tells a recipe that it was launched and is to take its share of the cores.
        self._environment = {"ACCELERATE_MIXED_PRECISION": "no", **environment}
        forkserver.set_forkserver_preload([__name__, *imports_of(recipe), *IMPORTED_LATE])
        before = dict(os.environ)
        os.environ.update(environment)  # The server's libraries read it when they are imported.
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, argv: Sequence[str], log: int) -> Forked | None:
        """Start a cell that writes into the file `log`; None where the imports have ended the server."""
        with Connection(os.dup(log)) as file, suppress(EOFError, OSError):
            process = Forked(target=_be_cell, args=(list(argv), self._environment, file))
            process.start()
            return process
        return None


def may_fork() -> bool:
    """Whether a cell is a single process on the CPU for which `accelerate launch` would set nothing else."""
    settings = "MASTER_ADDR" in os.environ or Path(default_config_file).is_file()
    return not settings and not torch.accelerator.is_available()


def imports_of(recipe: Path) -> list[str]:
    """The modules that a script imports at its top level."""
    nodes = ast.parse(recipe.read_text(encoding="utf-8")).body
    plain = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def _be_cell(argv: list[str], environment: Mapping[str, str], log: Connection) -> None:
    """Run the recipe in the forked process, with a session, streams and an environment of its own."""
    os.setsid()
    gc.freeze()  # no collection goes over the objects of all imports, or copies the memory that cells share
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    log.close()
    os.environ.clear()
    os.environ.update(environment)
    if fingerprint := sys.modules.get("datasets.fingerprint"):
        fingerprint.fingerprint_rng.seed()  # Otherwise all cells would give different data the same name.
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(str(Path(argv[0]).absolute()), run_name="__main__")
    finally:
        atexit._run_exitfuncs()

"""Each model in a process of its own, with a limit on time and memory: one that hangs or crashes is a row."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from .cases import Report, examine

SECONDS = 90
BYTES = 6 << 30


def classes() -> list[str]:
    """The names of all classes, without repetition."""
    names: set[str] = set()
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        for value in mapping.values():
            names.update([value] if isinstance(value, str) else value)
    return sorted(names)


def examine_all(names: Sequence[str], *, jobs: int = 1) -> Iterator[Report]:
    """A report of each, as they come."""
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage after each run, which otherwise takes most of the time
    logging.set_verbosity_error()
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(_examined, name) for name in names]):
            yield done.result()


def _examined(name: str) -> Report:
    context: Any = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, theirs))
    child.start()
    theirs.close()
    try:
        report = mine.recv() if mine.poll(SECONDS) else Report(name, f"not done within {SECONDS} s")
    except EOFError:
        child.join()
        report = Report(name, f"the process ended with {child.exitcode}")
    if child.is_alive():
        child.kill()
    child.join()
    return report


def _child(name: str, results: Connection) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: PTH123, SIM115
    try:
        results.send(examine(name))
    except MemoryError:
        results.send(Report(name, f"more than {BYTES >> 30} GiB"))
    except Exception as error:  # noqa: BLE001
        results.send(Report(name, f"{type(error).__name__}: {error}"))

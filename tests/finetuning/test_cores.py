"""How many cores a process takes for its share, and the memory that it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from hf_temporal.finetuning.process import share_cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [8]),
        ({"LOCAL_WORLD_SIZE": "2"}, [4]),
        ({"LOCAL_WORLD_SIZE": "20"}, [1]),
        ({"HF_TEMPORAL_CORES": "3"}, [3]),
        ({"HF_TEMPORAL_CORES": "3", "LOCAL_WORLD_SIZE": "2"}, [1]),
        ({"OMP_NUM_THREADS": "2"}, []),
    ],
)
def test_cores_are_shared(environment: dict[str, str], expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for name in ("HF_TEMPORAL_CORES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    launched = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    for name, value in (launched | environment).items():
        monkeypatch.setenv(name, value)
    share_cores()
    assert taken == expected


PAGE_FAULTS = """
import resource, sys, torch
from hf_temporal.finetuning.process import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
block = torch.ones(64 << 18)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    block = torch.ones(64 << 18)
    del block
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (64 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize(
    ("how", "environment", "blocks"),
    [
        ("keep", {}, (0, 20)),
        ("not", {}, (38, 60)),
        ("keep", {"MALLOC_MMAP_THRESHOLD_": "1048576"}, (38, 60)),
        ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, (38, 60)),
    ],
)
def test_freed_memory_is_used_again(how: str, environment: dict[str, str], blocks: tuple[int, int]) -> None:
    """40 blocks of 64 MiB, each freed before the next: how many of them the system had to give page by page."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC", "THP"))}
    child = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS, how], env=kept | environment, capture_output=True, text=True, check=True
    )
    assert blocks[0] <= float(child.stdout) <= blocks[1]

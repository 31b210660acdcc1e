"""OpenMP's threads wait briefly for each other only while other processes want the cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_temporal.finetuning.waiting import brief_waiting_when_busy

CODE = """
import json, resource, time
import torch
from hf_temporal.finetuning import waiting

def sleeps(times=200):
    values, before = torch.ones(1 << 16), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(times):
        values.add_(1)
        end = time.thread_time() + 5e-4  # for so long the other threads wait
        while time.thread_time() < end:
            pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

torch.set_num_threads({threads})
waiting.PERIOD = 0.01
before = sleeps()
with waiting.brief_waiting_when_busy():
    time.sleep({pause})
    inside = sleeps()
print(json.dumps([before, inside, sleeps()]))
"""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or CORES < 2, reason="libgomp's threads, on two cores or more"
)
def test_threads_sleep_soon_where_the_core_is_taken_and_only_there() -> None:
    """A pause looks to the watcher as if another process had taken the core; each sleep is a context switch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(threads=CORES, pause=0.1)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    before, inside, after = json.loads(ran.stdout)
    assert inside > 100
    assert max(before, after) < inside / 4


def test_one_thread_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("threading.Thread.start", lambda _: pytest.fail("a watcher was started"))
    with brief_waiting_when_busy():
        time.sleep(0)

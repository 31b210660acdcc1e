"""One of two processes is killed: the other ends, and the run goes on to the end of one that nothing befell."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from tests.finetuning.faulty_runs import Fault, KilledBeforeStep, Run, status_of

BOUND = 60  # seconds within which the other one notices


def both(run: Run, fault: Fault | None = None) -> list[int]:
    """The exit statuses of two ranks, without a launcher, which would end the other itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        run.start(fault=fault, environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    killed = status_of(ranks[1])
    begin = time.monotonic()
    return [status_of(ranks[0], BOUND if fault else 300 - (time.monotonic() - begin)), killed]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="the Trainer cannot load an optimizer where several processes run on CPUs",
)
def test_one_rank_of_two_is_killed(tmp_path: Path) -> None:
    undisturbed, run = Run(tmp_path / "undisturbed"), Run(tmp_path / "run")
    assert both(undisturbed) == [0, 0], undisturbed.log
    names = {path.name for path in (undisturbed.folder / "checkpoint-2").glob("rng_state*")}
    assert names == {"rng_state_0.pth", "rng_state_1.pth"}  # there were two
    assert both(run, KilledBeforeStep(3, rank=1)) == [1, -signal.SIGKILL], run.log
    before = run.complete
    assert [*before] == ["checkpoint-2"]
    assert both(run) == [0, 0], run.log
    assert run.complete["checkpoint-2"] == before["checkpoint-2"]
    run.assert_ends_as(undisturbed)

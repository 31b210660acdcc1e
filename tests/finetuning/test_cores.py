"""How many cores a process takes for its share."""

from __future__ import annotations

import pytest
import torch

from hf_temporal.finetuning.run import share_cores


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

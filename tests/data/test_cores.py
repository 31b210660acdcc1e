"""How many cores a process takes for its share."""

from __future__ import annotations

import pytest

from hf_temporal.data.cores import own_cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_WORLD_SIZE": "20"}, 1),
        ({"HF_TEMPORAL_CORES": "3"}, 3),
        ({"HF_TEMPORAL_CORES": "3", "LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_own_cores(environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for name in ("HF_TEMPORAL_CORES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_cores() == expected

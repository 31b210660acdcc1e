from __future__ import annotations

import math

import pytest

from hf_temporal import power_at


def test_constant_is_the_final_power() -> None:
    assert power_at(3, 10, schedule="constant", start=0.0, end=math.inf) == math.inf


@pytest.mark.parametrize(
    ("step", "linear", "cosine"),
    [(0, 1.0, 1.0), (10, 2.0, 3 - math.sqrt(2)), (20, 3.0, 3.0), (40, 5.0, 5.0), (80, 5.0, 5.0)],
)
def test_ramps(step: int, linear: float, cosine: float) -> None:
    ramp = {"start": 1.0, "end": 5.0, "warmup_ratio": 0.4}
    assert power_at(step, 100, schedule="linear", **ramp) == pytest.approx(linear)
    assert power_at(step, 100, schedule="cosine", **ramp) == pytest.approx(cosine)


def test_no_warmup_is_the_final_power_at_once() -> None:
    assert power_at(0, 100, schedule="linear", start=0.0, end=2.0, warmup_ratio=0.0) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schedule": "step"},
            "temporal_power_schedule='step' is not known; accepted: 'constant', 'linear', 'cosine'",
        ),
        ({"end": math.inf}, "temporal_power=inf cannot be reached by temporal_power_schedule='linear'"),
        ({"start": math.nan}, "temporal_power_start=nan is not finite"),
        ({"warmup_ratio": 1.5}, "temporal_power_warmup_ratio=1.5 is out of range; accepted: 0 to 1"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {"schedule": "linear", "start": 0.0, "end": 1.0, "warmup_ratio": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        power_at(0, 10, **arguments)  # type: ignore[arg-type]

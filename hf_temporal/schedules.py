"""The power p as a function of training progress."""

import math

from .positions import check_choice

SCHEDULES = ("constant", "linear", "cosine")


def power_at(
    global_step: int, max_steps: int, *, schedule: str, start: float, end: float, warmup_ratio: float = 1.0
) -> float:
    """The power in force at an optimizer step.

    With x = min(1, global_step / (warmup_ratio · max_steps)):
    `"constant"`: p = end; `"linear"`: p = start + (end − start)·x;
    `"cosine"`: p = start + (end − start)·(1 − cos πx)/2.

    Args:
        global_step, max_steps: optimizer steps done, and of the whole run.
        schedule: one of the three above.
        start, end: the first and the last p; finite, but for the end of a constant schedule.
        warmup_ratio: share of `max_steps` after which `end` is reached, in [0, 1].

    Raises:
        ValueError: an argument whose value is not accepted.

    Source: "start from a small p, a larger p is needed in the end", Wang & Yan, arXiv 2307.11462.
    """
    validate_schedule(schedule=schedule, start=start, end=end, warmup_ratio=warmup_ratio)
    if schedule == "constant":
        return end
    ramp = warmup_ratio * max_steps
    progress = min(1.0, global_step / ramp) if ramp > 0 else 1.0
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def validate_schedule(*, schedule: str, start: float, end: float, warmup_ratio: float) -> None:
    """Raise a `ValueError` that names the field of `TemporalTrainingArguments` that is wrong."""
    check_choice("temporal_power_schedule", schedule, SCHEDULES)
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"temporal_power_warmup_ratio={warmup_ratio!r} is out of range; accepted: 0 to 1.")
    if not math.isfinite(start):
        raise ValueError(f"temporal_power_start={start!r} is not finite; accepted: any finite number.")
    if schedule != "constant" and not math.isfinite(end):
        raise ValueError(
            f"temporal_power={end!r} cannot be reached by temporal_power_schedule={schedule!r}; accepted: a finite "
            "power, or the schedule 'constant'."
        )

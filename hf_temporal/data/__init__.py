"""Data for the recipes: docstrings, the embedded model, summarization, metrics. Knows neither trainer nor recipes."""

from collections.abc import Collection
from dataclasses import field
from typing import Any

SPLITS = ("train", "validation", "test")
HELD_OUT_SEED = 0  # of validation and test, whatever the run's seed, so that all runs are scored on the same examples


def argument(default: Any, text: str, choices: Collection[str] = ()) -> Any:
    """A field of a dataclass of command-line arguments, with its help text."""
    return field(default=default, metadata={"help": text} | ({"choices": [*choices]} if choices else {}))


def check_counts(least: int = 1, **counts: int | None) -> None:
    """Raise a ValueError for a number below `least`, by its name; None, where nothing is set, passes."""
    for name, value in counts.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value!r}; accepted: a whole number of at least {least}.")

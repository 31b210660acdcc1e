"""Data for the recipes: docstrings, the embedded model, summarization, metrics. Knows neither trainer nor recipes."""

SPLITS = ("train", "validation", "test")
HELD_OUT_SEED = 0  # of validation and test, whatever the run's seed, so that all runs are scored on the same examples


def check_counts(least: int = 1, **counts: int | None) -> None:
    """Check whole numbers by name; None, where nothing is set, passes.

    Raises:
        ValueError: one is below `least`; the message names it.
    """
    for name, value in counts.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value!r}; accepted: a whole number of at least {least}.")

"""Data for the recipes: docstrings, the embedded model, summarization, metrics. Knows neither trainer nor recipes."""

SPLITS = ("train", "validation", "test")
HELD_OUT_SEED = 0  # of validation and test, whatever the run's seed, so that all runs are scored on the same examples

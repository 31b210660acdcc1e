"""The old name of `hf_temporal.evaluation`, which published model cards import."""

from .evaluation import *  # noqa: F403

"""The old name of `hf_temporal.data.embedded_model`, which published model cards import."""

from hf_temporal.data.embedded_model import *  # noqa: F403

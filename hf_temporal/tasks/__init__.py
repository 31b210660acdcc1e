"""The old name of `hf_temporal.data`, which published model cards import."""

"""No test reaches the network, and none takes more than one thread: the suite runs one process per core."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# A busy machine fails no test: neither deadline nor the check that drawing is slow.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("hf_temporal", UNTIMED, derandomize=True)
settings.register_profile("many", UNTIMED, derandomize=False, max_examples=2000)
settings.load_profile("hf_temporal")  # --hypothesis-profile overrides it

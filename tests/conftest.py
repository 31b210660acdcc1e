"""No test reaches the network, and none takes more than one thread: the suite runs one process per core."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("hf_temporal", deadline=None, derandomize=True)
settings.register_profile("many", deadline=None, derandomize=False, max_examples=2000)
settings.load_profile("hf_temporal")  # --hypothesis-profile overrides it

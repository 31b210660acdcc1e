"""The fixtures of short runs."""

import torch

from tests.tiny_run import child_environment, tiny

__all__ = ["child_environment", "tiny"]

# The benchmark compares with torch's own chunked loss, which its older releases do not have.
collect_ignore = [] if hasattr(torch.nn, "LinearCrossEntropyOptions") else ["test_bench_loss_head.py"]

"""The fixtures of short runs."""

import torch

from tests.tiny_run import child_environment, tiny

__all__ = ["child_environment", "tiny"]

# The benchmarks compare with torch's own chunked loss, which its older releases do not have.
BENCHMARKS = ["test_bench_loss_head.py", "test_bench_loss_head_gpu.py"]
collect_ignore = [] if hasattr(torch.nn, "LinearCrossEntropyOptions") else BENCHMARKS

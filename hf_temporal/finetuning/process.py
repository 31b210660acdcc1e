"""What a recipe's process takes of its machine: cores, and memory that it keeps."""

import ctypes
import os
import sys

import torch

# of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def share_cores() -> None:
    """Share the CPU's cores among this machine's processes.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 where nothing else is asked for: a run on the CPU of one
    machine would leave all cores but one idle. `HF_TEMPORAL_CORES` says how many there are to share, where not all.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = int(os.environ.get("HF_TEMPORAL_CORES") or os.cpu_count() or 1)
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Let the C library keep large blocks of memory that are freed, for the next tensors of their size.

    glibc returns each block of megabytes to the system, which clears it anew page by page: 0.5 ms for a MiB, and a
    quarter of a forward pass without gradients on two cores. Other systems, and what the caller has set, stay.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

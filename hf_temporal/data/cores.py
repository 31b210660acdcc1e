"""How many cores this process may use."""

from __future__ import annotations

import os


def own_cores() -> int:
    """This process's share of the machine's cores, at least one.

    `HF_TEMPORAL_CORES` says how many there are to share, where not all; `accelerate launch` and `torchrun` say in
    `LOCAL_WORLD_SIZE` among how many processes.
    """
    cores = int(os.environ.get("HF_TEMPORAL_CORES") or os.cpu_count() or 1)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

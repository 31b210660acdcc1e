"""How the threads of PyTorch wait for each other on a machine that others use, too."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PERIOD = 0.25  # seconds between two looks
BUSY_SHARE = 0.75  # of a core: 0.99 on an idle machine, 0.2 to 0.5 beside three busy processes on two cores


@contextmanager
def brief_waiting_when_busy() -> Iterator[None]:
    """Let OpenMP's threads wait briefly for each other, from when other processes take this thread's core.

    Threads that wait actively lose whole time slices to the others. libgomp, the OpenMP of PyTorch's builds for Linux,
    waits briefly while a process has more OpenMP threads than there are cores, so a second team of threads is held
    from then until the end. On an idle machine nothing changes, where passive waiting would cost a fifth of the time.
    """
    if not hasattr(time, "pthread_getcpuclockid") or torch.get_num_threads() == 1:
        yield
        return
    stop = threading.Event()
    clock = time.pthread_getcpuclockid(threading.get_ident())
    watcher = threading.Thread(target=_watch, args=(clock, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(clock: int, stop: threading.Event) -> None:
    """Hold a second team once the thread with this clock gets less than `BUSY_SHARE` of a core."""
    wall, used = time.perf_counter(), time.clock_gettime(clock)
    while not stop.wait(PERIOD):
        before = wall, used
        wall, used = time.perf_counter(), time.clock_gettime(clock)
        if used - before[1] < BUSY_SHARE * (wall - before[0]):
            torch.ones(1 << 20).add_(1)  # large enough that its threads are made
            stop.wait()

"""Generation of a decoder-only model's answers to prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

PERIOD = 0.25  # seconds between two looks
BUSY_SHARE = 0.75  # of a core: 0.99 on an idle machine, 0.2 to 0.5 beside three busy processes on two cores


def prompt_of(encoded: dict[str, list[int]]) -> list[int]:
    """The tokens in front of the first target: all that a model may see when it generates."""
    first = next(position for position, label in enumerate(encoded["labels"]) if label != IGNORE_INDEX)
    return encoded["input_ids"][:first]


@torch.no_grad()
def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    **generate_arguments: Any,
) -> list[list[int]]:
    """The tokens with which a decoder-only `model` continues each prompt, end and padding included.

    Batches of similar length, left-padded, no sampling.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: list[list[int]] = [[]] * len(prompts)
    with brief_waiting_when_busy():
        for start in tqdm(range(0, len(order), batch_size), "Generating", leave=False):
            chosen = order[start : start + batch_size]
            batch: BatchEncoding = tokenizer.pad(
                {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
            )
            tokens = model.generate(
                **batch.to(model.device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **generate_arguments,
            )
            for index, row in zip(chosen, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                completions[index] = row
    model.train(was_training)
    return completions


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

"""The trainers of the recipes: ours, with the recipes' model card and scores of generated answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub.utils import tqdm
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_temporal.positions import IGNORE_INDEX
from hf_temporal.trainer import TemporalWeightSeq2SeqTrainer, TemporalWeightTrainer

from .run import CardMixin
from .tasks import Scores

PERIOD = 0.25  # seconds between two looks
BUSY_SHARE = 0.75  # of a core: 0.99 on an idle machine, 0.2 to 0.5 beside three busy processes on two cores


class Seq2SeqTrainer(CardMixin, TemporalWeightSeq2SeqTrainer):
    """The trainer, with the recipe's model card."""


@dataclass(frozen=True)
class Answers:
    """How answers are generated in an evaluation, and what compares them with the labels; one beam is greedy."""

    scores: Scores
    max_new_tokens: int
    num_beams: int


class CausalTrainer(CardMixin, TemporalWeightTrainer):
    """Adds to every evaluation the scores of what is generated from the prompts alone, where `answers` says how."""

    def __init__(self, *args: Any, answers: Answers | None = None, **kwargs: Any) -> None:
        self._answers = answers
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, and the scores among its metrics."""
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._answers is not None:
            examples: Any = dataloader.dataset
            generated = self._generate([prompt_of(example) for example in examples], self._answers)
            scores = self._answers.scores.score(generated, [example["labels"] for example in examples])
            output.metrics.update({f"{prefix}_{name}": value for name, value in scores.items()})
        return output

    def _generate(self, prompts: list[list[int]], answers: Answers) -> list[list[int]]:
        """Each process generates its share; shares are equally long, as sharded models need."""
        processes, rank = self.args.world_size, self.args.process_index
        padded = prompts + prompts[:1] * (-len(prompts) % processes)
        tokenizer: Any = self.processing_class
        mine = generate_completions(
            self.model,
            tokenizer,
            padded[rank::processes],
            max_new_tokens=answers.max_new_tokens,
            num_beams=answers.num_beams,
            batch_size=self.args.per_device_eval_batch_size,
            synced_gpus=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
        )
        shares: list[list[list[int]]] = gather_object([mine])
        return [answer for turn in zip(*shares, strict=True) for answer in turn][: len(prompts)]


# ---- generation


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

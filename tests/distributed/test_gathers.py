"""What the processes tell each other for the weights in an optimizer step: the table of docs/distributed.md."""

from __future__ import annotations

import gc
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_temporal import TemporalWeighting, TemporalWeightTrainer

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "reduce_scatter_tensor")
PROCESSES, STEPS = 2, 3
EXPECTED = {"Trainer": [8], "sequence": [32], "tokens": [32], "batch": [8, 32]}


class LastStep(TrainerCallback):
    """Lists the bytes that this process sends in the last step, an entry for each collective."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.patches = [patch.object(dist, name, self.counted(getattr(dist, name))) for name in COLLECTIVES]

    def counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            mine = [tensor for tensor in tensors[:2] if isinstance(tensor, Tensor)][-1]
            self.sent.append(mine.nbytes)
            return collective(*tensors, **options)

        return call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of a step are fetched and their items counted between the end of the one before and its own."""
        del args, control, kwargs
        if state.global_step == STEPS - 1:
            for each in self.patches:
                each.start()
        if state.global_step == STEPS:
            for each in self.patches:
                each.stop()


def sent_in_a_step(kind: str, folder: Path) -> list[int]:
    """By the plain `Trainer`, or by ours under a normalization."""
    ids = torch.arange(64 * 16).view(64, 16) % 96 + 1
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    last_step = LastStep()
    common: dict[str, Any] = {
        "model": LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)),
        "args": TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, ddp_backend="gloo",
        ),
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
        "data_collator": default_data_collator,
        "callbacks": [last_step],
    }  # fmt: skip
    if kind == "Trainer":
        Trainer(**common).train()
    else:
        TemporalWeightTrainer(**common, weighting=TemporalWeighting(2.0, normalization=kind)).train()
    return last_step.sent


def run_rank(rank: int, port: int, folder: Path) -> None:
    """Train as one of the processes, and write what it sent."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in place.items()}
    torch.set_num_threads(1)
    found = {kind: sent_in_a_step(kind, folder / kind) for kind in EXPECTED}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # the trainers' cycles keep gloo's threads, which may abort a process that ends


def test_one_gather_of_a_few_bytes_an_optimizer_step(tmp_path: Path) -> None:
    """As many as the plain Trainer's, under "batch" one more, whatever the number of micro-batches and tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_rank, args=(port, tmp_path), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        assert json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) == EXPECTED

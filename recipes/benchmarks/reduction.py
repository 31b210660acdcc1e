r"""What the ranks tell each other for the loss, once an optimizer step: stock Trainer and TemporalWeightTrainer.

    python recipes/benchmarks/reduction.py --output recipes/results/reduction.json

Shorter, on two processes:

    python recipes/benchmarks/reduction.py --processes 2 --repeats 20 --gradients 1000

Every rank trains a toy by each trainer, two micro-batches a step. Whatever `torch.distributed` is asked for in the
third step, but for the gradients that DDP adds up by itself, is counted with its bytes; then it is asked for again,
alone, in rounds with the other trainers and with the all-reduce of float32 gradients, and timed on the first rank.
gloo on one machine: on a network a collective of so few bytes takes its latency.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.utils import gather
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_temporal import TemporalWeighting, TemporalWeightTrainer
from hf_temporal.finetuning.tables import environment, spread, table, write
from hf_temporal.weighting import NORMALIZATIONS

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "reduce_scatter_tensor")
STEPS = 3
COLUMNS = ("processes", "what", "collectives", "bytes per rank", "microseconds", "noise", "fastest")


class LastStep(TrainerCallback):
    """Counts what goes from this rank to the others in the last step: one tensor for each collective."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.patches = [patch.object(dist, name, self._counted(getattr(dist, name))) for name in COLLECTIVES]

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            (mine,) = [tensor for tensor in tensors[:2] if isinstance(tensor, Tensor)][-1:]
            self.sent.append(mine)
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


def sent_in_a_step(normalization: str | None) -> list[Tensor]:
    """What this rank sends in an optimizer step; without a normalization, with the stock trainer."""
    ids = torch.arange(64 * 16).view(64, 16) % 96 + 1
    last_step = LastStep()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "model": LlamaForCausalLM(LlamaConfig(
                vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            )),
            "args": TrainingArguments(
                folder, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
                logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, ddp_backend="gloo",
            ),
            "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
            "data_collator": default_data_collator,
            "callbacks": [last_step],
        }  # fmt: skip
        if normalization is None:
            Trainer(**common).train()
        else:
            TemporalWeightTrainer(**common, weighting=TemporalWeighting(2.0, normalization=normalization)).train()
    return last_step.sent


def run_rank(settings: argparse.Namespace) -> None:
    """Count and time as one of the ranks; the first one writes the rows."""
    torch.set_num_threads(1)
    peers = {"stock Trainer": sent_in_a_step(None), **{name: sent_in_a_step(name) for name in NORMALIZATIONS}}
    gradients = torch.zeros(settings.gradients)
    name = f"all-reduce of {settings.gradients:,} gradients"
    turns: dict[str, Callable[[], Any]] = {what: partial(gather, sent) for what, sent in peers.items()}
    turns[name] = partial(dist.all_reduce, gradients)
    seconds: dict[str, list[float]] = {what: [] for what in turns}
    for _ in range(settings.repeats + 1):
        for what, turn in turns.items():
            dist.barrier()
            start = time.perf_counter()
            turn()
            seconds[what].append(time.perf_counter() - start)
    rows = [
        {
            "processes": dist.get_world_size(),
            "what": what,
            "collectives": len(peers.get(what, [gradients])),
            "bytes per rank": sum(tensor.nbytes for tensor in peers.get(what, [gradients])),
            "microseconds": 1e6 * statistics.median(taken[1:]),
            "noise": spread(taken[1:]),
            "fastest": 1e6 * min(taken),
        }
        for what, taken in seconds.items()
    ]
    if dist.get_rank() == 0:
        settings.rows.write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    """The rows of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        options = {"repeats": settings.repeats, "gradients": settings.gradients, "rows": rows}
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                __file__, *(f"--{name}={value}" for name, value in options.items()),
            ],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return list(json.loads(rows.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; with `--rows`, be one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=301)
    parser.add_argument("--gradients", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    if settings.rows:
        run_rank(settings)
        return {}
    results: dict[str, Any] = {
        "benchmark": "reduction",
        **environment(),
        "settings": {name: getattr(settings, name) for name in ("processes", "repeats", "gradients")},
        "rows": [row for processes in settings.processes for row in measure(settings, processes)],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    print(table(results["rows"], COLUMNS))
    write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

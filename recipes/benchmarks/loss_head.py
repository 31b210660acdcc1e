r"""The LM head and its loss, forward + backward: weighted_linear_cross_entropy against what it replaces.

    python recipes/benchmarks/loss_head.py --output recipes/results/loss_head.json

A few seconds, on a toy:

    python recipes/benchmarks/loss_head.py --shapes 64,16,500 --repeats 2

The peers, each with the gradients of hidden states [N, H] and head [V, H]:
  three products      logits, gradient of the hidden states, gradient of the head: 6 N V H operations, the floor
  … of the targets    the same over the positions that have a target (where some are masked)
  stock mean          full logits, mean cross-entropy in float32, as the models' own loss
  weights by hand     full logits, cross-entropy of each token in float32, times the weights
  torch chunked       torch.nn.functional.linear_cross_entropy(reduction="none"), times the weights
  ours                hf_temporal.fused_head.weighted_linear_cross_entropy

Each peer lives in a process of its own, so that its peak memory is its own. The processes run in turn, one at a time
and in a rotating order, so that whatever else the machine does meets them alike: a ratio is the median of the ratios
within a round. The first run of each is not timed; it gives the memory: the process's peak above what it held with
the inputs made and the libraries warmed up on a small problem. Gradients count as memory, inputs do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_temporal.fused_head import weighted_linear_cross_entropy
from recipes.benchmarks.report import environment, spread, table, write

SHAPES = ["2048,512,32000", "1024,1024,128256"]
PRODUCTS, TARGET_PRODUCTS, STOCK = "three products", "… of the targets", "stock mean"
COLUMNS = [
    "N", "H", "V", "dtype", "masked", "peer", "seconds", "noise", "time / products", "time / products of targets",
    "time / stock", "MiB", "memory / stock",
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Leaves hidden [N, H] and head [V, H]; targets [N], −100 where masked; weights [N], not uniform."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def make(cls, N: int, H: int, V: int, *, dtype: torch.dtype, masked: float, seed: int) -> Inputs:
        """Random inputs; exactly the share `masked` of the positions, at random places, has no target."""
        torch.manual_seed(seed)
        hidden, head = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype).mul_(H**-0.5)
        targets = torch.randint(V, (N,))
        targets[torch.randperm(N)[: round(masked * N)]] = -100
        return cls(hidden.requires_grad_(), head.requires_grad_(), targets, torch.rand(N) + 0.5)


def three_products(inputs: Inputs) -> None:
    """The floor."""
    _products(inputs.hidden.detach(), inputs.head.detach())


def three_products_of_targets(inputs: Inputs) -> None:
    """The floor where only target positions meet the head."""
    _products(inputs.hidden.detach()[inputs.targets != -100], inputs.head.detach())


def _products(hidden: Tensor, head: Tensor) -> None:
    logits = hidden @ head.T
    _ = logits @ head, logits.T @ hidden


def stock_mean(inputs: Inputs) -> None:
    """What a model of transformers does with labels."""
    logits = (inputs.hidden @ inputs.head.T).float()
    F.cross_entropy(logits, inputs.targets).backward()


def weights_by_hand(inputs: Inputs) -> None:
    """What users write."""
    logits = (inputs.hidden @ inputs.head.T).float()
    _weighted_mean(F.cross_entropy(logits, inputs.targets, reduction="none"), inputs)


def torch_chunked(inputs: Inputs) -> None:
    """The chunked loss of torch, per token."""
    options = LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, reduction="none", options=options)
    _weighted_mean(losses, inputs)


def _weighted_mean(losses: Tensor, inputs: Inputs) -> None:
    weights = inputs.weights * (inputs.targets != -100)
    ((losses * weights).sum() / weights.sum()).backward()


def ours(inputs: Inputs) -> None:
    """Gradients in the forward pass, by chunks of target positions."""
    weights = inputs.weights * (inputs.targets != -100)
    (weighted_linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, weights) / weights.sum()).backward()


PEERS: dict[str, Callable[[Inputs], None]] = {
    PRODUCTS: three_products,
    TARGET_PRODUCTS: three_products_of_targets,
    STOCK: stock_mean,
    "weights by hand": weights_by_hand,
    "torch chunked": torch_chunked,
    "ours": ours,
}


def serve(connection: Connection, peer: str, case: dict[str, Any], threads: int) -> None:
    """Run the peer once for every message received, and answer (seconds, peak bytes above the inputs so far)."""
    torch.set_num_threads(threads)
    small = Inputs.make(8, 16, 32, dtype=case["dtype"], masked=0.5, seed=0)
    PEERS[peer](small)
    inputs = Inputs.make(**case)
    before = psutil.Process().memory_info().rss
    while connection.recv():
        inputs.hidden.grad = inputs.head.grad = None
        start = time.perf_counter()
        PEERS[peer](inputs)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        connection.send((seconds, peak - before))


class Child:
    """A process that runs one peer on command."""

    def __init__(self, peer: str, case: dict[str, Any], threads: int) -> None:
        context = multiprocessing.get_context("forkserver")  # forked where the libraries are imported once
        context.set_forkserver_preload(["hf_temporal.fused_head"])
        self.peer = peer
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, peer, case, threads), daemon=True)
        self.process.start()
        theirs.close()

    def run(self) -> tuple[float, int]:
        """Seconds of one run, and the peak memory in bytes above the inputs.

        Raises:
            RuntimeError: the process ended early, for want of memory perhaps.
        """
        try:
            self.connection.send(True)
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RuntimeError(f"{self.peer!r} ended early with exit code {self.process.exitcode}") from error

    def end(self) -> None:
        """Stop the process."""
        self.process.terminate()
        self.process.join()


def measure(case: dict[str, Any], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row per peer: median time, noise, memory, and the ratios to the floor and to stock in the same round."""
    peers = [peer for peer in PEERS if case["masked"] or peer != TARGET_PRODUCTS]
    with ExitStack() as stack:
        children = []
        for peer in peers:
            children.append(Child(peer, case, threads))
            stack.callback(children[-1].end)
        mebibytes = {child.peer: child.run()[1] / 2**20 for child in children}
        seconds: dict[str, list[float]] = {peer: [] for peer in peers}
        for repeat in range(repeats):
            for turn in range(len(children)):
                child = children[(repeat + turn) % len(children)]
                seconds[child.peer].append(child.run()[0])

    def ratio(peer: str, other: str) -> float | None:
        if other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[peer], seconds[other], strict=True))

    return [
        {
            **{name: case[name] for name in ("N", "H", "V", "masked")},
            "dtype": str(case["dtype"]).removeprefix("torch."),
            "peer": peer,
            "seconds": statistics.median(seconds[peer]),
            "noise": spread(seconds[peer]),
            "time / products": ratio(peer, PRODUCTS),
            "time / products of targets": ratio(peer, TARGET_PRODUCTS),
            "time / stock": ratio(peer, STOCK),
            "MiB": mebibytes[peer],
            "memory / stock": mebibytes[peer] / mebibytes[STOCK],
            "all_seconds": seconds[peer],
        }
        for peer in peers
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every case, print its table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="positions, width, vocabulary: N,H,V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--masked", nargs="+", type=float, default=[0.0, 0.75], help="share of positions without target"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "benchmark": "loss_head",
        **environment(),
        "settings": {name: value for name, value in vars(settings).items() if name != "output"},
        "rows": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    for shape in settings.shapes:
        N, H, V = map(int, shape.split(","))
        for name in settings.dtypes:
            for masked in settings.masked:
                case = {"N": N, "H": H, "V": V, "dtype": getattr(torch, name), "masked": masked, "seed": settings.seed}
                rows = measure(case, settings.repeats, settings.threads)
                print(table(rows, COLUMNS), flush=True)
                results["rows"] += rows
                write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

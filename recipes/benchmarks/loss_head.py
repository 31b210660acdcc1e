r"""The LM head and its loss, forward + backward: weighted_linear_cross_entropy against what it replaces.

    python recipes/benchmarks/loss_head.py --output outputs/loss_head.json

A few seconds, on a toy:

    python recipes/benchmarks/loss_head.py --shapes 64,16,500 --repeats 2

The picture of figures that are there, of this script's own file or of a machine's:

    python recipes/benchmarks/loss_head.py --shapes 2048,512,32000 --masked 0.75 \
        --redraw recipes/results/benchmarks_avx512.json --picture docs/pictures/loss_head.png

The peers, each with the gradients of hidden states [N, H] and head [V, H]:
  three products      logits, gradient of the hidden states, gradient of the head: 6 N V H operations, the floor
  … of the targets    the same over the positions that have a target (where some are masked)
  stock mean          full logits, mean cross-entropy in float32, as the models' own loss
  weights by hand     full logits, cross-entropy of each token in float32, times the weights
  torch …             torch.nn.functional.linear_cross_entropy(reduction="none") under each of its accumulation
                      policies, times the weights
  TRL                 the fused head of trl, its log-probabilities times the weights; where trl is installed
  ours                hf_temporal.weighted_linear_cross_entropy
  ours, …             with a soft cap; with scale and bias; with label smoothing; with an adapter of rank 8 on a frozen
                      head; with a frozen head; with 16 bits as on a CPU without instructions for them
Liger and Apple's cut cross-entropy need a GPU: loss_head_gpu.py.

Each peer lives in a process of its own, so that its peak memory is its own. The processes run in turn, one at a time
and in a rotating order, so that whatever else the machine does meets them alike: a ratio is the median of the ratios
within a round. The first run of each is not timed; it gives the memory: the process's peak above what it held with
the inputs made and the libraries warmed up on a small problem. Gradients count as memory, inputs do not. "beside /
logits" is what is left without gradients, as a share of N × V float32 logits; ours in bfloat16 may sum the head's
gradient in float32, which is in it.
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
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from bars import draw_bars
from measured import environment, read_rows, spread, table, write
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from hf_temporal import weighted_linear_cross_entropy

SHAPES = ["2048,512,32000", "1024,1024,128256"]
PRODUCTS, TARGET_PRODUCTS, STOCK = "three products", "… of the targets", "stock mean"
EMULATED = "ours, 16 bits emulated"
OUTPUTS = ("output", "picture", "redraw")
POLICIES = ("auto", "accurate", "balanced", "compact")
COLUMNS = [
    "N", "H", "V", "dtype", "masked", "peer", "seconds", "noise", "time / products", "time / products of targets",
    "time / stock", "MiB", "memory / stock", "beside / logits",
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


def torch_chunked(inputs: Inputs, policy: Any) -> None:
    """The chunked loss of torch, per token."""
    options = LinearCrossEntropyOptions(acc_policy=policy)
    losses = F.linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, reduction="none", options=options)
    _weighted_mean(losses, inputs)


def trl_fused_head(inputs: Inputs) -> None:
    """TRL's log-probabilities."""
    from loss_head_gpu_peers import log_probabilities_of_trl

    _weighted_mean(-log_probabilities_of_trl(inputs.hidden, inputs.head, inputs.targets), inputs)


def _weighted_mean(losses: Tensor, inputs: Inputs) -> None:
    weights = inputs.weights * (inputs.targets != -100)
    ((losses * weights).sum() / weights.sum()).backward()


def ours(inputs: Inputs, **options: Any) -> None:
    """Gradients in the forward pass, by chunks of target positions."""
    weights = inputs.weights * (inputs.targets != -100)
    weighted_linear_cross_entropy(
        inputs.hidden, inputs.head, inputs.targets, weights / weights.sum(), **options
    ).backward()


def ours_with_bias(inputs: Inputs) -> None:
    """With bias and scale."""
    ours(inputs, bias=torch.zeros(len(inputs.head), requires_grad=True), logit_scale=0.5)


def ours_with_adapter(inputs: Inputs) -> None:
    """With an adapter of rank 8 on a frozen head: no gradient of the head's size."""
    from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms  # not a public name

    weights = inputs.weights * (inputs.targets != -100)
    down = torch.full((8, inputs.hidden.shape[1]), 0.1, dtype=inputs.hidden.dtype, requires_grad=True)
    up = torch.full((len(inputs.head), 8), 0.1, dtype=inputs.hidden.dtype, requires_grad=True)
    terms = [(inputs.hidden, inputs.head.detach()), (inputs.hidden @ down.T, up)]
    weighted_linear_cross_entropy_terms(terms, inputs.targets, weights / weights.sum()).backward()


def ours_emulated(inputs: Inputs) -> None:
    """As on a CPU without instructions for 16 bits."""
    with mock.patch.object(torch.cpu, "get_capabilities", return_value={}):
        ours(inputs)


PEERS: dict[str, Callable[[Inputs], None]] = {
    PRODUCTS: three_products,
    TARGET_PRODUCTS: three_products_of_targets,
    STOCK: stock_mean,
    "weights by hand": weights_by_hand,
    **{f"torch {policy}": partial(torch_chunked, policy=policy) for policy in POLICIES},
    "TRL": trl_fused_head,
    "ours": ours,
    "ours, soft cap": partial(ours, softcap=30.0),
    "ours, scale and bias": ours_with_bias,
    "ours, label smoothing": partial(ours, label_smoothing=0.1),
    "ours, adapter": ours_with_adapter,
    "ours, frozen head": lambda inputs: ours(replace(inputs, head=inputs.head.detach())),
    EMULATED: ours_emulated,
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
        context.set_forkserver_preload(["hf_temporal.linear_cross_entropy.function"])
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


def measure(case: dict[str, Any], chosen: Sequence[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row per peer: median time, noise, memory, and the ratios to the floor and to stock in the same round."""
    peers = [peer for peer in PEERS if peer in chosen and _applies(peer, case)]
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
            return ratio(peer, PRODUCTS) if other == TARGET_PRODUCTS and not case["masked"] else None
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
            "memory / stock": mebibytes[peer] / mebibytes[STOCK] if STOCK in mebibytes else None,
            "beside / logits": (mebibytes[peer] * 2**20 - _gradients(peer, case)) / (4 * case["N"] * case["V"]),
            "all_seconds": seconds[peer],
        }
        for peer in peers
    ]


def _applies(peer: str, case: dict[str, Any]) -> bool:
    if peer == TARGET_PRODUCTS:
        return bool(case["masked"])
    if peer == "TRL":
        return find_spec("trl") is not None
    return peer != EMULATED or case["dtype"] == torch.bfloat16


def _gradients(peer: str, case: dict[str, Any]) -> int:
    """Bytes of the gradients of hidden states and head."""
    N, H, V, itemsize = case["N"], case["H"], case["V"], case["dtype"].itemsize
    head = 0 if peer in ("ours, adapter", "ours, frozen head") else V * H * itemsize
    return N * H * itemsize + head


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every case, print its table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="positions, width, vocabulary: N,H,V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--masked", nargs="+", type=float, default=[0.0, 0.75], help="share of positions without target"
    )
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    parser.add_argument("--redraw", type=Path, help="JSON file to draw the cases of, in place of measuring them")
    settings = parser.parse_args(arguments)
    if settings.redraw and not settings.picture:
        parser.error("--redraw without --picture; accepted: both, or neither.")
    cases = [
        {**dict(zip("NHV", map(int, shape.split(",")), strict=True)), "dtype": dtype, "masked": masked}
        for shape in settings.shapes
        for dtype in settings.dtypes
        for masked in settings.masked
    ]
    if settings.redraw:
        rows = read_rows(settings.redraw, "loss_head")
        draw([row for case in cases for row in _best(rows, case, settings.peers)], settings.picture)
        return {"rows": rows}
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "benchmark": "loss_head",
        **environment(),
        "settings": {name: value for name, value in vars(settings).items() if name not in OUTPUTS},
        "rows": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    for case in cases:
        inputs = {**case, "dtype": getattr(torch, case["dtype"]), "seed": settings.seed}
        rows = measure(inputs, settings.peers, settings.repeats, settings.threads)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        write(settings.output, results)
    if settings.picture:
        draw(results["rows"], settings.picture)
    return results


def _best(rows: Sequence[dict[str, Any]], case: dict[str, Any], peers: Sequence[str]) -> list[dict[str, Any]]:
    """The row of each peer in a case; where several runs measured it, that of most repeats."""
    mine = [row for row in rows if all(row[key] == value for key, value in case.items())]
    best = {row["peer"]: row for row in sorted(mine, key=lambda row: len(row["all_seconds"]))}
    return [best[peer] for peer in peers if peer in best]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of time over the products of the targets, and of memory, per peer and case."""
    draw_bars(
        rows,
        path,
        case=lambda row: "{N:,} × {H:,} × {V:,}, {dtype}, {masked:.0%} masked".format(**row),
        panels=[
            ("time / products of targets", 1.0, "time / three products of the targets"),
            ("MiB", 1024.0, "memory above the inputs (GiB)"),
        ],
        ours="ours",
    )


if __name__ == "__main__":
    main()

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
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bars import draw_bars
from head_peers import (
    BY_HAND,
    PRODUCTS,
    STOCK,
    Inputs,
    Peer,
    ours,
    stock_mean,
    three_products,
    torch_chunked,
    trl_fused_head,
    weights_by_hand,
)
from measured import Child, ended, environment, in_turn, memory, peak_memory, read_rows, spread, table, write
from torch import Tensor

SHAPES = ["2048,512,32000", "1024,1024,128256"]
PRELOADED = ["hf_temporal.linear_cross_entropy.function"]
TARGET_PRODUCTS = "… of the targets"
EMULATED = "ours, 16 bits emulated"
OUTPUTS = ("output", "picture", "redraw")
POLICIES = ("auto", "accurate", "balanced", "compact")
COLUMNS = [
    "N", "H", "V", "dtype", "masked", "peer", "seconds", "noise", "time / products", "time / products of targets",
    "time / stock", "MiB", "memory / stock", "beside / logits",
]  # fmt: skip


def ours_with_bias(inputs: Inputs) -> Tensor:
    """With bias and scale."""
    return ours(inputs, bias=torch.zeros(len(inputs.head), requires_grad=True), logit_scale=0.5)


def ours_with_adapter(inputs: Inputs) -> Tensor:
    """With an adapter of rank 8 on a frozen head: no gradient of the head's size."""
    from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms  # not a public name

    down = torch.full((8, inputs.hidden.shape[1]), 0.1, dtype=inputs.hidden.dtype, requires_grad=True)
    up = torch.full((len(inputs.head), 8), 0.1, dtype=inputs.hidden.dtype, requires_grad=True)
    terms = [(inputs.hidden, inputs.head.detach()), (inputs.hidden @ down.T, up)]
    return weighted_linear_cross_entropy_terms(terms, inputs.targets, inputs.weights / inputs.weights.sum())


def ours_emulated(inputs: Inputs) -> Tensor:
    """As on a CPU without instructions for 16 bits."""
    with mock.patch.object(torch.cpu, "get_capabilities", return_value={}):
        return ours(inputs)


PEERS: dict[str, Peer] = {
    PRODUCTS: Peer(three_products),
    TARGET_PRODUCTS: Peer(partial(three_products, of_targets=True)),
    STOCK: Peer(stock_mean),
    BY_HAND: Peer(weights_by_hand),
    **{f"torch {policy}": Peer(partial(torch_chunked, acc_policy=policy)) for policy in POLICIES},
    "TRL": Peer(trl_fused_head),
    "ours": Peer(ours),
    "ours, soft cap": Peer(partial(ours, softcap=30.0)),
    "ours, scale and bias": Peer(ours_with_bias),
    "ours, label smoothing": Peer(partial(ours, label_smoothing=0.1)),
    "ours, adapter": Peer(ours_with_adapter),
    "ours, frozen head": Peer(lambda inputs: ours(replace(inputs, head=inputs.head.detach()))),
    EMULATED: Peer(ours_emulated),
}


def serve(connection: Connection, peer: str, case: dict[str, Any], threads: int) -> None:
    """Run the peer once for every message received, and answer (seconds, peak bytes above the inputs so far)."""
    torch.set_num_threads(threads)
    small = Inputs.make(8, 16, 32, dtype=case["dtype"], masked=0.5, seed=0)
    PEERS[peer].run(small)
    inputs = Inputs.make(**case)
    before = memory()
    while connection.recv():
        inputs.clear()
        start = time.perf_counter()
        PEERS[peer].run(inputs)
        seconds = time.perf_counter() - start
        connection.send((seconds, peak_memory() - before))


def measure(case: dict[str, Any], chosen: Sequence[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row per peer: median time, noise, memory, and the ratios to the floor and to stock in the same round."""
    peers = [peer for peer in PEERS if peer in chosen and _applies(peer, case)]
    with ended(Child(peer, serve, peer, case, threads, preload=PRELOADED) for peer in peers) as children:
        mebibytes = {child.name: child.step()[1] / 2**20 for child in children}
        answers = in_turn(children, repeats)
    seconds = {peer: [time for time, _ in mine] for peer, mine in zip(peers, answers, strict=True)}

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

r"""The LM head and its loss, forward + backward: weighted_linear_cross_entropy against what it replaces.

    python recipes/benchmarks/loss_head.py --output outputs/loss_head.json

A few seconds, on a toy:

    python recipes/benchmarks/loss_head.py --shapes 64,16,500 --repeats 2

docs/benchmarks.md describes the peers, and has the command for a GPU. Each makes the gradients of hidden states [N, H]
and head [V, H]. One that fails, because its package is not installed say, is a line with the reason.

Each lives in a process of its own, and they run in turn, in a rotating order: a ratio is the median of those within a
round. The first run of each is not timed; it gives the memory: the process's peak above what it held with the inputs
made and the libraries warmed up. Gradients count, inputs do not. "beside / logits" is what is left without gradients,
as a share of N × V float32 logits. On a GPU the peak is that of what PyTorch had allocated.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measured
import torch
from head_peers import BY_HAND, OURS, PEERS, PRODUCTS, STOCK, TARGET_PRODUCTS, Inputs, Peer
from measured import Child
from torch import Tensor

from hf_temporal.tables import table

SHAPES = ["2048,512,32000", "1024,1024,128256"]
PRELOADED = ["hf_temporal.finetuning.report", "hf_temporal.linear_cross_entropy.function"]
CASE = ("N", "H", "V", "dtype", "masked")
COLUMNS = (
    *CASE, "peer", "seconds", "noise", "time / products", "time / products of targets", "time / stock", "MiB",
    "memory / stock", "beside / logits", "note",
)  # fmt: skip
CHECK_COLUMNS = ("peer", "of", "error", "error / by hand", "right", "note")
ALLOWED = 2.0  # times the error of full logits in the same dtype, by hand
FAILURES = (ImportError, AttributeError, RuntimeError, OSError)  # of a peer's package
NOISE = 1e-5  # an error below it is right whatever that one is


def serve(connection: Connection, name: str, case: dict[str, Any], threads: int) -> None:
    """Run the peer at each message and answer (seconds, peak bytes above the inputs), or why the first run failed."""
    torch.set_num_threads(threads)
    peer, on_gpu = PEERS[name], case["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated if on_gpu else measured.peak_memory
    try:
        peer.run(Inputs.make(**{**case, "N": 8, "H": 16, "V": 32, "masked": 0.5}))
        inputs = Inputs.make(**case)
        before = torch.cuda.memory_allocated() if on_gpu else measured.memory()
        connection.recv()
        connection.send((timed(peer, inputs, on_gpu), peak() - before))
    except FAILURES as error:
        connection.send(first_line(error))
        return
    while connection.recv():
        connection.send((timed(peer, inputs, on_gpu), peak() - before))


def timed(peer: Peer, inputs: Inputs, on_gpu: bool) -> float:
    """Seconds of one run; on a GPU of a second one, for which the allocator has all that it needs."""
    if on_gpu:
        peer.run(inputs)
        torch.cuda.synchronize()
    inputs.clear()
    start = time.perf_counter()
    peer.run(inputs)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if on_gpu:  # the other processes need the memory
        inputs.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return seconds


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    return f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:100]}"


def applies(peer: str, case: dict[str, Any]) -> bool:
    """Whether a peer has a meaning in a case."""
    if peer == TARGET_PRODUCTS:
        return bool(case["masked"])
    return PEERS[peer].device in (None, case["device"]) and ("16 bits" not in peer or case["dtype"].itemsize == 2)


def measure(case: dict[str, Any], chosen: Sequence[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row per peer: median time, noise, memory, and the ratios to the floor and to stock in the same round."""
    peers = [peer for peer in PEERS if peer in chosen and applies(peer, case)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(closing(Child(peer, serve, peer, case, threads, preload=PRELOADED))) for peer in peers
        ]
        first = {child.name: child.step() for child in children}
        running = [child for child in children if not isinstance(first[child.name], str)]
        answers = measured.in_turn(running, repeats)
    seconds = {child.name: [time for time, _ in mine] for child, mine in zip(running, answers, strict=True)}
    mebibytes = {peer: first[peer][1] / 2**20 for peer in seconds}

    def ratio(peer: str, other: str) -> float | None:
        if other == TARGET_PRODUCTS and not case["masked"]:
            other = PRODUCTS
        return measured.median_ratio(seconds[peer], seconds[other]) if other in seconds else None

    rows = []
    for peer in peers:
        row = {**case, "dtype": str(case["dtype"]).removeprefix("torch."), "peer": peer}
        if peer in seconds:
            row |= {
                "seconds": statistics.median(seconds[peer]),
                "noise": measured.spread(seconds[peer]),
                "time / products": ratio(peer, PRODUCTS),
                "time / products of targets": ratio(peer, TARGET_PRODUCTS),
                "time / stock": ratio(peer, STOCK),
                "MiB": mebibytes[peer],
                "memory / stock": mebibytes[peer] / mebibytes[STOCK] if STOCK in mebibytes else None,
                "beside / logits": (mebibytes[peer] * 2**20 - _gradients(peer, case)) / (4 * case["N"] * case["V"]),
            }
        else:
            row["note"] = first[peer]
        rows.append({**row, "all_seconds": seconds.get(peer, [])})
    return rows


def _gradients(peer: str, case: dict[str, Any]) -> int:
    """Bytes of the gradients of hidden states and head."""
    rows = case["N"] + (0 if peer in ("ours, adapter", "ours, frozen head") else case["V"])
    return rows * case["H"] * case["dtype"].itemsize


def check(case: dict[str, Any], chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Errors of loss and gradients against float64, and how many times those of full logits in the same dtype."""
    inputs = Inputs.make(**case)
    exact = inputs.double()
    rows: list[dict[str, Any]] = []
    for name in chosen:
        peer = PEERS[name]
        if not peer.weighted or not applies(name, case):
            continue
        by_hand = Peer(PEERS[BY_HAND].loss, peer.options)
        expected, usual = _results(by_hand, exact), _results(by_hand, inputs)
        try:
            found = _results(peer, inputs)
        except FAILURES as error:
            rows.append({"peer": name, "right": None, "note": first_line(error)})
            continue
        for of, mine in found.items():
            errors, others = _errors(mine, expected[of]), _errors(usual[of], expected[of])
            ratio = max(error / max(other, 1e-300) for error, other in zip(errors, others, strict=True))
            right = ratio <= ALLOWED or max(errors) <= NOISE
            rows.append({"peer": name, "of": of, "error": errors[0], "error / by hand": ratio, "right": right})
    return rows


def _results(peer: Peer, inputs: Inputs) -> dict[str, Tensor]:
    inputs.clear()
    loss = peer.run(inputs)
    assert loss is not None
    return {"loss": loss.detach()} | {name: x.grad for name, x in inputs.leaves.items() if x.grad is not None}


def _errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖error‖ / ‖expected‖ in the Euclidean norm and in the largest component."""
    error = found.double() - expected
    return float(error.norm() / expected.norm()), float(error.abs().max() / expected.abs().max())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every case, print its table, write the JSON; with --check, exit where ours missed its accuracy."""
    parser = measured.parser_of(__doc__, draws=True)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="positions, width, vocabulary: N,H,V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--masked", nargs="+", type=float, default=[0.0, 0.75], help="shares without target")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--check", help="shape at which values and gradients are compared with float64 first")
    settings = measured.parsed(parser, arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here; accepted: --device cpu.")
    cases = [
        {**_sizes(shape), "dtype": dtype, "masked": masked}
        for shape, dtype, masked in product(settings.shapes, settings.dtypes, settings.masked)
    ]
    if settings.redraw:
        rows = measured.most_repeated(measured.read_rows(settings.redraw, "loss_head"), (*CASE, "peer"))
        rows = [row for row in rows if {key: row[key] for key in CASE} in cases and row["peer"] in settings.peers]
        draw(rows, settings.picture)
        return {"rows": rows}
    results: dict[str, Any] = {**measured.heading("loss_head", settings), "checks": [], "rows": []}
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    common = {"seed": settings.seed, "device": settings.device}
    for dtype in settings.dtypes if settings.check else ():
        case = {**_sizes(settings.check), **common, "dtype": getattr(torch, dtype), "masked": 0.0}
        results["checks"] += (checks := check(case, settings.peers))
        print(table(checks, CHECK_COLUMNS), flush=True)
    for case in cases:
        inputs = {**case, **common, "dtype": getattr(torch, case["dtype"])}
        rows = measure(inputs, settings.peers, settings.repeats, settings.threads)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        measured.write(settings.output, results)
    if settings.picture:
        draw(results["rows"], settings.picture)
    wrong = [row for row in results["checks"] if row["peer"].startswith(OURS) and not row["right"]]
    if wrong:
        sys.exit(f"more than {ALLOWED} × the error of full logits:\n{table(wrong, CHECK_COLUMNS)}")
    return results


def _sizes(shape: str) -> dict[str, int]:
    return dict(zip("NHV", map(int, shape.split(",")), strict=True))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of time over the products of the targets, and of memory, per peer and case."""
    measured.draw_bars(
        rows,
        path,
        case=lambda row: "{N:,} × {H:,} × {V:,}, {dtype}, {masked:.0%} masked".format(**row),
        name=lambda row: row["peer"],
        panels=[
            ("time / products of targets", 1.0, "time / three products of the targets"),
            ("MiB", 1024.0, "memory above the inputs (GiB)"),
        ],
        ours=OURS,
    )


if __name__ == "__main__":
    main()

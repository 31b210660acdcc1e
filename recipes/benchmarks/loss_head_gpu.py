r"""The LM head and its loss on one GPU, forward + backward: weighted_linear_cross_entropy against what it replaces.

    python recipes/benchmarks/loss_head_gpu.py --output outputs/loss_head_gpu.json

One command, some minutes on an H100: it builds the Triton kernel, checks values and gradients against float64, times
every peer and the parts of ours, and writes JSON and a picture. A toy without a GPU, in seconds:

    python recipes/benchmarks/loss_head_gpu.py --device cpu --dtype float32 --shapes 64,16,500 --check 64,16,500 \
        --repeats 2

The peers, each with the gradients of hidden states [N, H] and head [V, H]:
  three products      logits, gradient of the hidden states, gradient of the head, each whole: the floor
  ours                hf_temporal.weighted_linear_cross_entropy, with the Triton pass
  ours, PyTorch pass  the same without Triton
  ours, chunks of n   the same as `ours` with chunk_size=n
  stock mean          full logits, mean cross-entropy in float32, as the models' own loss
  weights by hand     full logits, cross-entropy of each token in float32, times the weights
  torch chunked       torch.nn.functional.linear_cross_entropy(reduction="none"), times the weights
  TRL fused head      trl.trainer.add_fused_lm_head's log-probabilities of each token, times the weights
  Liger mean          liger_fused_linear_cross_entropy as it comes: no weights; the head's gradient is added up in the
                      head's own dtype
  … float32 sums      the same with accum_dtype=torch.float32, which is how ours adds up
  Liger × weights     reduction="none", times the weights; it makes the logits twice
  CCE exact           cut_cross_entropy's linear_cross_entropy(reduction="none"), times the weights
  CCE filtered        the same without the gradients below 2⁻¹² (bfloat16), its own default. Random inputs, whose
                      probabilities are all small, are what it is fastest on

A package that is not installed is named in the table; nothing is installed. Times are CUDA events' around a run,
right after a run that is not timed. The peers take turns in a rotating order: a ratio is the median of the ratios
within a round. Memory is the peak of what PyTorch had allocated above the inputs; gradients count, inputs do not.
`waits` counts the calls that made the host wait for the device, as torch.cuda.set_sync_debug_mode finds them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bars import draw_bars
from loss_head_gpu_peers import (
    BY_HAND,
    OURS,
    PEERS,
    PRODUCTS,
    STOCK,
    Inputs,
    Peer,
    first_line,
    ours,
)
from measured import environment, spread, table, write
from torch import Tensor

from hf_temporal.linear_cross_entropy import triton_kernel

SHAPES = ["16384,2048,248320", "8192,4096,151936"]
PACKAGES = ("triton", "trl", "liger-kernel", "cut-cross-entropy")
COLUMNS = [
    "N", "H", "V", "dtype", "peer", "seconds", "noise", "time / products", "time / stock", "MiB", "waits", "note",
]  # fmt: skip
CHECK_COLUMNS = ["options", "peer", "of", "error", "error / by hand", "largest error", "largest / by hand", "right"]
PART_COLUMNS = ["N", "H", "V", "part", "positions", "ms", "Tflop/s", "TB/s", "ms for N"]
CHECKS: dict[str, dict[str, float]] = {
    "none": {},
    "bias, scale, cap, smoothing": {"logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.1},
}
ALLOWED = 2.0  # times the error of full logits in the same dtype, by hand
NOISE = 1e-5  # an error below it is right whatever that one is
LAUNCHES = [(16384, 32), (16384, 16), (8192, 32), (8192, 16), (4096, 8)]  # BLOCK, WARPS of the kernel


def check(peers: dict[str, Peer], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors of loss and gradients against float64, and how many times those of full logits in the same dtype."""
    rows = []
    for name, options in CHECKS.items():
        inputs = Inputs.make(**case, bias=bool(options))
        exact = inputs.double()
        expected = _results(PEERS[BY_HAND], exact, options)
        usual = _errors(_results(PEERS[BY_HAND], inputs, options), expected)
        for peer in (peer for peer in peers if peers[peer].weighted and (peers[peer].has_options or not options)):
            row: dict[str, Any] = {"options": name, "peer": peer}
            try:
                found = _errors(_results(peers[peer], inputs, options), expected)
            except Exception as error:  # noqa: BLE001 - a peer that fails is a line of the table
                rows.append({**row, "of": f"failed: {first_line(error)}"})
                continue
            for of, (norm, largest) in found.items():
                ratios = [mine / max(theirs, 1e-300) for mine, theirs in zip((norm, largest), usual[of], strict=True)]
                right = max(norm, largest) <= NOISE or max(ratios) <= ALLOWED
                row |= {"of": of, "error": norm, "error / by hand": ratios[0]}
                rows.append({**row, "largest error": largest, "largest / by hand": ratios[1], "right": right})
    return rows


def _results(peer: Peer, inputs: Inputs, options: dict[str, float]) -> dict[str, Tensor]:
    inputs.clear()
    loss = peer.run(inputs, **options)
    assert loss is not None
    return {
        "loss": loss.detach(),
        **{name: leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None},
    }


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """‖error‖ / ‖expected‖ in the Euclidean norm and in the largest component."""
    errors = {}
    for name, right in expected.items():
        error = found[name].double() - right
        errors[name] = (float(error.norm() / right.norm()), float(error.abs().max() / right.abs().max()))
    return errors


class Bench:
    """Times and memory of peers on one set of inputs."""

    def __init__(self, peers: dict[str, Peer], inputs: Inputs, device: torch.device) -> None:
        self.peers, self.inputs, self.device = peers, inputs, device
        self.is_cuda = device.type == "cuda"

    def run(self, peer: str) -> None:
        """Once."""
        self.inputs.clear()
        self.peers[peer].run(self.inputs)

    def first(self, peer: str) -> dict[str, Any]:
        """What kernels it builds are built; then memory, and waits for the device. Or why it fails."""
        kernel = mock.Mock(wraps=triton_kernel.losses_and_gradient_)
        try:
            with mock.patch.object(triton_kernel, "losses_and_gradient_", kernel):
                self.run(peer)
            self.inputs.clear()
            found: dict[str, Any] = {"MiB": None, "waits": None, "Triton calls": kernel.call_count}
            if self.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                with waits_for_device() as messages:
                    self.run(peer)
                found["waits"] = len(messages)
                found["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                if peer == OURS and not kernel.called:
                    found["note"] = "the Triton pass did not run"
        except Exception as error:  # noqa: BLE001 - a peer that fails is a line of the table
            found = {"note": f"failed: {first_line(error)}"}
        self.release()
        return found

    def seconds(self, peer: str) -> float:
        """Of one run, right after another, so that the allocator has what it needs."""
        if self.is_cuda:
            self.run(peer)
        return elapsed(partial(self.run, peer), self.device)

    def release(self) -> None:
        """Give back what a peer, full logits say, has left in the cache."""
        self.inputs.clear()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


@contextmanager
def waits_for_device() -> Iterator[list[str]]:
    """Collects a line for each call that makes the host wait."""
    messages: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.set_warn_always(False)
            messages += [str(each.message) for each in caught if "synchroniz" in str(each.message)]


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds between two CUDA events around it; the clock's on a CPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def measure(peers: dict[str, Peer], case: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """A row per peer: median time, noise, memory, and the ratios to the floor and to stock in the same round."""
    device = case["device"]
    bench = Bench(peers, Inputs.make(**case, bias=False), device)
    found = {
        name: {"note": note} if (note := peer.missing(device)) else bench.first(name) for name, peer in peers.items()
    }
    running = [name for name in peers if "MiB" in found[name]]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for repeat in range(repeats):
        for turn in range(len(running)):
            peer = running[(repeat + turn) % len(running)]
            seconds[peer].append(bench.seconds(peer))

    def ratio(peer: str, other: str) -> float | None:
        if peer not in seconds or other not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[peer], seconds[other], strict=True))

    return [
        {
            **{name: case[name] for name in ("N", "H", "V")},
            "dtype": str(case["dtype"]).removeprefix("torch."),
            "peer": peer,
            "seconds": statistics.median(seconds[peer]) if peer in seconds else None,
            "noise": spread(seconds[peer]) if peer in seconds else None,
            "time / products": ratio(peer, PRODUCTS),
            "time / stock": ratio(peer, STOCK),
            **found[peer],
            "all_seconds": seconds.get(peer),
        }
        for peer in peers
    ]


def measure_parts(case: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """What one chunk of ours is made of: its three products, and the kernel as it may be launched."""
    device, N, H, V = (case[name] for name in ("device", "N", "H", "V"))
    itemsize = case["dtype"].itemsize
    n = N if device.type == "cpu" else min(N, triton_kernel.row_chunk_size(V, itemsize, device, width=H))
    inputs = Inputs.make(**{**case, "N": n}, bias=False)
    hidden, head = inputs.hidden.detach(), inputs.head.detach()
    z = hidden @ head.T
    gradient = torch.zeros(V, H, device=device)
    whole = 2 * n * V * H
    parts: list[tuple[str, Callable[[], Any], float, float]] = [
        ("logits", lambda: torch.mm(hidden, head.T, out=z), whole, itemsize * (n * H + V * H + n * V)),
        ("gradient of hidden", lambda: z @ head, whole, itemsize * (n * H + V * H + n * V)),
        (
            "gradient of head, added",
            lambda: triton_kernel.add_product_(gradient, z.T, hidden),
            whole,
            itemsize * (n * H + n * V) + 8 * V * H,
        ),
    ]
    if triton_kernel.is_available(device):
        for block, warps in LAUNCHES:

            def launch(block: int = block, warps: int = warps) -> None:
                with mock.patch.multiple(triton_kernel, BLOCK=block, WARPS=warps):
                    triton_kernel.losses_and_gradient_(z, inputs.targets, inputs.weights)

            parts.append((f"pass, blocks of {block}, {warps} warps", launch, 0, 3 * itemsize * n * V))
    rows = []
    for name, run, operations, bytes_ in parts:
        run()
        seconds = statistics.median(elapsed(run, device) for _ in range(max(repeats, 3)))
        row: dict[str, Any] = {"N": N, "H": H, "V": V, "part": name, "positions": n, "ms": seconds * 1e3}
        row |= {"Tflop/s": operations / seconds / 1e12, "TB/s": bytes_ / seconds / 1e12}
        rows.append({**row, "ms for N": seconds * 1e3 * N / n})
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of time over the three products, and of memory, per peer and shape."""
    rows = [row for row in rows if row["seconds"] is not None and row["time / products"] is not None]
    panels = [("time / products", 1.0, "time / three matrix products")]
    if any(row["MiB"] is not None for row in rows):
        panels.append(("MiB", 1024.0, "memory above the inputs (GiB)"))
    draw_bars(rows, path, case=lambda row: "N = {N:,}, H = {H:,}, V = {V:,}".format(**row), panels=panels, ours=OURS)


def _case(shape: str, settings: argparse.Namespace) -> dict[str, Any]:
    N, H, V = map(int, shape.split(","))
    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device("cpu")
    return {"N": N, "H": H, "V": V, "dtype": getattr(torch, settings.dtype), "device": device, "seed": settings.seed}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, measure every shape, print the tables, write the JSON and the picture.

    Raises:
        SystemExit: there is no GPU, or ours missed the accuracy that it promises.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="positions, width, vocabulary: N,H,V")
    parser.add_argument("--check", default="2048,512,32000", help="shape at which errors are measured")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--chunk-sizes", nargs="*", type=int, default=[1024, 4096, 8192], help="further rows of ours")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write; the picture lies beside it")
    settings = parser.parse_args(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no CUDA device here; a toy runs with --device cpu --dtype float32."
        )
    peers = {name: PEERS[name] for name in settings.peers}
    chunked = {f"ours, chunks of {n}": Peer(partial(ours, chunk_size=n)) for n in settings.chunk_sizes}
    results: dict[str, Any] = {
        "benchmark": "loss_head_gpu",
        **environment(),
        "packages": {name: _version(name) for name in PACKAGES} | {"cuda": torch.version.cuda},
        "settings": {name: value for name, value in vars(settings).items() if name != "output"},
        "checks": [],
        "rows": [],
        "parts": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "packages", "settings")}))
    case = _case(settings.check, settings)
    results["checks"] = check({name: peer for name, peer in peers.items() if not peer.missing(case["device"])}, case)
    print(table(results["checks"], CHECK_COLUMNS), flush=True)
    write(settings.output, results)
    for shape in settings.shapes:
        case = _case(shape, settings)
        results["rows"] += (rows := measure(peers | chunked, case, settings.repeats))
        print(table(rows, COLUMNS), flush=True)
        results["parts"] += (parts := measure_parts(case, settings.repeats))
        print(table(parts, PART_COLUMNS), flush=True)
        write(settings.output, results)
        if settings.output is not None:
            draw(results["rows"], settings.output.with_suffix(".png"))
    wrong = [row for row in results["checks"] if row["peer"].startswith(OURS) and not row.get("right")]
    if wrong:
        raise SystemExit(f"more than {ALLOWED} × the error of full logits:\n{table(wrong, CHECK_COLUMNS)}")
    return results


if __name__ == "__main__":
    main()

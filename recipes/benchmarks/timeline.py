r"""Making t and w for a packed batch: `document_ids_of`, `target_positions`, `TemporalWeighting.weights`.

    python recipes/benchmarks/timeline.py --output recipes/results/timeline.json

A moment, on a toy:

    python recipes/benchmarks/timeline.py --rows 2 --length 256 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_temporal import TemporalWeighting, document_ids_of, target_positions
from hf_temporal.finetuning.tables import environment, spread, table, write
from hf_temporal.positions import ORIGINS
from hf_temporal.weighting import NORMALIZATIONS

MEAN_DOCUMENT = 400
PROMPT = 0.5
POWERS = (2.0, -1.0)


def packed_batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Rows of documents of 2 … 2·400 tokens, told apart by `position_ids`; the first half of each is its prompt."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(49152, (rows, length), generator=generator)
    positions = torch.empty_like(labels)
    for row in range(rows):
        start = 0
        while start < length:
            size = int(torch.randint(2, 2 * MEAN_DOCUMENT, (), generator=generator))
            stop = min(start + size, length)
            positions[row, start:stop] = torch.arange(stop - start)
            labels[row, start : start + max(1, int(PROMPT * (stop - start)))] = -100
            start = stop
    return {"input_ids": labels.clamp(min=0), "labels": labels, "position_ids": positions}


def once(batch: dict[str, Tensor], weighting: TemporalWeighting) -> tuple[float, float]:
    """Seconds for the documents and times, and for the weights."""
    start = time.perf_counter()
    documents = document_ids_of(batch)
    positions = target_positions(batch["labels"], origin=weighting.origin, document_ids=documents)
    middle = time.perf_counter()
    weighting.weights(positions, document_ids=documents)
    return middle - start, time.perf_counter() - middle


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    batch = packed_batch(settings.rows, settings.length, settings.seed)
    weightings = [
        TemporalWeighting(power=power, origin=origin, normalization=normalization)
        for origin in ORIGINS
        for normalization in NORMALIZATIONS
        for power in POWERS
    ]
    for weighting in weightings:
        once(batch, weighting)
    times: list[list[tuple[float, float]]] = [[] for _ in weightings]
    for _ in range(settings.repeats):
        for mine, weighting in zip(times, weightings, strict=True):
            mine.append(once(batch, weighting))
    results: dict[str, Any] = {
        "benchmark": "timeline",
        **environment(),
        "settings": {name: getattr(settings, name) for name in ("rows", "length", "repeats", "threads", "seed")},
        "rows": [
            {
                "origin": weighting.origin,
                "normalization": weighting.normalization,
                "p": weighting.power,
                "t [ms]": 1e3 * statistics.median(t for t, _ in mine),
                "w [ms]": 1e3 * statistics.median(w for _, w in mine),
                "both [ms]": 1e3 * statistics.median(t + w for t, w in mine),
                "fastest [ms]": 1e3 * min(t + w for t, w in mine),
                "noise": spread([t + w for t, w in mine]),
            }
            for mine, weighting in zip(times, weightings, strict=True)
        ],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    print(
        table(
            results["rows"], ["origin", "normalization", "p", "t [ms]", "w [ms]", "both [ms]", "fastest [ms]", "noise"]
        )
    )
    write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

r"""ROUGE over 10,000 pairs, by one process and by all cores.

    python recipes/benchmarks/rouge.py --output recipes/results/rouge.json

A few seconds, on a toy:

    python recipes/benchmarks/rouge.py --pairs 300 --rounds 1

Made-up pairs of the length of a summary or of a paragraph: a reference of random words, some of them frequent, and a
prediction that shares half of them. The metric is called as the recipes do, with its intervals; it is told by
HF_TEMPORAL_CORES how many processes to take, in turn and in alternating order. CPU use is user and system time, that
of child processes included, as a share of all cores over the same seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate

import hf_temporal.data
from hf_temporal.finetuning.tables import environment, spread, table, write

METRIC = Path(hf_temporal.data.__file__).parent / "metrics" / "rouge"
COLUMNS = ["words", "pairs", "processes", "seconds", "noise", "time / one process", "CPU use"]
VOCABULARY = 5000
ENDINGS = ("", "s", "ed", "ing", "ation")


def make_pairs(count: int, words: int, seed: int) -> dict[str, list[str]]:
    """`predictions` and `references` of some `words` words, in sentences of ten."""
    generator = random.Random(seed)
    stems = [
        "".join(generator.choices("abcdefghijklmnoprstuvwy", k=generator.randint(2, 8))) for _ in range(VOCABULARY)
    ]

    def word() -> str:
        return stems[int(VOCABULARY ** generator.random()) - 1] + generator.choice(ENDINGS)

    def text(tokens: list[str]) -> str:
        return "\n".join(" ".join(tokens[start : start + 10]) for start in range(0, len(tokens), 10))

    pairs: dict[str, list[str]] = {"predictions": [], "references": []}
    for _ in range(count):
        reference = [word() for _ in range(generator.randint(words // 2, words * 3 // 2))]
        pairs["references"].append(text(reference))
        pairs["predictions"].append(text([each if generator.random() < 0.5 else word() for each in reference]))
    return pairs


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(words: int, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for one process and one for all: median, noise, CPU use.

    Raises:
        RuntimeError: their scores differ.
    """
    rouge: Any = evaluate.load(str(METRIC), keep_in_memory=True)
    pairs = make_pairs(settings.pairs, words, settings.seed)
    counts = [1, settings.processes]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    used: dict[int, list[float]] = {count: [] for count in counts}
    scores = []
    for turn in range(settings.rounds):
        for count in counts[:: 1 if turn % 2 == 0 else -1]:
            os.environ["HF_TEMPORAL_CORES"] = str(count)
            start, before = time.perf_counter(), cpu_seconds()
            scores.append(rouge.compute(**pairs))
            seconds[count].append(time.perf_counter() - start)
            used[count].append((cpu_seconds() - before) / seconds[count][-1] / settings.processes)
    if any(each != scores[0] for each in scores):
        raise RuntimeError(f"the scores differ between processes: {scores}")
    return [
        {
            "words": words,
            "pairs": settings.pairs,
            "processes": count,
            "seconds": statistics.median(seconds[count]),
            "noise": spread(seconds[count]),
            "time / one process": statistics.median(
                [mine / one for mine, one in zip(seconds[count], seconds[1], strict=True)]
            ),
            "CPU use": statistics.median(used[count]),
            "all_seconds": seconds[count],
        }
        for count in counts
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--words", type=int, nargs="+", default=[15, 60], help="of a text, on average")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    results: dict[str, Any] = {
        "benchmark": "rouge",
        **environment(),
        "settings": {name: value for name, value in vars(settings).items() if name != "output"},
        "rows": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    for words in settings.words:
        rows = measure(words, settings)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

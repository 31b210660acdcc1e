"""Count how much of what the recipes compute on docstrings is padding, by the order in which rows come into batches.

    python recipes/benchmarks/padding.py   # nothing is trained; a few minutes the first time, when texts are tokenized

Rows are encoded as the two configurations do it, with other caps of source and target, and drawn by the Trainer's own
samplers in batches of 8. Each share is the mean over the seeds, with the smallest and the largest. "begin alike" is
the share of the real tokens of random batches that padding-free batches compute once for all of their rows.
"""

import statistics
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from measured import carry_out, median_ratio, parsed, parser_of
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, SEQ2SEQ_ARGUMENTS, prepare_causal_lm, prepare_seq2seq
from hf_temporal.shared_prefix import MIN_PREFIX

BATCH = 8
# what prepares a run of each configuration, the arguments that it takes, and caps of source and target in tokens
RUNS: dict[str, tuple[Any, Sequence[Any], Sequence[tuple[int, int]]]] = {
    "summarization/smollm2_lora_docstrings": (
        prepare_causal_lm,
        CAUSAL_ARGUMENTS,
        [(source, 48) for source in (112, 256, 512, 1024)],
    ),
    "summarization/t5_small_docstrings": (prepare_seq2seq, SEQ2SEQ_ARGUMENTS, [(128, 32), (512, 128)]),
}


def padding(sides: Mapping[str, Sequence[int]], batches: Iterable[Sequence[int]]) -> dict[str, float]:
    """1 − real tokens / computed tokens of each side and of "all", where rows are as long as the longest of a batch.

    `sides` are the lengths of the rows that the encoder and the decoder are given, `batches` the rows' numbers.
    """
    real, computed = dict.fromkeys([*sides, "all"], 0), dict.fromkeys([*sides, "all"], 0)
    for batch in batches:
        for side, lengths in sides.items():
            drawn = [lengths[row] for row in batch]
            for name in (side, "all"):
                real[name] += sum(drawn)
                computed[name] += len(drawn) * max(drawn)
    return {name: 1 - real[name] / computed[name] for name in real}


def beginning_alike(rows: Sequence[Sequence[int]], batches: Iterable[Sequence[int]]) -> float:
    """The share of tokens that repeat what all rows of their batch begin with; each row keeps its last token."""
    tokens = repeated = 0
    for batch in batches:
        drawn = [rows[row] for row in batch]
        columns = zip(*(row[:-1] for row in drawn), strict=False)
        common = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))
        tokens += sum(map(len, drawn))
        repeated += common * (len(drawn) - 1) if common >= MIN_PREFIX else 0
    return repeated / tokens


def sides_of(run: Any) -> dict[str, list[int]]:
    """The lengths of the training rows of a run, by the part of the model that computes them."""
    rows = run.splits["train"]
    columns = {"decoder": "input_ids"}
    if run.model.config.is_encoder_decoder:
        columns = {"encoder": "input_ids", "decoder": "labels"}
    return {side: [len(row) for row in rows[column]] for side, column in columns.items()}


def orders(sides: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[list[int]]]:
    """The batches of an epoch by the name of their order, "random" first."""
    count, source = len(sides["decoder"]), next(iter(sides.values()))
    grouped = {"group_by_length": [*source]}
    if "encoder" in sides:
        grouped["by source + target"] = [sum(lengths) for lengths in zip(*sides.values(), strict=True)]
    samplers: dict[str, Any] = {"random": RandomSampler(range(count), generator=_seeded(seed))}
    for name, lengths in grouped.items():
        samplers[name] = LengthGroupedSampler(BATCH, lengths=lengths, generator=_seeded(seed))
    made = {name: [*BatchSampler(sampler, BATCH, drop_last=False)] for name, sampler in samplers.items()}
    return made if "encoder" in sides else {**made, "padding_free": [[row] for row in range(count)]}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(settings: Namespace) -> list[dict[str, Any]]:
    """A row for each configuration, cap and order."""
    results = []
    for config, (prepare, kinds, caps) in RUNS.items():
        for source, target in caps:
            given = {"config": config, "max_source_length": source, "max_target_length": target, "do_train": "false"}
            run = prepare(parse(kinds, [f"--{name}={value}" for name, value in given.items()]))
            sides = sides_of(run)
            seeds = range(settings.seed, settings.seed + settings.repeats)
            drawn = [orders(sides, seed) for seed in seeds]
            shares = {name: [padding(sides, each[name]) for each in drawn] for name in drawn[0]}
            real = {name: [1 - share["all"] for share in found] for name, found in shares.items()}
            alike = {}
            if "padding_free" in shares:
                rows = run.splits["train"]["input_ids"][:]
                alike["padding_free"] = _cell([beginning_alike(rows, each["random"]) for each in drawn])
            results += [
                {
                    "config": config,
                    "rows": len(sides["decoder"]),
                    "caps": f"{source}, {target}",
                    "batches": name,
                    **{side: _cell([share[side] for share in found]) for side in found[0]},
                    "tokens / random": median_ratio(real["random"], real[name]),
                    "begin alike": alike.get(name, ""),
                    "all_shares": found,
                }
                for name, found in shares.items()
            ]
    return results


def _cell(shares: Collection[float]) -> str:
    return f"{statistics.mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print a table."""
    parser = parser_of(__doc__)
    parser.set_defaults(repeats=3)
    settings = parsed(parser, arguments)
    columns = ["config", "rows", "caps", "batches", "encoder", "decoder", "all", "tokens / random", "begin alike"]
    carry_out("padding", settings, measure, columns)


if __name__ == "__main__":
    main()

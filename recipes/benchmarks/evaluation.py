r"""What the losses by position add to an evaluation: `TemporalWeightTrainer.evaluate` against stock `Trainer`'s.

    python recipes/benchmarks/evaluation.py --output outputs/evaluation.json

takes two minutes; over 100,000 target tokens, some ten to fifteen:

    python recipes/benchmarks/evaluation.py --rows 630 --shares 1 --rounds 1 \
        --output outputs/evaluation_all_targets.json

A few seconds, on a toy:

    python recipes/benchmarks/evaluation.py --model toy --rows 8 --length 32 --rounds 2

Both trainers evaluate one model on the same rows, in turn and in alternating order, so that whatever else the machine
does meets them alike; a ratio is the median of the ratios within a round. A first evaluation of each, of one batch, in
which ours runs nine tokens through the model to read its loss, is not timed. The weights are random, which the time
does not depend on, and half of the labels are the model's own first choice, as they would be for a model that has
learned: whether a token is ranked first takes longest where it is, with little probability. A share of each row's
tokens, the last ones, are targets; what is added grows with them, what stock does not.

"inside" is told by ours alone, and does not depend on what else the machine did between two evaluations: the seconds
of its prediction steps beside the stock step within each, as a share of the latter. It is somewhat too large, since
what stock frees in its step, logits above all, is kept beyond it here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measured import environment, spread, table, write
from step_trainers import MODELS
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_temporal import TemporalTrainingArguments, TemporalWeightMixin

STOCK, OURS = "stock Trainer", "TemporalWeightTrainer"
COLUMNS = [
    "share", "target tokens", "trainer", "seconds", "noise", "time / stock", "added per target [µs]", "inside",
]  # fmt: skip
FIRST_TOKEN = 2


class Inner(Trainer):
    """Stock, which adds up the seconds of its prediction steps."""

    inner_seconds = outer_seconds = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to the attribute of this name."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Stock's."""
        with self.timed("inner_seconds"):
            return super().prediction_step(*args, **kwargs)


class Outer(TemporalWeightMixin, Inner):
    """`TemporalWeightTrainer`, which adds up the seconds of its prediction steps, too."""

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Ours, with stock's inside."""
        with self.timed("outer_seconds"):
            return super().prediction_step(*args, **kwargs)

    def inside(self) -> float:
        """What came beside stock's steps since the last call, as a share of them."""
        share = self.outer_seconds / self.inner_seconds - 1
        self.outer_seconds = self.inner_seconds = 0.0
        return share


def rows_for(model: Any, settings: argparse.Namespace, share: float) -> list[dict[str, Tensor]]:
    """Random tokens without padding; the labels of the last `share` of a row count, half of them as the model does."""
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = MODELS[settings.model]["vocab_size"]
    ids = torch.randint(FIRST_TOKEN, vocabulary, (settings.rows, settings.length), generator=generator)
    labels = ids.clone()
    with torch.no_grad():
        for some, own in zip(ids.split(settings.batch_size), labels.split(settings.batch_size), strict=True):
            own[:, 2::2] = model.eval()(some).logits.argmax(-1)[:, 1:-1:2]
    labels[:, : settings.length - max(1, round(share * settings.length))] = -100
    return [{"input_ids": row, "labels": own} for row, own in zip(ids, labels, strict=True)]


def measure(model: Any, settings: argparse.Namespace, share: float) -> list[dict[str, Any]]:
    """A row for each trainer: median, noise, and the median of the ratios to stock in the same round."""
    rows: Any = rows_for(model, settings, share)
    targets = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_eval_batch_size": settings.batch_size, "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "seed": settings.seed,
        }  # fmt: skip
        ours = Outer(model, TemporalTrainingArguments(**common), data_collator=default_data_collator)
        stock = Trainer(model, TrainingArguments(**common), data_collator=default_data_collator)
        trainers = {STOCK: stock, OURS: ours}
        inside: list[float] = []
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for trainer in trainers.values():
            trainer.remove_callback(PrinterCallback)
            trainer.evaluate(rows[: settings.batch_size])
        ours.inside()
        losses = set()
        for turn in range(settings.rounds):
            for name in [STOCK, OURS][:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                losses.add(trainers[name].evaluate(rows)["eval_loss"])
                seconds[name].append(time.perf_counter() - start)
            inside.append(ours.inside())
        if len(losses) > 1:
            raise RuntimeError(f"the trainers differ in eval_loss: {losses}")
    found = []
    for name, mine in seconds.items():
        ratio = statistics.median([one / other for one, other in zip(mine, seconds[STOCK], strict=True)])
        found.append(
            {
                "share": share,
                "target tokens": targets,
                "trainer": name,
                "seconds": statistics.median(mine),
                "noise": spread(mine),
                "time / stock": ratio,
                "added per target [µs]": 1e6 * (ratio - 1) * statistics.median(seconds[STOCK]) / targets,
                "inside": statistics.median(inside) if name == OURS else None,
                "all_seconds": mine,
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if "T5" not in name], default="SmolLM2-135M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.15], help="of a row that is targets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    set_seed(settings.seed)
    config = AutoConfig.for_model(**MODELS[settings.model])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    results: dict[str, Any] = {
        "benchmark": "evaluation",
        **environment(),
        "settings": {name: value for name, value in vars(settings).items() if name != "output"},
        "rows": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    for share in settings.shares:
        rows = measure(model, settings, share)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

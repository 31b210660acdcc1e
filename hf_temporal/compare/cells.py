"""One run of a comparison: where it is, whether it is finished, what it measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_temporal.evaluation import evaluation_profiles
from hf_temporal.finetuning.report import EVALUATIONS_NAME, RESULTS_NAME, load_evaluations

Evaluations = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Cell:
    """One p with one seed; its run writes into a folder of its own in the comparison's `output_dir`."""

    power: float
    seed: int
    output_dir: Path

    @property
    def name(self) -> str:
        return f"p{power_name(self.power)}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    @property
    def log(self) -> Path:
        """The file that holds all that the run printed."""
        return self.folder / "log.txt"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS_NAME).is_file()

    def evaluations(self, metric: str) -> Evaluations:
        """All metrics by step, without their prefix.

        Raises:
            ValueError: there is no evaluation, or the last one does not have this metric.
        """
        found = load_evaluations(self.folder)
        if not found:
            raise ValueError(f"{self.folder} holds no {EVALUATIONS_NAME}; accepted: a configuration with do_eval")
        by_step = {
            each["step"]: {name.removeprefix("eval_"): float(value) for name, value in each["metrics"].items()}
            for each in found
        }
        known = by_step[max(by_step)]
        if metric not in known:
            raise ValueError(f"metric={metric!r} is not among what {self.name} measured: {', '.join(sorted(known))}")
        return by_step

    def drawn(self) -> dict[str, Any]:
        """What the pictures of the last evaluation need, as far as the run measured it."""
        last: dict[str, Any] = dict(load_evaluations(self.folder)[-1])
        found: dict[str, Any] = {name: last[name] for name in ("memory", "target_memory") if name in last}
        if profiles := evaluation_profiles(self.folder):
            found["bins"] = [{name: each[name] for name in ("from", "to", "loss")} for each in profiles[-1]["bins"]]
        return found


def curve(evaluations: Evaluations, metric: str) -> dict[int, float]:
    """A metric by step, where it was measured."""
    return {step: metrics[metric] for step, metrics in sorted(evaluations.items()) if metric in metrics}


def power_name(power: float) -> str:
    """0.5, 1, -1, inf: the shortest text that reads as this p."""
    return repr(float(power)).removesuffix(".0")

"""One run of a comparison: where it writes, whether it is finished, and what it measured."""

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_temporal.evaluation import evaluation_profiles
from hf_temporal.finetuning.report import EVALUATIONS_NAME, RESULTS_NAME, load_evaluations

LOG_NAME = "log.txt"  # All that the run printed; locked for as long as a process of the cell lives.

Evaluations = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Cell:
    """The run of one p with one seed, in a folder of its own in `output_dir`."""

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
        return self.folder / LOG_NAME

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS_NAME).is_file()

    def evaluations(self, metric: str) -> Evaluations:
        """All metrics by step, without the prefix `eval_`, or a `ValueError` where the last step lacks this one."""
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
        """The data for the pictures of the last evaluation, as far as the run measured them."""
        last: dict[str, Any] = dict(load_evaluations(self.folder)[-1])
        found: dict[str, Any] = {name: last[name] for name in ("memory", "target_memory") if name in last}
        if profiles := evaluation_profiles(self.folder):
            found["bins"] = [{name: each[name] for name in ("from", "to", "loss")} for each in profiles[-1]["bins"]]
        return found


def is_bound(folder: Path) -> bool:
    """Whether the cell in this folder is finished, or a process of it still lives."""
    if (folder / RESULTS_NAME).is_file():
        return True
    if not (path := folder / LOG_NAME).is_file():
        return False
    with path.open("ab") as log:
        return not lock(log)


def lock(log: IO[bytes]) -> bool:
    """Lock a file until this process and all that inherit its descriptor have closed it; False if it is locked."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def curve(evaluations: Evaluations, metric: str) -> dict[int, float]:
    """A metric by step, at the steps where it was measured."""
    return {step: metrics[metric] for step, metrics in sorted(evaluations.items()) if metric in metrics}


def power_name(power: float) -> str:
    """0.5, 1, -1, inf: the shortest text that reads as this p."""
    return repr(float(power)).removesuffix(".0")

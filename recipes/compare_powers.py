r"""Compare powers p of the weight t^p: a recipe with every p and every seed, each p tested against p = 0.

Thirty runs of a minute or two, which answer whether p helps a small Llama to copy:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 0.5 1 2 4 10 --seeds 0 1 2 3 4 --metric recall --reach 0.98 --output_dir outputs/compare_copying

A look at the whole way in about two minutes:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 --seeds 0 1 --metric recall --output_dir outputs/compare_copying_look --max_steps 2

Every flag that is not one of this script goes to every run. The same command continues a comparison that was
interrupted: runs that are finished are kept. It writes `summary.md`, `summary.json` and three pictures.

With `--dry_run` it prints one `accelerate launch` command per run, for a cluster that sees the same folder; once its
jobs have ended, the command without `--dry_run` finds the finished runs there, and makes up for those that failed:

    python recipes/compare_powers.py [as above] --dry_run | while IFS= read -r line; do sbatch --wrap "$line"; done
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_temporal.weighting import TemporalWeighting
from recipes.comparison import Cell, direction_of, number, power_name, title_of
from recipes.comparison_report import REPORT_NAME, Outcome, write_summary
from recipes.report import write_json

SETTINGS_NAME = "comparison.json"
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
LOG_LINES = 20
INTERVAL = 0.1  # seconds between two looks at the running cells
GRACE = 30  # seconds that a cell has to end when it is told to
OWN = {
    "temporal_power": "--powers",
    "seed": "--seeds",
    "hub_token": "the environment's HF_TOKEN, as flags are written down",
}


@dataclass
class CompareArguments:
    """The grid, and what decides."""

    powers: list[float] = field(metadata={"help": "p of the weight t^p, 0 among them; inf: the last token alone."})
    seeds: list[int] = field(metadata={"help": "Every p runs with each of them."})
    metric: str = field(metadata={"help": "What decides, by its name in the evaluations: recall, rouge1, loss."})
    output_dir: str = field(metadata={"help": "Gets a folder for each cell, summary.md, summary.json, pictures."})
    config: Path | None = field(default=None, metadata={"help": "YAML file of the recipe."})
    accelerate_config: Path | None = field(default=None, metadata={"help": "YAML file of `accelerate launch`."})
    reach: float | None = field(
        default=None, metadata={"help": "Count the steps until the metric is as good as this, too."}
    )
    max_parallel: int = field(
        default=1, metadata={"help": "Cells that run side by side and share the cores; 0 only sums up."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the command of each unfinished cell, run none."})

    def __post_init__(self) -> None:
        self.powers = [power + 0.0 for power in self.powers]  # −0 is 0
        for power in self.powers:
            TemporalWeighting(power=power)
        for name, values in (("powers", self.powers), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r} has one twice; accepted: each once")
        if 0.0 not in self.powers:
            raise ValueError(
                f"powers={self.powers!r} lacks 0, which every other p is tested against; accepted: with it"
            )
        self.metric = self.metric.removeprefix("eval_")
        if self.metric == "temporal_loss":
            raise ValueError("metric='temporal_loss' is weighted by each p itself; accepted: one that p leaves alone")
        if self.reach is not None and direction_of(self.metric) == 0:
            raise ValueError(f"reach={self.reach!r}, but of {self.metric} neither more nor less is better")
        if self.max_parallel < 0:
            raise ValueError(f"max_parallel={self.max_parallel!r} is negative; accepted: 0 or more")
        for path in (self.config, self.accelerate_config):
            if path is not None and not path.is_file():
                raise ValueError(f"{str(path)!r} is no file; accepted: a YAML file")


@dataclass(frozen=True)
class Comparison:
    """A recipe, and the flags of every cell."""

    arguments: CompareArguments
    recipe: Path
    overrides: list[str]

    @property
    def output_dir(self) -> Path:
        """Of all cells."""
        return Path(self.arguments.output_dir)

    def cells(self) -> list[Cell]:
        """Seed by seed, so that what is done early compares every p."""
        return [Cell(power, seed, self.output_dir) for seed in self.arguments.seeds for power in self.arguments.powers]

    def command(self, cell: Cell) -> list[str]:
        """What follows `accelerate launch`."""
        accelerate, config = self.arguments.accelerate_config, self.arguments.config
        return [
            *(["--config_file", str(accelerate)] if accelerate else []),
            str(self.recipe),
            *(["--config", str(config)] if config else []),
            *self.overrides,
            f"--temporal_power={power_name(cell.power)}",
            f"--seed={cell.seed}",
            f"--output_dir={cell.folder}",
        ]

    def shown(self, cell: Cell) -> str:
        """The whole command, for a shell."""
        return shlex.join(["accelerate", "launch", *self.command(cell)])

    def settings(self) -> dict[str, Any]:
        """What makes a comparison the same one; the grid may grow."""
        accelerate, config = self.arguments.accelerate_config, self.arguments.config
        settings = {
            "recipe": self.recipe.name,
            "config": config and yaml.safe_load(config.read_text(encoding="utf-8")),
            "accelerate_config": accelerate and yaml.safe_load(accelerate.read_text(encoding="utf-8")),
            "overrides": self.overrides,
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def read_arguments(argv: Sequence[str]) -> Comparison:
    """Flags of this script, the recipe, and the flags that every cell gets.

    Raises ValueError where one is out of what is accepted, or belongs to the grid.
    """
    parser = HfArgumentParser(
        CompareArguments,  # type: ignore[arg-type]
        description=__doc__,
        usage="%(prog)s recipe.py [--config FILE.yaml] [--name value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="The script that every cell runs.")
    arguments, rest, overrides = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    for flag in overrides:
        name = flag.partition("=")[0].lstrip("-").replace("-", "_")
        if flag.startswith("--") and name in OWN:
            raise ValueError(f"--{name} cannot be given to every cell; accepted: {OWN[name]}")
    if not rest.recipe.is_file():
        raise ValueError(
            f"recipe={str(rest.recipe)!r} is no file; accepted: recipes/finetune_causal_lm.py or the like"
        )
    return Comparison(arguments, rest.recipe, overrides)


def keep_settings(comparison: Comparison) -> dict[str, Any]:
    """The settings, written into `output_dir`.

    Raises ValueError where cells there were started with others.
    """
    path, settings = comparison.output_dir / SETTINGS_NAME, comparison.settings()
    if path.is_file() and any(comparison.output_dir.glob("p*_seed*")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{name}={value!r}, but output_dir={comparison.arguments.output_dir!r} holds a comparison with "
                    f"{name}={found.get(name)!r}; accepted: the same settings, which continue that comparison, or "
                    "another output_dir"
                )
    comparison.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return settings


# ---- running


def start(comparison: Comparison, cell: Cell) -> subprocess.Popen[bytes] | None:
    """Run a cell in a session of its own; None where a process of an earlier comparison still runs it.

    The lock is on the log file and goes with its descriptor to every process of the cell, which write there: it is
    held for as long as one of them lives, whoever started them.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        log.write(f"$ {comparison.shown(cell)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [*LAUNCHER, *comparison.command(cell)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=cell_environment(comparison.arguments.max_parallel),
            start_new_session=True,
        )


def cell_environment(max_parallel: int) -> dict[str, str]:
    """This process's, with each cell's share of the cores, which its recipe spreads over its own processes.

    OMP_NUM_THREADS, the threads of one process, is as `accelerate launch` would set it, unless the user has.
    """
    share = str(max(1, (os.cpu_count() or 1) // max_parallel))
    return {"OMP_NUM_THREADS": "1", "HF_TEMPORAL_CORES": os.environ.get("OMP_NUM_THREADS", share), **os.environ}


@contextmanager
def ending(running: Mapping[Cell, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever ends this process, but SIGKILL, ends the cells that are still running, with all their processes.

    A signal that is ignored, as SIGHUP is under `nohup`, stays so.
    """
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    for each, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        _signal(running, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        _signal(running, signal.SIGKILL)
        for process in running.values():
            process.wait()
        for each, handler in handlers.items():
            signal.signal(each, handler)


def _signal(running: Mapping[Cell, subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in running.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


class Runs:
    """The cells of a comparison, run `max_parallel` at a time.

    A failed cell leaves the others alone, unless none has ever come to its end: then no other is started.

    Attributes:
        failed: exit status of the cells that failed.
    """

    def __init__(self, comparison: Comparison) -> None:
        cells = comparison.cells()
        self.failed: dict[Cell, int] = {}
        self._comparison = comparison
        self._done = [cell for cell in cells if cell.finished]
        self._waiting = [cell for cell in cells if not cell.finished]
        self._busy: set[Cell] = set()
        self._begun: dict[Cell, float] = {}
        self._running: dict[Cell, subprocess.Popen[bytes]] = {}

    def run(self) -> None:
        """Until each cell is finished or has failed.

        Raises ValueError as soon as a finished cell has no evaluation with the metric.
        """
        metric = self._comparison.arguments.metric
        for cell in self._done:
            cell.evaluations(metric)
        total = len(self._done) + len(self._waiting)
        with tqdm(total=total, initial=len(self._done), unit="cell") as bar, ending(self._running):
            while self._waiting or self._running:
                ended = [cell for cell, process in self._running.items() if process.poll() is not None]
                for cell in ended:
                    bar.write(self._end(cell))
                    bar.update()
                if self.failed and not self._done:
                    self._waiting.clear()
                self._start(bar)
                time.sleep(INTERVAL)

    def _start(self, bar: Any) -> None:
        """Fill the free places; a cell that is run by an earlier comparison's process takes one, too."""
        free = self._comparison.arguments.max_parallel - len(self._running)
        for cell in self._waiting[: max(0, free)]:
            process = None if cell.finished else start(self._comparison, cell)
            if cell.finished and process is None:
                self._waiting.remove(cell)
                self._done.append(cell)
                bar.update()
            elif process is not None:
                self._waiting.remove(cell)
                self._running[cell] = process
                self._begun[cell] = time.monotonic()
            elif cell not in self._busy:
                self._busy.add(cell)
                bar.write(f"{cell.name} is still being run by a process of an earlier comparison: waiting for it")

    def _end(self, cell: Cell) -> str:
        """Book the end of a cell; a line that tells it."""
        status = self._running.pop(cell).wait()
        if cell.finished:
            self._done.append(cell)
            metric = self._comparison.arguments.metric
            evaluations = cell.evaluations(metric)
            step, minutes = max(evaluations), (time.monotonic() - self._begun[cell]) / 60
            value = number(evaluations[step][metric])
            return f"{cell.name}: {title_of(metric)} {value} at step {step:,}, {minutes:.1f} minutes"
        line = f"{cell.name} failed with exit status {status}: {cell.log}"
        if not self.failed:
            end = cell.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            line += "".join(f"\n    {each}" for each in end)
        if not self._done:
            line += "\nNo cell has come to its end yet, so no other is started."
        self.failed[cell] = status
        return line


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished, sum up; the exit status, 0 where every cell is finished."""
    argv = sys.argv[1:] if argv is None else argv
    comparison = read_arguments(argv)
    settings = keep_settings(comparison)
    cells = comparison.cells()
    if comparison.arguments.dry_run:
        for cell in cells:
            if not cell.finished:
                print(comparison.shown(cell))
        return 0
    runs = Runs(comparison)
    if comparison.arguments.max_parallel:
        try:
            runs.run()
        except KeyboardInterrupt:
            print("Interrupted; the same command goes on from here.", file=sys.stderr)
            return 130
    if not any(cell.finished for cell in cells):
        print("No cell is finished, so there is nothing to sum up.", file=sys.stderr)
        return 1
    outcome = Outcome(
        title=comparison.output_dir.name,
        metric=comparison.arguments.metric,
        reach=comparison.arguments.reach,
        cells=cells,
        failed=runs.failed,
        commands=(f"python recipes/{Path(__file__).name} {shlex.join(argv)}", comparison.shown(cells[0])),
        settings=settings,
    )
    print(f"\n{write_summary(outcome, comparison.output_dir)}\n\n{comparison.output_dir / REPORT_NAME}")
    return 0 if all(cell.finished for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())

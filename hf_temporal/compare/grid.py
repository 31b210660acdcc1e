"""The grid of a comparison over p: its cells, the command of each, and the settings that they share."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_temporal.data import argument
from hf_temporal.tables import write_json
from hf_temporal.weighting import TemporalWeighting

from .cells import Cell, is_bound, power_name
from .quantities import direction_of

SETTINGS_NAME = "comparison.json"
# Flags that no cell is given by the user, and what to use instead.
OWN = {
    "temporal_power": "--powers",
    "seed": "--seeds",
    "hub_token": "the environment's HF_TOKEN, as flags are written down",
}


@dataclass
class CompareArguments:
    """The flags of a comparison."""

    powers: list[float] = field(metadata={"help": "p of the weight t^p, 0 among them; inf: the last token alone."})
    seeds: list[int] = field(metadata={"help": "Every p runs with each of them."})
    metric: str = field(metadata={"help": "What decides, by its name in the evaluations: recall, rouge1, loss."})
    output_dir: str = field(metadata={"help": "Gets a folder for each cell, summary.md, summary.json, pictures."})
    vary: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "NAME=VALUE,VALUE,...: flags of the recipe; each combination is compared in a folder of its own.",
        },
    )
    config: Path | None = argument(None, "YAML file of the recipe.")
    accelerate_config: Path | None = argument(None, "YAML file of `accelerate launch`.")
    reach: float | None = argument(None, "Count the steps until the metric is this good, too.")
    max_parallel: int = argument(1, "Cells that run side by side on shared cores; 0: only sum up.")
    dry_run: bool = argument(False, "Print the command of each unfinished cell, run none.")

    def __post_init__(self) -> None:
        self.powers = [power + 0.0 for power in self.powers]  # −0 becomes 0.
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
            raise ValueError(
                f"reach={self.reach!r}, but of {self.metric} neither more nor less is better; accepted: another metric"
            )
        if self.max_parallel < 0:
            raise ValueError(f"max_parallel={self.max_parallel!r} is negative; accepted: 0 or more")
        for name in ("config", "accelerate_config"):
            read_yaml(name, getattr(self, name))
        self._check_vary()

    @property
    def varied(self) -> dict[str, list[str]]:
        return {flag_name(each): each.partition("=")[2].split(",") for each in self.vary}

    def _check_vary(self) -> None:
        own = {each.name for each in dataclasses.fields(self)} | OWN.keys()
        for name, values in self.varied.items():
            given = f"vary: {name}={','.join(values)}"
            if name in own:
                raise ValueError(f"vary: {name} cannot be varied; accepted: a flag that is the recipe's alone")
            if not name or "" in values:
                raise ValueError(f"{given} lacks a name or a value; accepted: NAME=VALUE,VALUE,...")
            if len(set(values)) < len(values):
                raise ValueError(f"{given} has one twice; accepted: each once")
        if len(self.varied) < len(self.vary):
            raise ValueError(f"vary={self.vary!r} has a name twice; accepted: each once, with all its values")
        folders = [folder_name(values) for values in itertools.product(*self.varied.values())]
        for folder in folders if self.vary else []:
            if folders.count(folder) > 1 or folder.strip(".") == "":
                raise ValueError(
                    f"vary={self.vary!r} makes a folder {folder!r}; "
                    "accepted: values that, joined by _, name each combination's own"
                )


@dataclass(frozen=True)
class Comparison:
    """A comparison, or the part of it that belongs to one combination of the varied values."""

    arguments: CompareArguments
    recipe: Path  # the script that every cell runs
    overrides: list[str]  # the flags of the recipe that every cell gets
    values: dict[str, str] = field(default_factory=dict)  # of this combination by name; empty for a whole comparison

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    def combinations(self) -> list[Comparison]:
        """A comparison for each combination of the varied values; this one alone where nothing is varied."""
        varied = self.arguments.varied
        if not varied:
            return [self]
        found = []
        for values in itertools.product(*varied.values()):
            folder = str(self.output_dir / folder_name(values))
            arguments = dataclasses.replace(self.arguments, vary=[], output_dir=folder)
            by_name = dict(zip(varied, values, strict=True))
            flags = [f"--{name}={value}" for name, value in by_name.items()]
            found.append(Comparison(arguments, self.recipe, [*self.overrides, *flags], by_name))
        return found

    def cells(self) -> dict[Cell, Comparison]:
        """Every cell with its combination, seed by seed, so that an interrupted comparison has some of everything."""
        combinations, arguments = self.combinations(), self.arguments
        return {
            Cell(power, seed, each.output_dir): each
            for seed in arguments.seeds
            for each in combinations
            for power in arguments.powers
        }

    def flags(self, cell: Cell) -> list[str]:
        return [
            *(["--config", str(self.arguments.config)] if self.arguments.config else []),
            *self.overrides,
            f"--temporal_power={power_name(cell.power)}",
            f"--seed={cell.seed}",
            f"--output_dir={cell.folder}",
        ]

    def command(self, cell: Cell) -> list[str]:
        """The words that follow `accelerate launch`."""
        accelerate = self.arguments.accelerate_config
        engine = ["--config_file", str(accelerate)] if accelerate else []
        return [*engine, str(self.recipe), *self.flags(cell)]

    def shown(self, cell: Cell) -> str:
        return shlex.join(["accelerate", "launch", *self.command(cell)])

    def settings(self) -> dict[str, Any]:
        """What makes a comparison the same one; p, seeds and varied values may be added later."""
        config = read_yaml("config", self.arguments.config)
        if isinstance(config, dict):
            config.pop("hub_token", None)
        settings = {
            "recipe": self.recipe.name,
            "config": config,
            "accelerate_config": read_yaml("accelerate_config", self.arguments.accelerate_config),
            "overrides": self.overrides,
            **({"vary": list(self.arguments.varied)} if self.arguments.vary else {}),
        }
        return dict(json.loads(json.dumps(settings)))


def keep_settings(comparison: Comparison) -> None:
    """Write the settings into all folders, or raise a `ValueError` where a cell there has, or is run with, others."""
    kept = {each.output_dir: each for each in (comparison, *comparison.combinations())}
    for each in kept.values():
        _check_settings(each)
    for output_dir, each in kept.items():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SETTINGS_NAME, each.settings())


def _check_settings(comparison: Comparison) -> None:
    output_dir, settings = comparison.output_dir, comparison.settings()
    path = output_dir / SETTINGS_NAME
    folders = [*output_dir.glob("p*_seed*"), *output_dir.glob("*/p*_seed*")]
    if not path.is_file() or not any(map(is_bound, folders)):
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in settings | found:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{name}={settings.get(name)!r}, but output_dir={str(output_dir)!r} holds a comparison with "
                f"{name}={found.get(name)!r}; accepted: the same settings, which continue that comparison, or another "
                "output_dir"
            )


def check_file(name: str, path: Path, accepted: str = "a YAML file") -> None:
    """Raise a `ValueError` where the file that a flag names does not exist."""
    if not path.is_file():
        raise ValueError(f"{name}={str(path)!r} is no file: there is no {path.resolve()}; accepted: {accepted}")


def read_yaml(name: str, path: Path | None) -> Any:
    """The content of the YAML file that a flag names, or a `ValueError`; None where the flag is not given."""
    if path is None:
        return None
    check_file(name, path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{name}={str(path)!r} cannot be read: {error}; accepted: a YAML file") from error


def flag_name(flag: str) -> str:
    """The name in `--flag-name=value`: flag_name."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def folder_name(values: Iterable[str]) -> str:
    """The name of the folder of a combination."""
    return "_".join(values).replace("/", "-")

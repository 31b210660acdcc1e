"""The grid of a comparison over p: what is in it, the command of each cell, the settings they share."""

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

from hf_temporal.finetuning.report import write_json
from hf_temporal.weighting import TemporalWeighting

from .cells import Cell, is_finished, is_running, power_name
from .quantities import direction_of

SETTINGS_NAME = "comparison.json"
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
    vary: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "NAME=VALUE,VALUE,...: flags of the recipe; every combination of their values is compared for "
            "itself, in a folder of its own.",
        },
    )
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
        for name in ("config", "accelerate_config"):
            if path := getattr(self, name):
                read_yaml(name, path)
        self._check_vary()

    @property
    def varied(self) -> dict[str, list[str]]:
        return {flag_name(name): values.split(",") for name, _, values in (each.partition("=") for each in self.vary)}

    def _check_vary(self) -> None:
        fields = {each.name for each in dataclasses.fields(self)}
        for name, values in self.varied.items():
            if name in fields | OWN.keys():
                raise ValueError(f"vary: {name} cannot be varied; accepted: a flag that is the recipe's alone")
            if not name or "" in values:
                raise ValueError(
                    f"vary: {name}={','.join(values)} lacks a name or a value; accepted: NAME=VALUE,VALUE,..."
                )
            if len(set(values)) < len(values):
                raise ValueError(f"vary: {name}={','.join(values)} has one twice; accepted: each once")
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
    """A recipe, and the flags of every cell; `values` are those of a single combination of what is varied."""

    arguments: CompareArguments
    recipe: Path
    overrides: list[str]
    values: dict[str, str] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    def combinations(self) -> list[Comparison]:
        """A comparison for each combination of what is varied; this one alone where nothing is."""
        varied = self.arguments.varied
        if not varied:
            return [self]
        return [
            self._combination(dict(zip(varied, values, strict=True))) for values in itertools.product(*varied.values())
        ]

    def _combination(self, values: dict[str, str]) -> Comparison:
        output_dir = str(self.output_dir / folder_name(values.values()))
        flags = [f"--{name}={value}" for name, value in values.items()]
        arguments = dataclasses.replace(self.arguments, vary=[], output_dir=output_dir)
        return Comparison(arguments, self.recipe, [*self.overrides, *flags], values)

    def cells(self) -> dict[Cell, Comparison]:
        """Each with its combination's comparison; seed by seed, so that what is done early compares everything."""
        combinations, arguments = self.combinations(), self.arguments
        return {
            Cell(power, seed, each.output_dir): each
            for seed in arguments.seeds
            for each in combinations
            for power in arguments.powers
        }

    def command(self, cell: Cell) -> list[str]:
        """What follows `accelerate launch`."""
        accelerate = self.arguments.accelerate_config
        engine = ["--config_file", str(accelerate)] if accelerate else []
        return [*engine, str(self.recipe), *self.flags(cell)]

    def flags(self, cell: Cell) -> list[str]:
        """The flags that the recipe gets."""
        config = self.arguments.config
        return [
            *(["--config", str(config)] if config else []),
            *self.overrides,
            f"--temporal_power={power_name(cell.power)}",
            f"--seed={cell.seed}",
            f"--output_dir={cell.folder}",
        ]

    def shown(self, cell: Cell) -> str:
        return shlex.join(["accelerate", "launch", *self.command(cell)])

    def settings(self) -> dict[str, Any]:
        """What makes a comparison the same one; the grid of p, seeds and varied values may grow."""
        accelerate, config = self.arguments.accelerate_config, self.arguments.config
        settings = {
            "recipe": self.recipe.name,
            "config": config and _without_token(read_yaml("config", config)),
            "accelerate_config": accelerate and read_yaml("accelerate_config", accelerate),
            "overrides": self.overrides,
            **({"vary": list(self.arguments.varied)} if self.arguments.vary else {}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def _without_token(config: Any) -> Any:
    return (
        {name: value for name, value in config.items() if name != "hub_token"} if isinstance(config, dict) else config
    )


def keep_settings(comparison: Comparison) -> None:
    """Write the settings into `output_dir`, and into that of each combination.

    Raises:
        ValueError: a cell there was finished with others, or is being run with them.
    """
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
    if not path.is_file() or not any(is_finished(folder) or is_running(folder) for folder in folders):
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
    """Check that the file exists that was given under this name.

    Raises:
        ValueError: it does not.
    """
    if not path.is_file():
        raise ValueError(f"{name}={str(path)!r} is no file: there is no {path.resolve()}; accepted: {accepted}")


def read_yaml(name: str, path: Path) -> Any:
    """The content of the YAML file that was given under this name.

    Raises:
        ValueError: there is no such file, or it is no YAML.
    """
    check_file(name, path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={str(path)!r} cannot be read: {error}; accepted: a YAML file") from error


def flag_name(flag: str) -> str:
    """Of `--flag-name=value`: flag_name."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def folder_name(values: Iterable[str]) -> str:
    """Of the combination of these values."""
    return "_".join(values).replace("/", "-")

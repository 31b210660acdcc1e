"""Arguments of a recipe: a YAML file, and flags that override it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_temporal.installed import config_path, nearest

OF_THE_TRAINER = {each.name for each in fields(Seq2SeqTrainingArguments)}


class RecipeParser(HfArgumentParser):
    """Lists the recipe's own flags first and the Trainer's after them, and tells a wrong value in one line."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
        name = settings.get("dest") or flags[0].lstrip("-")
        if name not in OF_THE_TRAINER:
            return super().add_argument(*flags, **settings)
        title = "arguments of transformers' TrainingArguments"
        group = next((each for each in self._action_groups if each.title == title), None)
        return (group or self.add_argument_group(title)).add_argument(*flags, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with argparse's message, which names the flag, and without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(kinds: Sequence[Any], argv: Sequence[str] | None = None, *, description: str | None = None) -> Any:
    """One object of each dataclass in `kinds`, from `--config` and from flags, which come last and win.

    `--config` is a YAML file or the name of a configuration of the package, such as `copying/small_llama`. Its values
    are read as if they were given as flags. `use_cpu` is true where there is no accelerator: without it, the processes
    of `accelerate launch` on a CPU would each train alone.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument(
        "--config", help="YAML file of the arguments below, or the name of one that is shipped; flags override it."
    )
    config, flags = reader.parse_known_args(argv)
    parser = RecipeParser(
        kinds,
        prog=Path(sys.argv[0]).name,
        description=description and description.partition("\n\n")[0],  # argparse makes one paragraph of it all
        usage="%(prog)s [--config FILE.yaml] [--name value ...]",
        allow_abbrev=False,
        parents=[reader],
    )
    names = [each.name for kind in kinds for each in fields(kind) if each.init]
    settings = read_yaml(config_path(config.config), names) if config.config else {}
    _check_compounds(settings, kinds)
    if "use_cpu" in names:
        parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    # the command line cannot say these, so they become the defaults that it overrides
    parser.set_defaults(**{name: value for name, value in settings.items() if _is_compound(value)})
    given = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
        if not _is_compound(value)
    ]
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*given, *flags], return_remaining_strings=True, look_for_args_file=False
        )
    except (ImportError, OSError, ValueError) as error:  # of TrainingArguments, too, and of what they look up
        raise ValueError(str(error)) from error
    for flag in unknown:
        given_name = flag.partition("=")[0]  # without the value, which may be a token
        known = nearest(given_name.lstrip("-").replace("-", "_"), names)
        raise ValueError(f"{given_name} is no argument of this recipe; the nearest is --{known}")
    return tuple(parsed)


def read_yaml(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The settings in a YAML file, whose keys are to be among `names`."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # the kinds that a YAML loader raises on a broken file have nothing in common
        raise ValueError(f"{path}: {error}; accepted: a file of lines of the form `name: value`, in UTF-8") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; accepted: lines of the form `name: value`")
    for key in settings:
        if key not in names:
            raise ValueError(f"{path}: {key!r} is no argument of this recipe; the nearest is {nearest(key, names)!r}")
    return settings


def _check_compounds(settings: dict[str, Any], kinds: Sequence[Any]) -> None:
    """Check lists, mappings and null against the types of their fields; single values are checked as flags are."""
    for kind in kinds:
        hints = get_type_hints(kind)
        for each in fields(kind):
            value = settings.get(each.name, "")
            hint = hints[each.name]
            accepted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            is_unset = value is None and each.default is None
            if _is_compound(value) and not is_unset and not any(_fits(value, one) for one in accepted):
                names = ", ".join(str(one) if get_args(one) else one.__name__ for one in accepted)
                raise ValueError(f"{each.name}={value!r}; accepted: {names}")


def _fits(value: Any, hint: Any) -> bool:
    kind, items = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if not isinstance(kind, type) or not isinstance(value, kind):
        return False
    if isinstance(value, list) and items and items[0] in (str, int, float):
        return all(isinstance(item, items[0]) for item in value)
    return True


def _is_compound(value: Any) -> bool:
    """Whether it is none of what YAML writes as a single value; a set and bytes are no values of any argument."""
    return not isinstance(value, (str, int, float, date))

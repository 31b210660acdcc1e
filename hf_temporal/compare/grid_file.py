"""A comparison's flags from a YAML file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_temporal.installed import nearest

from .grid import CompareArguments, flag_name, read_yaml

PATHS = ("recipe", "config", "accelerate_config")


def flags_of_file(argv: Sequence[str]) -> list[str]:
    """The flags with those of `--grid FILE` in front of them, but for what is given on the command line, too.

    Keys are the flags of a comparison and `recipe`. Paths are relative to the file, `output_dir` to where the command
    was typed. `vary` maps names to lists of values, `flags` the recipe's own flags to their values.

    Raises:
        ValueError: the file is no mapping, or has a key that is no flag of a comparison.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--grid", type=Path)
    grid, given = reader.parse_known_args(argv)
    if grid.grid is None:
        return list(argv)
    settings = _read(grid.grid)
    recipe = [settings.pop("recipe")] if "recipe" in settings else []
    if given and not given[0].startswith("-"):
        recipe = [given.pop(0)]
    names = {flag_name(word) for word in given if word.startswith("--")}
    flags = {name: value for name, value in (settings.pop("flags", {}) | settings).items() if name not in names}
    lists = [
        word for name, value in flags.items() if isinstance(value, list) for word in (f"--{name}", *map(_text, value))
    ]
    others = [f"--{name}={_text(value)}" for name, value in flags.items() if not isinstance(value, list)]
    return [*recipe, *lists, *others, *given]


def _read(path: Path) -> dict[str, Any]:
    settings = read_yaml("grid", path)
    own = ["recipe", "flags", *(each.name for each in fields(CompareArguments))]
    if not isinstance(settings, dict) or not isinstance(settings.get("flags", {}), dict):
        raise ValueError(f"{path} is no mapping, or its flags are none; accepted: lines of the form `name: value`")
    for name in settings:
        if name not in own:
            raise ValueError(
                f"{path}: {name!r} is no flag of a comparison; accepted: {nearest(name, own)!r}, the nearest, or a "
                "flag of the recipe under `flags`"
            )
    for name in settings.keys() & set(PATHS):
        settings[name] = os.path.relpath(path.parent / settings[name])  # as seen from here: commands are written down
    if isinstance(varied := settings.get("vary"), Mapping):
        settings["vary"] = [f"{name}={','.join(map(_text, values))}" for name, values in varied.items()]
    return settings


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""The command that compares powers p of the weight t^p."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_temporal.finetuning.report import write_json
from hf_temporal.installed import nearest

from .checks import check_cells
from .grid import OWN, CompareArguments, Comparison, check_file, flag_name, keep_settings, read_yaml
from .report import PICTURES, REPORT_NAME, write_report
from .runs import Runs
from .summary import SUMMARY_NAME, read_summary, summary_of

DESCRIPTION = "Run a recipe with every p and every seed, and test each p against p = 0."
USAGE = "%(prog)s [recipe.py | --grid FILE.yaml] [--config FILE.yaml] [--name value ...]"


def main(argv: Sequence[str] | None = None, *, program: str = "python recipes/compare_powers.py") -> int:
    """Run the cells that are not finished, write the report, and return the exit status: 0 if every cell is finished.

    Raises:
        ValueError: a flag, a file or the metric is not accepted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--redraw" for word in argv):
        return redraw(argv, program)
    comparison = read_arguments(argv, program)
    cells = comparison.cells()
    if not all(cell.finished for cell in cells):
        check_cells(comparison)
    keep_settings(comparison)
    if comparison.arguments.dry_run:
        for cell, combination in cells.items():
            if not cell.finished:
                print(combination.shown(cell))
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
    output_dir = comparison.output_dir
    summary = summary_of(comparison, f"{program} {shlex.join(argv)}", runs.failed)
    write_json(output_dir / SUMMARY_NAME, summary)
    print(f"\n{write_report(summary, output_dir)}\n\n{output_dir / REPORT_NAME}")
    return 0 if all(cell.finished for cell in cells) else 1


def redraw(argv: Sequence[str], program: str) -> int:
    """Write the report and the pictures of a summary again, and name the pictures that it lacks the data for.

    Raises:
        ValueError: the file is not a summary.
    """
    parser = argparse.ArgumentParser(prog=program, description="Write the report and pictures of a comparison again.")
    parser.add_argument("--redraw", type=Path, required=True, help="Its summary.json.")
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder to write into.")
    flags = parser.parse_args(argv)
    summary = read_summary(flags.redraw)
    print(f"{write_report(summary, flags.output_dir)}\n\n{flags.output_dir / REPORT_NAME}")
    drawn = {path.name for path in flags.output_dir.rglob("*.png")}
    if missing := [name for name in PICTURES if name not in drawn]:
        print(f"Not drawn, as {flags.redraw} lacks the data: {', '.join(missing)}")
    return 0


# ---- flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def read_arguments(argv: Sequence[str], program: str | None = None) -> Comparison:
    """Read the flags of a comparison; those it does not know are passed on to every cell.

    Raises:
        ValueError: a flag is not accepted, or is set by the grid.
    """
    parser = HfArgumentParser(
        CompareArguments,  # type: ignore[arg-type]
        prog=program,
        description=DESCRIPTION,
        usage=USAGE,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="The script that every cell runs.")
    parser.add_argument("--grid", help="YAML file of these flags, with the recipe's under `flags`; flags win.")
    parser.add_argument("--redraw", help="Write the report and pictures of this summary.json again, in output_dir.")
    arguments, rest, overrides = parser.parse_args_into_dataclasses(
        _with_grid_file(argv), return_remaining_strings=True, look_for_args_file=False
    )
    for flag in overrides:
        name = flag_name(flag)
        if flag.startswith("--") and name in OWN:
            raise ValueError(f"--{name} cannot be given to every cell; accepted: {OWN[name]}")
        if flag.startswith("--") and name in arguments.varied:
            raise ValueError(f"--{name} is varied and given to every cell, too; accepted: one of both")
    check_file("recipe", rest.recipe, "recipes/finetune_causal_lm.py or the like")
    return Comparison(arguments, rest.recipe, overrides)


def _with_grid_file(argv: Sequence[str]) -> list[str]:
    """Put the flags of `--grid FILE` in front, except those that are given on the command line, too.

    The file's keys are the flags of a comparison and `recipe`. Its paths are relative to the file, but `output_dir` is
    relative to the working directory. `vary` maps names to lists of values, `flags` the recipe's flags to values.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--grid", type=Path)
    grid, given = reader.parse_known_args(argv)
    if grid.grid is None:
        return list(argv)
    settings = _read_grid_file(grid.grid)
    recipe = [settings.pop("recipe")] if "recipe" in settings else []
    if given and not given[0].startswith("-"):
        recipe = [given.pop(0)]
    names = {flag_name(word) for word in given if word.startswith("--")}
    lists, others = [], []
    for name, value in (settings.pop("flags", {}) | settings).items():
        if name not in names and isinstance(value, list):
            lists += [f"--{name}", *map(_text, value)]
        elif name not in names:
            others.append(f"--{name}={_text(value)}")
    return [*recipe, *lists, *others, *given]


def _read_grid_file(path: Path) -> dict[str, Any]:
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
    for name in settings.keys() & {"recipe", "config", "accelerate_config"}:
        settings[name] = os.path.relpath(path.parent / settings[name])
    if isinstance(varied := settings.get("vary"), Mapping):
        settings["vary"] = [f"{name}={','.join(map(_text, values))}" for name, values in varied.items()]
    return settings


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

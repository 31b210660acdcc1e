"""The command that compares powers p of the weight t^p."""

import argparse
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_temporal.installed import nearest
from hf_temporal.tables import write_json

from .grid import OWN, CompareArguments, Comparison, check_file, flag_name, keep_settings, read_yaml
from .report import PICTURES, REPORT_NAME, write_report
from .runs import Runs
from .summary import SUMMARY_NAME, read_summary, summary_of

DESCRIPTION = "Run a recipe with every p and every seed, and test each p against p = 0."
USAGE = "%(prog)s [recipe.py | --grid FILE.yaml] [--config FILE.yaml] [--name value ...]"


def main(argv: Sequence[str] | None = None, *, program: str = "python recipes/compare_powers.py") -> int:
    """Run the cells that are not finished, write the report, and return the exit status: 0 if every cell is finished.

    A flag, a file or a metric that is not accepted is a `ValueError`.
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
    """Write the report and the pictures of a summary again, and name the pictures that it lacks the data for."""
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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def read_arguments(argv: Sequence[str], program: str | None = None) -> Comparison:
    """Read the flags of a comparison; those it does not know are passed on to every cell."""
    named: dict[str, Any] = {"prog": program, "description": DESCRIPTION, "usage": USAGE, "allow_abbrev": False}
    parser = HfArgumentParser(CompareArguments, formatter_class=HelpFormatter, **named)  # type: ignore[arg-type]
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


def check_cells(comparison: Comparison) -> None:
    """Read the flags of every combination as the recipe will read them, and look for the metric in what it measures.

    What is not accepted is a `ValueError`. A script that does not keep its dataclasses in a name that ends with
    ARGUMENTS is not checked.
    """
    if not (kinds := _arguments_of(comparison.recipe)):
        return
    for combination in comparison.combinations():
        cell = next(iter(combination.cells()))
        _check_metric(combination.arguments.metric, _parsed(kinds, combination.flags(cell)))


def _arguments_of(recipe: Path) -> tuple[Any, ...]:
    """The dataclasses of a script's flags; none of a script that would do something when it is imported."""
    text = recipe.read_text(encoding="utf-8")
    if not re.search(r"ARGUMENTS\b", text) or '__name__ == "__main__"' not in text:
        return ()
    found = {name: value for name, value in runpy.run_path(str(recipe)).items() if name.endswith("ARGUMENTS")}
    return found[min(found, key=len)]  # ARGUMENTS itself rather than those that it is made of


def _parsed(kinds: tuple[Any, ...], flags: list[str]) -> dict[str, Any]:
    """The arguments by name.

    Of the training arguments only the temporal fields are checked: the rest asks for the device of the cells, which
    may be on another machine.
    """
    from hf_temporal.finetuning.configuration import parse

    *others, training = kinds
    unchecked = type(training.__name__, (training,), {"__post_init__": training.validate_temporal_fields})
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            parsed = parse((*others, unchecked), flags)
    except SystemExit:  # argparse has written its usage and, in the last line, the error
        raise ValueError(message.getvalue().strip().rpartition("error: ")[2]) from None
    return {name: value for each in parsed for name, value in vars(each).items()}


def _check_metric(metric: str, arguments: dict[str, Any]) -> None:
    from hf_temporal.finetuning.functional import LearnedFunctional
    from hf_temporal.finetuning.tasks import LOSSES, Copying, LanguageModeling, Summarization, Task

    tasks: dict[str, type[Task]] = {
        "summarization": Summarization,
        "copying": Copying,
        "language_modeling": LanguageModeling,
    }
    task = tasks[arguments["task"]] if "task" in arguments else LearnedFunctional
    scores = {*task.metrics, *(["rougeLsum"] if task is Summarization else [])} - LOSSES.keys()
    known = {*scores, *LOSSES, "grad_norm", "grad_norm_spread"} - {"temporal_loss"}
    plain = re.sub("_(low|high)$", "", metric)
    if plain not in known:
        raise ValueError(
            f"metric={metric!r} is not measured; accepted: {', '.join(sorted(known))}; "
            f"the nearest is {nearest(metric, known)!r}"
        )
    if plain in scores and arguments.get("predict_with_generate") is False:
        raise ValueError(f"metric={metric!r} is read off generated texts; accepted: with --predict_with_generate")
    if not arguments["do_eval"] and arguments["eval_strategy"] == "no":
        raise ValueError(f"metric={metric!r}, but do_eval=False measures nothing; accepted: with --do_eval")

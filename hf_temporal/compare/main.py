"""The command that compares powers p of the weight t^p."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import HfArgumentParser

from .cells import Cell
from .checks import check_cells
from .grid import OWN, CompareArguments, Comparison, check_file, flag_name, keep_settings
from .grid_file import flags_of_file
from .pictures import PICTURES
from .report import REPORT_NAME, write_report
from .runs import Runs
from .summary import SUMMARY_NAME, read_summary, summary_of, write_summary

DESCRIPTION = "Run a recipe with every p and every seed, and test each p against p = 0."
USAGE = "%(prog)s [recipe.py | --grid FILE.yaml] [--config FILE.yaml] [--name value ...]"


def main(argv: Sequence[str] | None = None, *, program: str = "python recipes/compare_powers.py") -> int:
    """Run what is not finished, sum up; the exit status, 0 where every cell is finished.

    Args:
        argv: the flags; those of the process if None.
        program: what they followed, which the report tells.

    Raises:
        ValueError: a flag is out of what is accepted.
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
    findings = sum_up(comparison, f"{program} {shlex.join(argv)}", runs.failed)
    print(f"\n{findings}\n\n{comparison.output_dir / REPORT_NAME}")
    return 0 if all(cell.finished for cell in cells) else 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def read_arguments(argv: Sequence[str], program: str | None = None) -> Comparison:
    """Flags of the comparison, the recipe, and the flags that every cell gets.

    Raises:
        ValueError: one is out of what is accepted, or belongs to the grid.
    """
    argv = flags_of_file(argv)
    parser = HfArgumentParser(
        CompareArguments,  # type: ignore[arg-type]
        prog=program,
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        usage=USAGE,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="The script that every cell runs.")
    parser.add_argument("--grid", help="YAML file of these flags, and under `flags` of the recipe's; others win.")
    parser.add_argument("--redraw", help="A summary.json: make its report and pictures again, in output_dir.")
    arguments, rest, overrides = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    for flag in overrides:
        name = flag_name(flag)
        if flag.startswith("--") and name in OWN:
            raise ValueError(f"--{name} cannot be given to every cell; accepted: {OWN[name]}")
        if flag.startswith("--") and name in arguments.varied:
            raise ValueError(f"--{name} is varied and given to every cell, too; accepted: one of both")
    check_file("recipe", rest.recipe, "recipes/finetune_causal_lm.py or the like")
    return Comparison(arguments, rest.recipe, overrides)


def sum_up(comparison: Comparison, command: str, failed: Mapping[Cell, int]) -> str:
    """Write the summary and its report; the report's words and table."""
    summary = summary_of(comparison, command, failed)
    write_summary(summary, comparison.output_dir / SUMMARY_NAME)
    return write_report(summary, comparison.output_dir)


def redraw(argv: Sequence[str], program: str) -> int:
    """Make the report and the pictures of a summary again; tell which pictures it lacks the data for.

    Raises:
        ValueError: the file is no summary.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Make the report and the pictures of a comparison again."
    )
    parser.add_argument("--redraw", type=Path, required=True, help="Its summary.json.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to write them.")
    flags = parser.parse_args(argv)
    summary = read_summary(flags.redraw)
    print(f"{write_report(summary, flags.output_dir)}\n\n{flags.output_dir / REPORT_NAME}")
    drawn = {path.name for path in flags.output_dir.rglob("*.png")}
    if missing := [name for name in PICTURES if name not in drawn]:
        print(f"Not drawn, as {flags.redraw} lacks the data: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

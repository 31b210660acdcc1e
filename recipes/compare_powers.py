r"""Compare powers p of the weight t^p: a recipe with every p and every seed, each p tested against p = 0.

Thirty runs of a minute or two, which answer whether p helps a small Llama to copy:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 0.5 1 2 4 10 --seeds 0 1 2 3 4 --metric recall --reach 0.98 --output_dir outputs/compare_copying

A look at the whole way in about two minutes:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 --seeds 0 1 --metric recall --output_dir outputs/compare_copying_look --max_steps 2

Does it depend on the blank and the learning rate? Every combination is compared for itself, all of them in one table:

    python recipes/compare_powers.py recipes/finetune_causal_lm.py --config recipes/configs/copying/small_llama.yaml \
        --powers 0 1 4 --seeds 0 1 2 --metric recall --reach 0.98 --output_dir outputs/compare_copying_blanks \
        --vary blank_length=50,100 learning_rate=3e-4,1e-3

Every flag that is not one of this script goes to every run. Each is what its own `accelerate launch` command is, but
without `--accelerate_config` the runs of one process on the CPU make their imports once for all. The same command
continues a comparison that was interrupted: runs that are finished are kept. It writes `summary.md`, `summary.json`
and three pictures; with `--vary` into a folder for each combination, with a summary of all and one picture above them.

With `--dry_run` it prints one `accelerate launch` command per run, for a cluster that sees the same folder; once its
jobs have ended, the command without `--dry_run` finds the finished runs there, and makes up for those that failed:

    python recipes/compare_powers.py [as above] --dry_run | while IFS= read -r line; do sbatch --wrap "$line"; done
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import HfArgumentParser

from hf_temporal.compare.cells import Cell
from hf_temporal.compare.grid import OWN, CompareArguments, Comparison, flag_name, keep_settings
from hf_temporal.compare.overview import Part, write_overview
from hf_temporal.compare.report import REPORT_NAME, Outcome, write_summary
from hf_temporal.compare.runs import Runs
from hf_temporal.hub.privacy import without_tokens


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
        name = flag_name(flag)
        if flag.startswith("--") and name in OWN:
            raise ValueError(f"--{name} cannot be given to every cell; accepted: {OWN[name]}")
        if flag.startswith("--") and name in arguments.varied:
            raise ValueError(f"--{name} is varied and given to every cell, too; accepted: one of both")
    if not rest.recipe.is_file():
        raise ValueError(
            f"recipe={str(rest.recipe)!r} is no file; accepted: recipes/finetune_causal_lm.py or the like"
        )
    return Comparison(arguments, rest.recipe, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished, sum up; the exit status, 0 where every cell is finished."""
    argv = sys.argv[1:] if argv is None else argv
    comparison = read_arguments(argv)
    keep_settings(comparison)
    cells = comparison.cells()
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
    command = f"python recipes/{Path(__file__).name} {shlex.join(argv)}"
    findings = sum_up(comparison, command, runs.failed)
    print(f"\n{findings}\n\n{comparison.output_dir / REPORT_NAME}")
    return 0 if all(cell.finished for cell in cells) else 1


def sum_up(comparison: Comparison, command: str, failed: Mapping[Cell, int]) -> str:
    """Write the summary of each combination and, where there are several, the one above; its words and table."""
    if not comparison.arguments.vary:
        return write_summary(outcome_of(comparison, command, failed), comparison.output_dir).words
    parts = []
    for each in comparison.combinations():
        outcome = outcome_of(each, command, failed)
        is_begun = any(cell.finished for cell in outcome.cells)
        parts.append(Part(each.values, outcome, write_summary(outcome, each.output_dir).decisive if is_begun else ()))
    return write_overview(outcome_of(comparison, command, failed), parts, comparison.output_dir)


def outcome_of(comparison: Comparison, command: str, failed: Mapping[Cell, int]) -> Outcome:
    """The comparison as it stands."""
    cells = comparison.cells()
    first, of_combination = next(iter(cells.items()))
    return Outcome(
        title=comparison.output_dir.name,
        metric=comparison.arguments.metric,
        reach=comparison.arguments.reach,
        cells=list(cells),
        failed=failed,
        commands=(without_tokens(command), without_tokens(of_combination.shown(first))),
        settings=comparison.settings(),
    )


if __name__ == "__main__":
    sys.exit(main())

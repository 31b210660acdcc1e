r"""Score the models that comparisons have trained at several lengths: length generalization, without another training.

Every run of `recipes/compare_powers.py` leaves its model in its folder. On the task that it was trained for each is
scored here with a blank that is 1, 2 and 4 times as long. Three models on selective copying and on digits, the
trainings first, which `memory_tasks.yaml` may have run already with more models:

    GRID="recipes/compare_powers.py --grid recipes/laboratory/comparisons/memory_tasks.yaml"
    DIGITS="--config recipes/configs/copying/small_attention.yaml"
    MODELS="--vary model_type=llama,memory_attention,memory_state_space"
    FALLING="--powers 0 --temporal_power_schedule linear --temporal_power_start 10"
    python $GRID $MODELS
    python $GRID $MODELS $FALLING --output_dir outputs/memory_selective_falling
    python $GRID $MODELS $DIGITS --output_dir outputs/memory_digits
    python $GRID $MODELS $DIGITS $FALLING --output_dir outputs/memory_digits_falling

    python recipes/laboratory/recall_at_lengths.py outputs/memory_selective outputs/memory_selective_falling \
        outputs/memory_digits outputs/memory_digits_falling --output recipes/results/memory_lengths.json
    python recipes/laboratory/recall_at_lengths.py --redraw recipes/results/memory_lengths.json

The table has, for each task, model and weighting, the mean recall over the runs that reached 0.98 at an evaluation in
training, at each length. The differences from p = 0 are those of the seeds that reached it with both, with 95 % t
intervals.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from transformers import EvalPrediction

from hf_temporal.compare.cells import power_name
from hf_temporal.compare.quantities import number, paired_difference
from hf_temporal.data.copying import FORMS, CopyingArguments, CopyScores
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.finetuning.report import RESULTS_NAME, load_evaluations
from hf_temporal.model.undisturbed import undisturbed
from hf_temporal.tables import environment, markdown, write_json

SETTINGS_NAME = "run.json"
REACH = 0.98
BATCH = 64
USUAL = "p = 0"
TOLERANCE = 0.01  # of recall: an argmax may change with the batch


def measured(folder: Path, factors: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The `task`, `model`, `column`, `seed`, `reached` and `recall` by factor of each finished run in a folder.

    Raises:
        ValueError: There is none; a run is of another task than copying, or of a form that is generated; a model does
            not recall at the length of its training what its own last evaluation says.
    """
    runs = [path.parent for path in sorted(folder.rglob(SETTINGS_NAME)) if (path.parent / RESULTS_NAME).is_file()]
    if not runs:
        raise ValueError(f"{str(folder)!r} holds no finished run; accepted: the output_dir of a comparison")
    for run in runs:
        settings = json.loads((run / SETTINGS_NAME).read_text(encoding="utf-8"))
        if settings.get("task") != "copying" or FORMS[settings["copying_form"]].generates:
            raise ValueError(f"{str(run)!r} is no copying whose answers are read off the rows; accepted: such a run")
        arguments = CopyingArguments(**{each.name: settings[each.name] for each in fields(CopyingArguments)})
        count = settings["max_eval_samples"]
        recalls = recall_at(run, arguments, factors, count)
        evaluated = [each["metrics"]["eval_recall"] for each in load_evaluations(run)]
        if abs(recalls.get(arguments.eval_length_factor, evaluated[-1]) - evaluated[-1]) > TOLERANCE:
            raise ValueError(f"{str(run)!r} recalls {recalls}, and {evaluated[-1]} in its last evaluation")
        yield {
            "task": FORMS[arguments.copying_form].title.format(**arguments.settings),
            "model": settings["model_type"],
            "column": column_of(settings),
            "seed": settings["seed"],
            "reached": max(evaluated) >= REACH,
            "recall": {str(factor): recall for factor, recall in recalls.items()},
        }


def recall_at(run: Path, arguments: CopyingArguments, factors: Sequence[int], count: int) -> dict[int, float]:
    """The recall of a trained model with so many times the blank, on the first validation examples, by factor."""
    model, tokenizer = load_causal_lm(ModelArguments(model_name_or_path=str(run)))
    found = {}
    for factor in factors:
        at = replace(arguments, eval_length_factor=factor).held_out
        form = FORMS[at.copying_form]
        examples: Any = [*form(at, split="validation", size=count, seed=0, is_encoder_decoder=False)]
        batches = DataLoader(examples, batch_size=BATCH, collate_fn=as_tensors)
        with undisturbed(model):
            answers = torch.cat([model(**batch, use_cache=False).logits.argmax(-1) for batch in batches]).numpy()
        labels = [each["labels"] for each in examples]
        found[factor] = CopyScores(tokenizer, at)(EvalPrediction(answers, labels))["recall"]  # type: ignore[arg-type]
    return found


def as_tensors(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """A batch of equally long rows, without labels."""
    return dict(default_collate([{name: torch.tensor(row[name]) for name in row if name != "labels"} for row in rows]))


def column_of(settings: Mapping[str, Any]) -> str:
    """How a run is weighted: p = 4, p = 10 → 0 and the like."""
    power, mixture = power_name(settings["temporal_power"]), settings["temporal_mixture"]
    constant = settings["temporal_power_schedule"] == "constant"
    start = "" if constant else f"{power_name(settings['temporal_power_start'])} → "
    return f"p = {start}{power}" + (f", λ = {mixture:g}" if mixture < 1 else "")


def tables(runs: Sequence[Mapping[str, Any]], factors: Sequence[int]) -> str:
    """A Markdown table for each task, with a row for each model and weighting."""
    head = ["model", "weights", f"reached {REACH:g}", *(f"{each} L" for each in factors)]
    head += [f"{each} L against {USUAL}" for each in factors]
    paragraphs = []
    for task in dict.fromkeys(run["task"] for run in runs):
        lines = [head]
        for model in dict.fromkeys(run["model"] for run in runs if run["task"] == task):
            by_column: dict[str, list[Any]] = {}
            for run in runs:
                if (run["task"], run["model"]) == (task, model):
                    by_column.setdefault(run["column"], []).append(run)
            usual = _by_seed(by_column.get(USUAL, []), factors)
            for column, each in by_column.items():
                found = _by_seed(each, factors)
                means = [_mean(by_seed) for by_seed in found.values()]
                against = [_difference(found[factor], usual[factor]) for factor in factors if column != USUAL]
                cells = [*means, *(against or [""] * len(factors))]
                lines.append([model, column, f"{len(found[factors[0]])} of {len(each)}", *cells])
        paragraphs.append(f"## {task}\n\n{markdown(lines)}")
    return "\n\n".join(paragraphs)


def _by_seed(runs: Sequence[Mapping[str, Any]], factors: Sequence[int]) -> dict[int, dict[int, float]]:
    """The recalls of the runs that reached the goal, by factor, then by seed."""
    return {factor: {run["seed"]: run["recall"][str(factor)] for run in runs if run["reached"]} for factor in factors}


def _mean(by_seed: Mapping[int, float]) -> str:
    return number(sum(by_seed.values()) / len(by_seed)) if by_seed else "–"


def _difference(values: Mapping[int, float], usual: Mapping[int, float]) -> str:
    found = paired_difference(values, usual)
    if found.difference is None:
        return "–"
    interval = f" [{', '.join(map(number, found.interval))}]" if found.interval else ""
    return f"{number(found.difference)}{interval}, {len(found.seeds)} seeds"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or read what was measured, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="The output_dir of each comparison.")
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 2, 4], help="Times the length of the training.")
    parser.add_argument("--output", type=Path, help="The JSON file to write.")
    parser.add_argument("--redraw", type=Path, help="A file of --output, in the place of the folders.")
    given = parser.parse_args(argv)
    if bool(given.folders) == bool(given.redraw):
        parser.error("accepted: either folders or --redraw with a file")
    if given.redraw:
        content = json.loads(given.redraw.read_text(encoding="utf-8"))
    else:
        runs = [run for folder in given.folders for run in measured(folder, given.factors)]
        content = {"reach": REACH, "factors": given.factors, "environment": environment(), "runs": runs}
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output, content, line_by_line="runs")
    print(tables(content["runs"], content["factors"]))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"recall_at_lengths.py: {error}")

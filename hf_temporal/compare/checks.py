"""The flags of the cells and the metric, checked before any cell is started."""

from __future__ import annotations

import io
import re
import runpy
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from hf_temporal.installed import nearest

from .grid import Comparison


def check_cells(comparison: Comparison) -> None:
    """Read the flags of every combination as the recipe will read them, and look for the metric in what it measures.

    A script that does not keep its dataclasses in a name that ends with ARGUMENTS is not checked.

    Raises:
        ValueError: a flag, its value or the metric is not accepted.
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
    kinds: tuple[Any, ...] = found[min(found, key=len)]  # ARGUMENTS itself rather than those that it is made of
    return kinds


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

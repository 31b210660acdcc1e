r"""What it takes to start: the import of `hf_temporal`, and each recipe up to its first training step.

    python recipes/benchmarks/startup.py --output recipes/results/startup.json

takes some minutes. A few seconds, the imports alone:

    python recipes/benchmarks/startup.py --rounds 1 --recipe_rounds 0

Fresh processes take turns, in alternating order. The first of each is not timed: it warms up what is cached, bytecode
included. What `hf_temporal` adds to `from transformers import Trainer` is measured inside one process, since two of
them differ by more than that; both whole processes stand beside it.

A recipe is its command without evaluation and with one step, into a folder of its own, timed until the loss of that
step is printed: that of `make demo`, and one of each other kind that needs no model hub. Other arguments are passed
on to the recipes, behind their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_temporal.finetuning.tables import environment, spread, table, write

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINER, OURS = "from transformers import Trainer", "import hf_temporal"
ADDED = "import time; {trainer}; start = time.perf_counter(); {ours}; print(time.perf_counter() - start)"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
RECIPES = {
    "summarization/smollm2_lora_docstrings": "finetune_causal_lm",  # the demo
    "copying/smollm2_lora": "finetune_causal_lm",
    "copying/small_llama": "finetune_causal_lm",
    "copying/small_t5": "finetune_seq2seq",
    "memory/linear_functional": "train_functional",
}
ONE_STEP = [
    "--do_eval", "false", "--eval_strategy", "no", "--max_steps", "1", "--logging_steps", "1",
    "--report_to", "tensorboard",
]  # fmt: skip
FIRST_LOSS = "'loss':"
COLUMNS = ["what", "seconds", "noise", "fastest"]


def child_environment() -> dict[str, str]:
    """The environment, with bytecode written and no look at the Hub."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """The process, in the repository's folder; what it prints can be read."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=child_environment(),
        errors="replace",
    )


def whole(code: str) -> float:
    """Seconds of a process that runs `code`."""
    begin = time.perf_counter()
    _finish(start([sys.executable, "-c", code]), [])
    return time.perf_counter() - begin


def added() -> float:
    """Seconds of `import hf_temporal` where `Trainer` is imported."""
    return float(_finish(start([sys.executable, "-c", ADDED.format(trainer=TRAINER, ours=OURS)]), []))


def launched() -> float:
    """Seconds in which `accelerate launch` runs a script that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "nothing.py"
        script.touch()
        begin = time.perf_counter()
        _finish(start([*LAUNCH, str(script)]), [])
        return time.perf_counter() - begin


def first_step(config: str, more: Sequence[str]) -> float:
    """Seconds from a recipe's command to the end of its first training step."""
    recipe = [f"recipes/{RECIPES[config]}.py", "--config", f"recipes/configs/{config}.yaml", *ONE_STEP]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = start([*LAUNCH, *recipe, "--output_dir", f"{folder}/run", *more])
        assert process.stdout is not None
        seconds, lines = None, []
        for line in process.stdout:
            lines.append(line)
            if FIRST_LOSS in line:
                seconds = time.perf_counter() - begin
                break
        _finish(process, lines)
        if seconds is None:
            raise RuntimeError(f"{config} logged no loss:\n{''.join(lines)[-4000:]}")
        return seconds


def _finish(process: subprocess.Popen[str], lines: list[str]) -> str:
    """What a process printed from here on, once it has ended.

    Raises:
        RuntimeError: with a code other than 0.
    """
    rest, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{(''.join(lines) + rest)[-4000:]}")
    return rest


def measure(what: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, Any]]:
    """A row for each: median, noise, fastest."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(rounds + 1 if rounds else 0):
        for name in list(what)[:: 1 if turn % 2 else -1]:
            found = what[name]()
            if turn:
                seconds[name].append(found)
    return [
        {
            "what": name,
            "seconds": statistics.median(mine),
            "noise": spread(mine),
            "fastest": min(mine),
            "all_seconds": mine,
        }
        for name, mine in seconds.items()
        if mine
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=7, help="of imports")
    parser.add_argument("--recipe_rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings, more = parser.parse_known_args(arguments)
    results: dict[str, Any] = {
        "benchmark": "startup",
        **environment(),
        "settings": {"rounds": settings.rounds, "recipe_rounds": settings.recipe_rounds, "passed on": more},
        "rows": [],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    imports = {
        f"{TRAINER}, a process": lambda: whole(TRAINER),
        f"{TRAINER}; {OURS}, a process": lambda: whole(f"{TRAINER}; {OURS}"),
        f"{OURS}, behind it": added,
    }
    recipes: dict[str, Callable[[], float]] = {"accelerate launch, nothing": launched}
    recipes |= {f"first step of {config}": partial(first_step, config, more) for config in RECIPES}
    for what, rounds in ((imports, settings.rounds), (recipes, settings.recipe_rounds)):
        rows = measure(what, rounds)
        print(table(rows, COLUMNS), flush=True)
        results["rows"] += rows
        write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

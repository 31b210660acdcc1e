"""Where the time of a recipe's command goes, from its first import to its last line.

    python recipes/benchmarks/profile_recipe.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --output_dir outputs/profiled_docstrings

Arguments are those of finetune_causal_lm.py, which runs under `cProfile`, without the seconds of `accelerate launch`.
"""

import cProfile
import pstats
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from hf_temporal.tables import markdown

SCRIPT = Path(__file__).resolve().parents[1] / "finetune_causal_lm.py"
IMPORTS = "imports, also those within other parts"
PARTS = {  # by the functions that take the time; but for imports none calls another: end of the file's name, name
    "model and adapter": [("finetuning/models.py", "load_causal_lm"), ("finetuning/adapters.py", "add_adapter")],
    "data, from the cache": [("data/summarization.py", "load_pairs"), ("finetuning/tasks.py", "encode")],
    "a trial of the model's loss and attention": [
        ("model/model_loss.py", "read_model_loss"),
        ("padding_free.py", "switch_attention"),
    ],
    "training: batches and their weights": [("hf_temporal/trainer.py", "get_batch_samples")],
    "training: forward and backward pass": [("transformers/trainer.py", "training_step")],
    "training: clipping and optimizer": [
        ("transformers/trainer.py", "_clip_grad_norm"),
        ("accelerate/optimizer.py", "step"),
    ],
    "checkpoints": [("transformers/trainer.py", "_save_checkpoint")],
    "evaluation: losses": [("hf_temporal/evaluation_hooks.py", "evaluation_loop")],
    "evaluation: generation": [("finetuning/generation.py", "generate_completions")],
    "evaluation: ROUGE": [("data/summarization.py", "score")],
    "pictures, card, last model": [("finetuning/run.py", "publish")],
    IMPORTS: [("<frozen importlib._bootstrap>", "_find_and_load")],
}
NEVER = "never called"  # by this run, or under that name


def main(arguments: list[str]) -> None:
    """Run the recipe and print a table."""
    whole, parts = profiled(arguments)
    print(f"\n{table(whole, parts)}")


def profiled(arguments: list[str]) -> tuple[float, dict[str, float | None]]:
    """Run the recipe: the seconds that it took, and those of each part, None where no function of it was called."""
    profile = cProfile.Profile()
    sys.argv = [str(SCRIPT), *arguments]
    start = time.perf_counter()
    with profile:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    whole = time.perf_counter() - start
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    parts: dict[str, float | None] = {}
    for part, functions in PARTS.items():
        calls = [
            [found[3] for (file, _, name), found in stats.items() if file.endswith(end) and name == asked]
            for end, asked in functions
        ]
        parts[part] = sum(max(taken, default=0) for taken in calls) if any(calls) else None
    return whole, parts


def table(whole: float, parts: dict[str, float | None]) -> str:
    """Seconds and share of each part, of all else and of the whole, and of imports by themselves, in Markdown."""
    disjoint = {part: seconds for part, seconds in parts.items() if part != IMPORTS}
    rest = whole - sum(filter(None, disjoint.values()))
    rows = {**disjoint, "all else": rest, "whole": whole, IMPORTS: parts[IMPORTS]}
    lines = [
        [part, f"{seconds or 0:.1f}", NEVER if seconds is None else f"{seconds / whole:.1%}"]
        for part, seconds in rows.items()
    ]
    return markdown([["part", "seconds", "share"], *lines])


if __name__ == "__main__":
    main(sys.argv[1:])

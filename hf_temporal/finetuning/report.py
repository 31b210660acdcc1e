"""The results of a run: evaluations in a file, a table and samples before and after, pictures, and the card."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_temporal.hub.model_card import CARD_NAME, TrainingRun, add_temporal_section
from hf_temporal.tables import markdown, write_json

EVALUATIONS_NAME = "evaluations.json"
RESULTS_NAME = "all_results.json"
RECALL_NAME = "recall_by_position.png"
MEMORY_NAME = "memory.png"
SAMPLES = 5

Metrics = dict[str, tuple[str, int]]  # name in the logs: title, decimals
Evaluation = dict[str, Any]


def save_evaluation(output_dir: Path, evaluation: Evaluation) -> None:
    """Add an evaluation to `evaluations.json`, in place of any of its step or a later one.

    `{"evaluations": [{"step": 0, "metrics": {...}, "generated": [...], "references": [...]}, ...]}`
    """
    earlier = [each for each in load_evaluations(output_dir) if each["step"] < evaluation["step"]]
    write_json(output_dir / EVALUATIONS_NAME, {"evaluations": [*earlier, evaluation]}, line_by_line="evaluations")


def load_evaluations(output_dir: Path) -> list[Evaluation]:
    """The evaluations of a run in the order of their steps."""
    path = output_dir / EVALUATIONS_NAME
    return [*json.loads(path.read_text(encoding="utf-8"))["evaluations"]] if path.is_file() else []


def save_results(output_dir: Path, logs: list[dict[str, float]]) -> None:
    """Write the last evaluation's metrics and the training's into `all_results.json`, which closes the run."""
    path = output_dir / RESULTS_NAME
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # of a run that is only reported
    last = [each["metrics"] for each in load_evaluations(output_dir)[-1:]]
    for found in [*(log for log in logs if "train_runtime" in log), *last]:
        results |= found
    write_json(path, dict(sorted(results.items())))


def save_divergence(output_dir: Path, last_step: int) -> None:
    """Close a run that ended early with weights that are not finite: its evaluation at the last step is all NaN."""
    for last in load_evaluations(output_dir)[-1:]:
        save_evaluation(output_dir, {"step": last_step, "metrics": dict.fromkeys(last["metrics"], math.nan)})
        save_results(output_dir, [])


def first_and_last(output_dir: Path) -> list[Evaluation]:
    """The first evaluation of a run and, if there are more, its last."""
    evaluations = load_evaluations(output_dir)
    return evaluations[:1] + evaluations[1:][-1:]


def before_and_after(output_dir: Path, metrics: Metrics) -> dict[str, float | tuple[float, float]]:
    """The `metrics` of the first and the last evaluation, by their names in the logs; empty where there are none."""
    shown = [each["metrics"] for each in first_and_last(output_dir)]
    names = [f"eval_{name}" for name in metrics]
    if len(shown) == 2:
        return {name: (shown[0][name], shown[1][name]) for name in names if name in shown[0].keys() & shown[1].keys()}
    return {name: found[name] for found in shown for name in names if name in found}


def report(output_dir: Path, metrics: Metrics) -> str:
    """The first and the last evaluation in Markdown: a table of `metrics`, with 95 % intervals if any, and samples."""
    shown = first_and_last(output_dir)
    rows = [["", *(f"step {each['step']}" for each in shown)]]
    for name, (title, decimals) in metrics.items():
        cells = [_cell(each["metrics"], f"eval_{name}", decimals) for each in shown]
        rows += [[title, *cells]] if any(cells) else []
    return f"{markdown(rows)}\n\n{samples(shown)}".rstrip() if shown else ""


def _cell(metrics: dict[str, float], name: str, decimals: int) -> str:
    if name not in metrics:
        return ""
    ends = [metrics[end] for end in (f"{name}_low", f"{name}_high") if end in metrics]
    interval = f" [{', '.join(f'{end:.{decimals}f}' for end in ends)}]" if ends else ""
    return f"{metrics[name]:.{decimals}f}{interval}"


def samples(evaluations: list[Evaluation]) -> str:
    """The first references, each above the answers in every evaluation."""
    lines = []
    for index, reference in enumerate(evaluations[-1].get("references", [])[:SAMPLES] if evaluations else []):
        lines.append(f"{index + 1}. reference: {_one_line(reference)}")
        lines += [f"   - step {each['step']}: {_one_line(each['generated'][index])}" for each in evaluations]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def draw_records(output_dir: Path) -> None:
    """Draw recall by position, and the model's memory function, if the first and the last evaluation recorded any."""
    shown = first_and_last(output_dir)
    recalls, memories = (
        {f"step {each['step']}": each[name] for each in shown if name in each}
        for name in ("recall_by_position", "memory")
    )
    if recalls or memories:
        from hf_temporal.plots import plot_memory, plot_recall_by_position  # matplotlib takes its time

        if recalls:
            plot_recall_by_position(recalls, output_dir / RECALL_NAME)
        if memories:
            plot_memory(memories, shown[-1]["target_memory"], output_dir / MEMORY_NAME)


@dataclass(frozen=True)
class Card:
    """A model card: what the model does, how to use it, samples, and the section on how it was trained."""

    name: str
    summary: str
    usage: str
    library: str
    pipeline_tag: str
    run: TrainingRun

    def save(self, folder: Path) -> None:
        data = ModelCardData(
            library_name=self.library,
            pipeline_tag=self.pipeline_tag,
            tags=[self.pipeline_tag],
            base_model=self.run.base_model,
            model_name=self.name,
        )
        answers = samples(first_and_last(folder))
        held_out = f"\n\n## Answers to held-out examples\n\n{answers}" if answers else ""
        if (folder / RECALL_NAME).is_file():
            held_out += f"\n\n![Recall by position among the copied tokens]({RECALL_NAME})"
        text = f"# {self.name}\n\n{self.summary}\n\n## Use\n\n```python\n{self.usage}\n```{held_out}\n"
        (folder / CARD_NAME).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
        add_temporal_section(folder, self.run)

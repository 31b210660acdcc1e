"""The model card's section on temporal weighting: what was trained how, what came of it, whom to cite."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from hf_temporal import __version__
from hf_temporal.evaluation import evaluation_profiles
from hf_temporal.weighting import TemporalWeighting

from .privacy import CARD_NAME, hub_id, last_component, public_card, without_private

logger = logging.get_logger(__name__)

PICTURE_NAME = "loss_by_position.png"
TAGS = ("hf-temporal", "arxiv:2307.11462")
HEADING = "## Temporal weighting"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets")
CITATION = (
    (Path(__file__).parent / "citation.bib").read_text(encoding="utf-8").replace("VERSION", __version__).rstrip()
)
ORIGIN_MEANINGS = {
    "target": "t counts the target tokens of a document",
    "sequence": "t is the token's place in its document, prompt included",
    "turn": "t starts at 1 again with every turn",
}
NORMALIZATION_MEANINGS = {
    "sequence": "weights have mean 1 over the target tokens of each document",
    "batch": "the loss is divided by the sum of the weights of the batch",
    "tokens": "the loss is divided by the number of target tokens of the batch",
}

_SPEED = re.compile(r"_(runtime|per_second|preparation_time)$")
_BEGIN, _END = "<!-- hf_temporal: begin -->", "<!-- hf_temporal: end -->"
_BLANK = "\n\n"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"


@dataclass(frozen=True)
class TrainingRun:
    """What a model card says of a run; what is not given is left out."""

    weighting: TemporalWeighting  # at its final power
    metrics: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)  # one value, or (before, after)
    command: str | None = None
    task: str | None = None  # the Hub's identifier; with `dataset`, the results go into the model index
    dataset: str | None = None  # its Hub id, or a name
    data: str | None = None  # a sentence on the data
    data_hash: str | None = None  # sha256 of the examples
    seed: int | None = None
    data_versions: Mapping[str, str] = field(default_factory=dict)  # of the packages that the data were made from
    schedule: str = "constant"  # of p, from `power_start` over `power_warmup_ratio` of the steps
    power_start: float = 0.0
    power_warmup_ratio: float = 1.0
    base_model: str | None = None  # its Hub id, which replaces its folder in the card; or that folder
    base_model_note: str | None = None  # a sentence on where those weights come from
    picture: str | None = None  # the name of one in the card's folder
    hardware: str = field(default_factory=_hardware)
    license: str | None = None  # the Hub's identifier; unless given, the card keeps its own
    effective_sample_size: float | None = None  # (Σw)²/Σw² as a share of the target tokens, as last logged

    @classmethod
    def of(cls, trainer: Any, **known: Any) -> TrainingRun:
        """What a `TemporalWeightTrainer` knows of itself: weighting, schedule, model, seed and what it last logged.

        The fields in `known` replace these, unless they are None.
        """
        logged = {name: value for logs in trainer.state.log_history for name, value in logs.items()}
        own = {
            "weighting": trainer.weighting,
            "metrics": {
                name: value
                for name, value in logged.items()
                if name.startswith("eval_") and isinstance(value, int | float) and not _SPEED.search(name)
            },
            "seed": trainer.args.seed,
            "base_model": getattr(getattr(trainer.model, "config", None), "_name_or_path", None) or None,
            "effective_sample_size": logged.get("effective_sample_size"),
            "schedule": getattr(trainer.args, "temporal_power_schedule", cls.schedule),
            "power_start": getattr(trainer.args, "temporal_power_start", cls.power_start),
            "power_warmup_ratio": getattr(trainer.args, "temporal_power_warmup_ratio", cls.power_warmup_ratio),
        }
        return cls(**own | {name: value for name, value in known.items() if value is not None})


def temporal_section(run: TrainingRun) -> str:
    """The section in Markdown, free of tokens and of paths of this machine."""
    parts = [
        HEADING,
        f"Trained with hf_temporal {__version__}: the loss of each target token is weighted by its position, w = t^p "
        "([Wang & Yan, 2023](https://arxiv.org/abs/2307.11462)).",
        _table(("setting", "value"), _settings(run)),
    ]
    if run.metrics:
        parts += ["### Results", _results(run.metrics)]
    if run.picture:
        parts.append(f"![Loss by position in the target, before and after training]({run.picture})")
    parts.append("### How it was trained")
    if run.command:
        parts.append(f"```bash\n{run.command}\n```")
    parts.append(_table(("", ""), _circumstances(run)))
    if run.data_versions:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(run.data_versions.items()))
        parts.append(f"<details><summary>Packages that the data were made from</summary>\n\n{versions}\n\n</details>")
    parts += ["### Citation", f"```bibtex\n{CITATION}\n```"]
    return without_private("\n\n".join(parts), folder="path/to/")


def add_temporal_section(folder: str | os.PathLike[str], run: TrainingRun) -> None:
    """Put the section, tags and results of a run into a folder's README.md, in place of those of an earlier call.

    A card that is there already keeps its text, as a `public_card`; otherwise one is made.
    """
    path = Path(folder) / CARD_NAME
    name = path.resolve().parent.name
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{{}}\n---\n\n# {name}\n")
    data = cast("ModelCardData", card.data)
    data.tags = sorted({*(data.tags or []), *TAGS})
    data.library_name = data.library_name or "transformers"
    data.license = run.license or data.license
    data.model_name = data.model_name or name
    if "/" in (run.dataset or "") and hub_id(run.dataset):
        known = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
        data.datasets = sorted({*known, str(run.dataset)})
    this = (run.task, without_private(run.dataset or ""))
    others = [result for result in data.eval_results or [] if (result.task_type, result.dataset_type) != this]
    data.eval_results = [*others, *_eval_results(run)]
    card.text = f"{_SECTION.sub(_BLANK, card.text).rstrip()}\n\n{_BEGIN}\n{temporal_section(run)}\n{_END}\n"
    path.write_text(public_card(str(card), run.base_model), encoding="utf-8")


def draw_loss_by_position(folder: str | os.PathLike[str]) -> str | None:
    """Draw the first and last evaluation's profile and return the picture's name; None without any, or matplotlib."""
    profiles = evaluation_profiles(folder)
    if not profiles:
        return None
    try:
        from hf_temporal.plots import plot_loss_by_position  # only here: matplotlib is slow to import
    except ModuleNotFoundError as error:
        logger.warning(f"The model card gets no picture. {error}")
        return None
    plot_loss_by_position(profiles, Path(folder) / PICTURE_NAME)
    return PICTURE_NAME


def _eval_results(run: TrainingRun) -> list[EvalResult]:
    """The last value of each metric, as the Hub's model index takes it; it has no place for one that is not finite."""
    if run.task is None or run.dataset is None:
        return []
    return [
        EvalResult(
            task_type=run.task,
            dataset_type=run.dataset,
            dataset_name=run.dataset,
            metric_type=name.removeprefix("eval_"),
            metric_name=name,
            metric_value=float(value),
        )
        for name, (*_, value) in _by_time(run.metrics).items()
        if math.isfinite(value)
    ]


def _by_time(metrics: Mapping[str, float | tuple[float, float]]) -> dict[str, tuple[float, ...]]:
    return {name: value if isinstance(value, tuple) else (value,) for name, value in metrics.items()}


def _settings(run: TrainingRun) -> list[tuple[str, str]]:
    weighting = run.weighting
    if weighting.weight_fn is None:
        span = f", from {run.power_start:g} over {run.power_warmup_ratio:.0%} of the steps"
        schedule = run.schedule + (span if run.schedule != "constant" else "")
        rows = [("p", f"{weighting.power:g}"), ("schedule of p", schedule)]
    else:
        rows = [("weights, in place of t^p", f"`{weighting.to_dict()['weight_fn']}`")]
    rows += [
        ("origin", f"`{weighting.origin}`: {ORIGIN_MEANINGS[weighting.origin]}"),
        ("normalization", f"`{weighting.normalization}`: {NORMALIZATION_MEANINGS[weighting.normalization]}"),
    ]
    if weighting.mixture < 1:
        rows.append(("mixture", f"{weighting.mixture:.0%} of the weighted loss, the rest of the usual one"))
    if weighting.regression_loss != "squared":
        rows.append(("regression_loss", f"`{weighting.regression_loss}`"))
    if run.effective_sample_size is not None:
        rows.append(("effective sample size", f"{run.effective_sample_size:.1%} of the target tokens"))
    return rows


def _results(metrics: Mapping[str, float | tuple[float, float]]) -> str:
    values = _by_time(metrics)
    columns = max(map(len, values.values()))
    header = ("metric", "before", "after") if columns == 2 else ("metric", "value")
    return _table(header, [(name, *[""] * (columns - len(row)), *map(_number, row)) for name, row in values.items()])


def _circumstances(run: TrainingRun) -> list[tuple[str, str]]:
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    base = run.base_model and (hub_id(run.base_model) or f"{last_component(run.base_model)}, a folder")
    model = " ".join(filter(None, [base and f"{base}.", run.base_model_note]))
    return [
        *([("base model", model)] if model else []),
        *([("data", ": ".join(filter(None, [run.dataset, run.data])))] if run.dataset or run.data else []),
        *([("sha256 of the data", f"`{run.data_hash}`")] if run.data_hash else []),
        *([("seed", str(run.seed))] if run.seed is not None else []),
        ("hardware", run.hardware),
        ("versions", ", ".join([*versions, f"hf_temporal {__version__}", f"Python {platform.python_version()}"])),
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"

"""A search for p with `Trainer.hyperparameter_search` and Optuna: one run a trial, kept in the run's folder."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from transformers import IntervalStrategy
from transformers.trainer_utils import SaveStrategy

from hf_temporal.compare.quantities import direction_of, number, title_of
from hf_temporal.power_plots import plot_trials
from hf_temporal.tables import table

FOLDER_NAME = "search"
STUDY_NAME = "study.db"
PICTURE_NAME = "trials.png"
LARGEST_POWER = 10.0
RANDOM_TRIALS = 4  # before TPE, Optuna's usual sampler, begins to learn from what there is
COMPLETE = (TrialState.COMPLETE,)
# What may change within one search.
FREE = ("output_dir", "logging_dir", "hub_token", "temporal_power")


def search_power(trainer: Any, model_init: Callable[[], Any], settings: Mapping[str, Any], *, trials: int) -> str:
    """Train `trials` models, p = 0 first, then p from 0 to 10 as Optuna's TPE suggests; tell what they reached.

    Trials are compared by `metric_for_best_model` at the end of a run, by default the unweighted loss. The study and
    what the trials write are kept in the folder `search` of `output_dir`; the same settings continue a study, others
    begin a new one. `settings` are what, beside the training arguments, tells one search from another; `trials` counts
    those already finished, too. A run that ends without a finite value counts as infinitely bad.
    """
    args = trainer.args
    if args.world_size > 1:
        raise ValueError(f"search_power={trials} on {args.world_size} processes; accepted: one process")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    direction = direction_of(metric)
    if metric == "temporal_loss" or direction == 0:
        raise ValueError(f"metric_for_best_model={metric!r} cannot choose a p; accepted: a metric that p leaves alone")
    args.eval_strategy, args.save_strategy, args.load_best_model_at_end = IntervalStrategy.NO, SaveStrategy.NO, False
    trainer.model_init = model_init
    folder = Path(args.output_dir).resolve() / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    args.output_dir = str(folder)
    _objective(trainer.evaluate(), metric, direction)
    kept = {name: value for name, value in {**args.to_dict(), **settings}.items() if name not in FREE}
    known: dict[str, Any] = {
        "storage": f"sqlite:///{folder / STUDY_NAME}",
        "study_name": hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "direction": "maximize" if direction > 0 else "minimize",
        "load_if_exists": True,
    }
    study = optuna.create_study(**known)
    finished = len(study.get_trials(states=COMPLETE))
    if not finished:
        study.enqueue_trial({"temporal_power": 0.0})
    if finished < trials:
        trainer.hyperparameter_search(
            lambda trial: {"temporal_power": trial.suggest_float("temporal_power", 0.0, LARGEST_POWER)},
            lambda metrics: _objective(metrics, metric, direction),
            n_trials=trials - finished,
            backend="optuna",
            sampler=optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=args.seed + finished),
            **known,
        )
    found = sorted((trial.params["temporal_power"], trial.value or 0.0) for trial in study.get_trials(states=COMPLETE))
    plot_trials(found, title_of(metric), folder / PICTURE_NAME)
    best = study.best_params["temporal_power"]
    rows = [
        {"p": number(power), metric: number(value) + (" **best**" if power == best else "")} for power, value in found
    ]
    told = table(rows, ["p", metric])
    return f"\n{told}\n\nOne run each: compare_powers.py tells what of it is noise.\n\n{folder / PICTURE_NAME}"


def _objective(metrics: dict[str, float], metric: str, direction: int) -> float:
    value = metrics.get(f"eval_{metric}")
    if value is None:
        measured = ", ".join(sorted(name.removeprefix("eval_") for name in metrics if name != "eval_temporal_loss"))
        raise ValueError(f"metric_for_best_model={metric!r} is not measured; accepted of: {measured}")
    return value if math.isfinite(value) else -direction * math.inf

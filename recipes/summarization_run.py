"""What the summarization recipes share: the model's arguments, evaluation before and after training, the card."""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import load_checkpoint_in_model
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import (
    IntervalStrategy,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_temporal.model_card import TrainingRun
from hf_temporal.tasks.summarization import SummarizationArguments, SummarizationData, SummaryScores
from recipes.continuation import Continuation, continue_run
from recipes.summarization_report import Card, before_and_after, draw_loss_by_position, report, save_evaluation

PREDICTIONS_NAME = "predictions.jsonl"
FREE_SETTINGS = ("overwrite_cache", "preprocessing_num_workers")  # a run stays the same one when they change


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model on the Hub, or folder; unset: the recipe's own."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights when loaded.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )


def begin(
    training_args: TrainingArguments,
    model_args: ModelArguments,
    data_args: SummarizationArguments,
    data: SummarizationData,
) -> Continuation:
    """Where training goes on in `output_dir`; a `hub_token` becomes the environment's HF_TOKEN.

    Raises ValueError where a split is missing that `do_train`, `do_eval` or `do_predict` needs.
    """
    for flag, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
        if getattr(training_args, flag) and split not in data.splits:
            raise ValueError(f"{flag}=True needs a {split} split, and the data have: {', '.join(data.splits)}")
    if training_args.hub_token:
        # training_args.bin is uploaded with the model and holds every argument
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if not training_args.do_train:
        return Continuation(None, finished=False)
    settings = asdict(model_args) | asdict(data_args) | {"sha256_of_the_data": data.sha256}
    return continue_run(training_args, {name: settings[name] for name in settings if name not in FREE_SETTINGS})


def share_cores() -> None:
    """Share the CPU's cores among this machine's processes.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 where nothing else is asked for: a run on the CPU of one
    machine would leave all cores but one idle.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class EvaluationLog(TrainerCallback):
    """Evaluates after the last step, and keeps what every evaluation found, so that an interruption loses none."""

    def __init__(self, scores: SummaryScores) -> None:
        self.scores = scores

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **arguments: Any
    ) -> TrainerControl:
        """Write the evaluation down."""
        if state.is_world_process_zero:
            evaluation = {
                "step": state.global_step,
                "metrics": arguments["metrics"],
                "summaries": self.scores.summaries,
                "references": self.scores.references,
            }
            save_evaluation(Path(str(args.output_dir)), evaluation)
        return control


class CardMixin:
    """Put in front of a Trainer: once `card` is set, it is the model card, in a push to the Hub too."""

    card: Card | None = None

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        """Write README.md into `output_dir`."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        elif self.is_world_process_zero():
            self.card.save(Path(self.args.output_dir))


def encode(
    data: SummarizationData,
    function: Callable[..., dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    training_args: TrainingArguments,
    data_args: SummarizationArguments,
) -> DatasetDict:
    """Tokenize every split with `function(pair, tokenizer=, arguments=)`."""
    with training_args.main_process_first():
        return data.splits.map(
            functools.partial(function, tokenizer=tokenizer, arguments=data_args),
            remove_columns=["text", "summary"],
            num_proc=data_args.preprocessing_num_workers,
            load_from_cache_file=not data_args.overwrite_cache,
            desc="Tokenizing",
        )


def carry_out(trainer: Any, run: Continuation, scores: SummaryScores, splits: DatasetDict) -> None:
    """Train with an evaluation before and after, predict, and report: whatever `do_train` and the like ask for."""
    args = trainer.args
    if args.do_eval:
        trainer.add_callback(EvaluationLog(scores))
        args.eval_on_start = run.checkpoint is None
    if run.finished:
        restore_weights(trainer.model, str(run.checkpoint))
    elif args.do_train:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    elif args.do_eval:
        trainer.evaluate()
    if args.load_best_model_at_end and args.do_eval and not run.finished:
        trainer.evaluate()
    if args.do_predict:
        predict(trainer, scores, splits["test"])
    if args.do_eval and args.should_save:
        print(f"\n{report(Path(args.output_dir))}\n")


def restore_weights(model: Any, checkpoint: str) -> None:
    """Load the weights, or the adapter, that a trainer saved."""
    if isinstance(model, PeftModel):
        model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
    else:
        load_checkpoint_in_model(model, checkpoint)
        model.tie_weights()


def predict(trainer: Any, scores: SummaryScores, pairs: Dataset) -> None:
    """Print the metrics of the test pairs, and write their summaries into `predictions.jsonl`."""
    trainer.log_metrics("predict", trainer.predict(pairs, metric_key_prefix="predict").metrics)
    if trainer.args.should_save:
        lines = [
            json.dumps({"summary": summary, "reference": reference}, ensure_ascii=False) + "\n"
            for summary, reference in zip(scores.summaries, scores.references, strict=True)
        ]
        (Path(trainer.args.output_dir) / PREDICTIONS_NAME).write_text("".join(lines), encoding="utf-8")


def publish(
    trainer: Any,
    data: SummarizationData,
    *,
    command: str,
    summary: str,
    usage: str,
    base_model: str | None,
    base_model_note: str | None,
) -> None:
    """Save the model with its card, and push both to the Hub where `push_to_hub` says so.

    Args:
        trainer: has a `CardMixin` in front.
        data: what it was trained on.
        command: what was typed.
        summary: the card's first sentences.
        usage: Python code that summarizes with the model.
        base_model: Hub id of the model that was trained; None for one from scratch.
        base_model_note: a sentence on where its weights come from.
    """
    args = trainer.args
    output_dir = Path(args.output_dir)
    pairs = ", ".join(f"{len(data.splits[split]):,} {split}" for split in data.splits)
    by_package = "; no package is in two of these" if data.provenance else ""
    trainer.card = Card(
        name=output_dir.name,
        summary=summary,
        usage=usage,
        library="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        run=TrainingRun(
            weighting=trainer.weighting,
            metrics=before_and_after(output_dir),
            command=command,
            task="summarization",
            dataset=data.name,
            data=f"{pairs} pairs{by_package}",
            data_hash=data.sha256,
            data_versions=(data.provenance or {}).get("versions", {}),
            seed=args.seed,
            schedule=args.temporal_power_schedule,
            power_start=args.temporal_power_start,
            power_warmup_ratio=args.temporal_power_warmup_ratio,
            base_model=base_model,
            base_model_note=base_model_note,
            picture=draw_loss_by_position(output_dir) if args.should_save else None,
        ),
    )
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()


def command_line(script: str, argv: Sequence[str], training_args: TrainingArguments) -> str:
    """The command that makes this run again."""
    processes = f"--num_processes {training_args.world_size} " if training_args.world_size > 1 else ""
    return f"accelerate launch {processes}recipes/{Path(script).name} {shlex.join(argv)}"

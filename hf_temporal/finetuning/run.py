"""What the recipes do around a trainer: evaluate before and after training, resume a run, write its results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from accelerate import load_checkpoint_in_model
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_temporal.hub.model_card import TrainingRun, draw_loss_by_position
from hf_temporal.installed import PACKAGE, recipes
from hf_temporal.suggest import suggest_power

from .adapters import merge_adapter
from .continuation import TRAINER_STATE_NAME, Checksums, Continuation, continue_run
from .models import ModelArguments
from .report import (
    Card,
    before_and_after,
    draw_records,
    report,
    save_divergence,
    save_evaluation,
    save_results,
    write_json,
)
from .tasks import Recorder, Task
from .usage import usage

PREDICTIONS_NAME = "predictions.jsonl"
POWERS_NAME = "suggested_power.png"
# A run stays the same one when they change.
FREE_SETTINGS = ("padding_free", "preprocessing_num_workers", "suggest_power", "search_power")


def begin(training_args: TrainingArguments, arguments: Sequence[Any], task: Task) -> Continuation:
    """Check that the run can begin, and find the checkpoint that it resumes from.

    A run is the same one where its training arguments, `arguments` and data are the same.
    """
    looks = any(getattr(each, name, None) for each in arguments for name in ("suggest_power", "search_power"))
    if not (looks or training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError(
            "do_train=False, do_eval=False and do_predict=False leave nothing to do; accepted: --do_train, --do_eval "
            "or --do_predict, or --suggest_power for a look at the data"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if training_args.world_size != launched:
        raise ValueError(
            f"world_size={training_args.world_size}, and {launched} processes were launched: each would train alone; "
            "accepted: --use_cpu where they are to run on the CPU"
        )
    for flag, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
        if getattr(training_args, flag) and split not in task.data.splits:
            raise ValueError(f"{flag}=True needs a {split} split, and the data have: {', '.join(task.data.splits)}")
    if training_args.hub_token:
        # instead of in training_args.bin, which holds every argument
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if not training_args.do_train:
        return Continuation(None, finished=False)
    return continue_run(training_args, settings_of(arguments, task))


def settings_of(arguments: Sequence[Any], task: Task) -> dict[str, Any]:
    """The settings that, beside the training arguments, tell one run from another: these dataclasses, and the data."""
    settings = {name: value for each in arguments for name, value in asdict(each).items() if name not in FREE_SETTINGS}
    if settings.get("chat_template"):
        settings["chat_template"] = Path(settings["chat_template"]).read_text(encoding="utf-8")
    return {**settings, "sha256_of_the_data": task.data.sha256}


def tell_powers(trainer: Any) -> None:
    """Print what each p would do with this model and these data; write its numbers and a picture into `output_dir`."""
    report = suggest_power(trainer)
    picture = Path(trainer.args.output_dir) / POWERS_NAME
    report.plot(picture)
    write_json(picture.with_suffix(".json"), asdict(report))
    print(f"\n{report}\n\n{picture}")


class EvaluationLog(TrainerCallback):
    """Evaluates after the last step, and saves every evaluation at once, so that an interruption loses none.

    To the metrics it adds `grad_norm`, the mean of the gradient norms that were logged since the evaluation before,
    and `grad_norm_spread`, their standard deviation divided by that mean.
    """

    def __init__(self, scores: Recorder | None) -> None:
        self.scores = scores

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **arguments: Any
    ) -> TrainerControl:
        if state.is_world_process_zero:
            record = self.scores.record if self.scores else {}
            metrics = {**arguments["metrics"], **gradient_norms(state)}
            save_evaluation(Path(str(args.output_dir)), {"step": state.global_step, "metrics": metrics, **record})
        return control


def gradient_norms(state: TrainerState) -> dict[str, float]:
    """`grad_norm` and `grad_norm_spread` of the steps between the last two evaluations; none where none is logged."""
    history, now = state.log_history, state.global_step
    before = max((logs["step"] for logs in history if "eval_runtime" in logs and logs["step"] < now), default=0)
    norms = [logs["grad_norm"] for logs in history if "grad_norm" in logs and logs["step"] > before]
    found = {"grad_norm": fmean(norms)} if norms else {}
    if len(norms) > 1:
        mean = found["grad_norm"]
        found["grad_norm_spread"] = pstdev(norms) / (mean or 1.0) if math.isfinite(mean) else math.nan
    return found


class FiniteWeights(TrainerCallback):
    """Ends a run whose weights are no longer finite, before anything of them is logged, evaluated or saved.

    The evaluation at its last step is recorded as NaN in every metric, which a comparison counts as a run that
    diverged. The same command still resumes from the last checkpoint.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check the weights where this step logs, evaluates or saves."""
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        for name, weight in model.named_parameters():
            here = weight.to_local() if isinstance(weight, DTensor) else weight
            if weight.requires_grad and not here.isfinite().all():
                if state.is_world_process_zero:
                    save_divergence(Path(str(args.output_dir)), state.max_steps)
                raise FloatingPointError(
                    f"{name} is not finite after step {state.global_step}: a loss or its gradient was not, in this "
                    "step or since the one last logged. Nothing of it is saved, and the same command goes on from the "
                    "last checkpoint; where it comes again, a smaller learning_rate or other data may help"
                )

    on_epoch_end = on_step_end


class CardMixin:
    """Put in front of a Trainer: once `card` is set, it is the model card, in a push to the Hub too."""

    card: Card | None = None

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.card is None:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        elif self.is_world_process_zero():
            self.card.save(Path(self.args.output_dir))


def carry_out(trainer: Any, run: Continuation, task: Task, scores: Recorder | None, splits: dict[str, Any]) -> None:
    """Evaluate, train, evaluate again, predict and print the report, as far as `do_train` and the like ask for it."""
    args = trainer.args
    if args.do_eval:
        trainer.add_callback(EvaluationLog(scores))
        args.eval_on_start = run.checkpoint is None
    if run.finished:
        restore_weights(trainer.model, str(run.checkpoint))
        trainer.state = TrainerState.load_from_json(str(Path(str(run.checkpoint)) / TRAINER_STATE_NAME))
    elif args.do_train:
        trainer.add_callback(Checksums())
        trainer.add_callback(FiniteWeights())
        trainer.train(resume_from_checkpoint=run.checkpoint)
    elif args.do_eval:
        trainer.evaluate()
    if args.load_best_model_at_end and args.do_eval and not run.finished:
        trainer.evaluate()
    if args.do_predict:
        predict(trainer, scores, splits["test"])
    if args.do_eval and args.should_save:
        print(f"\n{report(Path(args.output_dir), task.metrics)}\n")


def restore_weights(model: Any, checkpoint: str) -> None:
    """Load the weights, or the adapter, that a trainer saved."""
    if isinstance(model, PeftModel):
        model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)
    else:
        load_checkpoint_in_model(model, checkpoint)
        model.tie_weights(recompute_mapping=False)  # an untied head stays as it was loaded


def predict(trainer: Any, scores: Recorder | None, examples: Any) -> None:
    """Print the metrics of the test examples, and write their answers into `predictions.jsonl`."""
    trainer.log_metrics("predict", trainer.predict(examples, metric_key_prefix="predict").metrics)
    if trainer.args.should_save and scores is not None:
        with (Path(trainer.args.output_dir) / PREDICTIONS_NAME).open("w", encoding="utf-8") as file:
            for generated, reference in zip(scores.record["generated"], scores.record["references"], strict=True):
                file.write(json.dumps({"generated": generated, "reference": reference}, ensure_ascii=False) + "\n")


def publish(
    trainer: Any,
    task: Task,
    model_args: ModelArguments,
    *,
    command: str,
    num_beams: int,
    trained: str,
    base_model: str | None,
    base_model_note: str | None,
) -> None:
    """Merge the adapter if asked to, save the model with its card, and push both if `push_to_hub` is set.

    `all_results.json` is written last: a run that has it is finished. For the card there are `command`, which was
    typed, `trained`, the model's name, `base_model`, its id on the Hub or None for one from scratch, and a sentence on
    where its weights come from, `base_model_note`.
    """
    args, data, config = trainer.args, task.data, trainer.model.config
    output_dir = Path(args.output_dir)
    if model_args.merge_adapter:
        merge_adapter(trainer)
    weights = f"a LoRA adapter of rank {model_args.lora_r}" if model_args.use_peft else "all its weights"
    sizes = ", ".join(f"{_count(examples)} {split}" for split, examples in data.splits.items())
    if args.should_save:
        draw_records(output_dir)
    # what the model is loaded by
    name = args.hub_model_id if args.push_to_hub and args.hub_model_id else output_dir.name
    by_package = "; no package is in two of these" if data.provenance else ""
    trainer.card = Card(
        name=output_dir.name,
        summary=f"{trained} with {weights} trained to {task.verb}: {data.name}.",
        usage=usage(task, model_args, trainer.processing_class, config, name=name, num_beams=num_beams),
        library="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        pipeline_tag=task.pipeline_tag,
        run=dataclasses.replace(
            TrainingRun.of(trainer),
            metrics=before_and_after(output_dir, task.metrics),
            command=command,
            task=task.pipeline_tag,
            dataset=data.name,
            data=f"{sizes} examples{by_package}",
            data_hash=data.sha256,
            data_versions=(data.provenance or {}).get("versions", {}),
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
    if args.should_save:
        save_results(output_dir, trainer.state.log_history)


def _count(examples: Any) -> str:
    return f"{len(examples):,}" if hasattr(examples, "__len__") else "a stream of"


def command_line(script: str, argv: Sequence[str], training_args: TrainingArguments) -> str:
    """The command that repeats this run: `hf-temporal` for an installed recipe, else its script."""
    path = Path(script).resolve()
    processes = f"--num_processes {training_args.world_size} " if training_args.world_size > 1 else ""
    if path.is_relative_to(PACKAGE):
        return f"hf-temporal {path.stem.replace('_', '-')} {processes}{shlex.join(argv)}"
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(recipes()) else path.name
    return f"accelerate launch {processes}{shown} {shlex.join(argv)}"

r"""Train a model of the laboratory on a functional with a known memory, and measure how much of it the model learns.

A linear RNN learns a polynomial memory of a hundred lags, which takes seconds on a CPU:

    accelerate launch recipes/laboratory/train_functional.py --config recipes/laboratory/configs/linear_functional.yaml

A quick try of all steps, seconds:

    accelerate launch recipes/laboratory/train_functional.py \
        --config recipes/laboratory/configs/linear_functional.yaml \
        --max_steps 4 --eval_samples 8 --output_dir outputs/linear_functional_look

Flags choose another target (`--target shift`), family (`--model_type memory_tcn`), a nonlinear functional
(`--after 0.5`), series of mixed lengths (`--min_length 20`) and a control in the place of t^p (`--control late`). The
same command continues an interrupted run.
"""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoModel, set_seed

from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments, controlled
from hf_temporal.finetuning.functional import FunctionalArguments, LearnedFunctional, MemoryScores
from hf_temporal.finetuning.models import ModelArguments
from hf_temporal.finetuning.process import share_cores
from hf_temporal.finetuning.run import CardMixin, begin, carry_out, command_line, publish
from hf_temporal.memory.functionals import pad_series
from hf_temporal.memory.models import FAMILIES
from hf_temporal.trainer import TemporalWeightTrainer
from hf_temporal.training_args import TemporalTrainingArguments

ARGUMENTS = (ModelArguments, FunctionalArguments, ControlArguments, TemporalTrainingArguments)
MODEL_TYPES = tuple(family.config.model_type for family in FAMILIES.values())


class FunctionalTrainer(CardMixin, TemporalWeightTrainer):
    """Adds to every evaluation the distance between the model's memory function and the target's."""

    def __init__(self, *args: Any, scores: MemoryScores, **kwargs: Any) -> None:
        self._scores = scores
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix, model = kwargs.get("metric_key_prefix", "eval"), self.accelerator.unwrap_model(self.model)
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._scores.of(model).items()})
        return output


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, functional_args, control_args, training_args = parse(ARGUMENTS, argv, description=__doc__)
    if model_args.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type={model_args.model_type!r} is not of the laboratory; accepted: {', '.join(MODEL_TYPES)}"
        )
    share_cores()
    set_seed(training_args.seed)
    task = LearnedFunctional(functional_args, seed=training_args.seed)
    weighting = controlled(control_args, training_args)
    run = begin(training_args, (model_args, functional_args, control_args), task)
    model = AutoModel.from_config(AutoConfig.for_model(model_args.model_type, **model_args.config_values()))
    splits = task.encode(None, model.config)
    scores = MemoryScores(functional_args)
    trainer = FunctionalTrainer(
        model,
        training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=pad_series,
        weighting=weighting,
        scores=scores,
    )
    carry_out(trainer, run, task, scores, splits)
    if training_args.do_train:
        publish(
            trainer,
            task,
            model_args,
            command=command_line(__file__, argv, training_args),
            num_beams=1,
            trained=str(model_args.model_type),
            base_model=None,
            base_model_note=None,
        )


if __name__ == "__main__":
    run_script(main)

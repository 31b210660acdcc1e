r"""Fine-tune a decoder-only model with a control in the place of t^p, to find out which property of t^p matters.

A small Llama learns from scratch to copy ten digits, with a loss on the last part of its targets alone:

    accelerate launch recipes/laboratory/finetune_with_control.py --config copying/small_llama --control late \
        --output_dir outputs/small_llama_late

A quick try of all steps, about a minute:

    accelerate launch recipes/laboratory/finetune_with_control.py --config copying/small_llama --control late \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/small_llama_late_look

Everything else is as in `finetune_causal_lm.py`. For encoder–decoders there is `finetune_seq2seq_with_control.py`.
"""

import sys
from collections.abc import Sequence

from hf_temporal.data.copying import argmax_of_logits
from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments, check_no_power_is_sought, controlled
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, prepare_causal_lm
from hf_temporal.finetuning.run import command_line
from hf_temporal.finetuning.trainers import CausalTrainer

ARGUMENTS = (*CAUSAL_ARGUMENTS[:-1], ControlArguments, CAUSAL_ARGUMENTS[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse(ARGUMENTS, argv, description=__doc__)
    _, task_args, *_, control_args, training_args = parsed
    check_no_power_is_sought(control_args, task_args)
    weighting = controlled(control_args, training_args)
    run = prepare_causal_lm(parsed)
    trainer = CausalTrainer(
        run.model,
        run.training_args,
        **run.for_trainer(),
        preprocess_logits_for_metrics=argmax_of_logits if run.compute_metrics else None,
        answers=run.answers,
        weighting=weighting,
    )
    run.finish(trainer, command_line(__file__, argv, run.training_args))


if __name__ == "__main__":
    run_script(main)

r"""Fine-tune an encoder–decoder with a control in the place of t^p, to find out which property of t^p matters.

A small T5 learns from scratch to copy five digits over a blank, with a loss on the copied digits alone, which are the
last eighth of its 40 targets:

    accelerate launch recipes/laboratory/finetune_seq2seq_with_control.py --config copying/small_t5 --control late \
        --temporal_power 7 --output_dir outputs/small_t5_late

A quick try of all steps, about a minute:

    accelerate launch recipes/laboratory/finetune_seq2seq_with_control.py --config copying/small_t5 --control late \
        --temporal_power 7 --max_steps 2 --max_eval_samples 4 --output_dir outputs/small_t5_late_look

Everything else is as in `finetune_seq2seq.py`.
"""

import sys
from collections.abc import Sequence

from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments, check_no_power_is_sought, controlled
from hf_temporal.finetuning.recipe import SEQ2SEQ_ARGUMENTS, prepare_seq2seq
from hf_temporal.finetuning.run import command_line
from hf_temporal.finetuning.trainers import Seq2SeqTrainer

ARGUMENTS = (*SEQ2SEQ_ARGUMENTS[:-1], ControlArguments, SEQ2SEQ_ARGUMENTS[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = parse(ARGUMENTS, argv, description=__doc__)
    _, task_args, *_, control_args, training_args = parsed
    check_no_power_is_sought(control_args, task_args)
    weighting = controlled(control_args, training_args)
    run = prepare_seq2seq(parsed)
    trainer = Seq2SeqTrainer(run.model, run.training_args, **run.for_trainer(), weighting=weighting)
    run.finish(trainer, command_line(__file__, argv, run.training_args))


if __name__ == "__main__":
    run_script(main)

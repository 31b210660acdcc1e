r"""Train an encoder–decoder, each target token's loss weighted by t^p.

A small T5 from scratch learns to summarize docstrings, minutes on two CPU cores, no model hub needed; it is not good:

    accelerate launch recipes/finetune_seq2seq.py --config recipes/configs/summarization/t5_small_docstrings.yaml

A look at the whole way in about a minute:

    accelerate launch recipes/finetune_seq2seq.py --config recipes/configs/summarization/t5_small_docstrings.yaml \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/t5_small_docstrings_look

Any model and data set of the Hub, or files of your own, on the GPUs of one machine:

    accelerate launch --num_processes 8 recipes/finetune_seq2seq.py --model_name_or_path google-t5/t5-small \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix "summarize: " --bf16 --do_train --do_eval \
        --predict_with_generate --max_eval_samples 512 --output_dir outputs/t5_cnn_dailymail

The same command continues a run that was interrupted.
"""

import sys
from collections.abc import Sequence

from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import SEQ2SEQ_ARGUMENTS, prepare_seq2seq
from hf_temporal.finetuning.run import command_line
from hf_temporal.finetuning.trainers import Seq2SeqTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    run = prepare_seq2seq(parse(SEQ2SEQ_ARGUMENTS, argv, description=__doc__))
    trainer = Seq2SeqTrainer(
        run.model,
        run.training_args,  # training_args.temporal_power is p
        train_dataset=run.splits.get("train"),
        eval_dataset=run.splits.get("validation"),
        data_collator=run.data_collator,
        processing_class=run.tokenizer,
        compute_metrics=run.compute_metrics,
    )
    run.finish(trainer, command_line(__file__, argv, run.training_args))


if __name__ == "__main__":
    run_script(main)

r"""Fine-tune a decoder-only model, each target token's loss weighted by t^p.

The demo: SmolLM2-135M-Instruct with LoRA summarizes docstrings, minutes on two CPU cores, no model hub needed:

    accelerate launch recipes/finetune_causal_lm.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml

A look at the whole way in about a minute:

    accelerate launch recipes/finetune_causal_lm.py \
        --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/smollm2_lora_docstrings_look

Any model and data set of the Hub, or files of your own, on the GPUs of one machine:

    accelerate launch --num_processes 8 recipes/finetune_causal_lm.py --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix $'Summarize:\n\n' --use_peft --bf16 --do_train --do_eval \
        --max_eval_samples 512 --output_dir outputs/qwen3_cnn_dailymail

With `--task language_modeling` the data hold chat `messages`, `prompt` and `completion`, or `text`. The same command
continues a run that was interrupted.
"""

import sys
from collections.abc import Sequence

from hf_temporal.data.copying import argmax_of_logits
from hf_temporal.errors import run_script
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, prepare_causal_lm
from hf_temporal.finetuning.run import command_line
from hf_temporal.finetuning.trainers import CausalTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    run = prepare_causal_lm(parse(CAUSAL_ARGUMENTS, argv, description=__doc__))
    trainer = CausalTrainer(
        run.model,
        run.training_args,  # training_args.temporal_power is p
        train_dataset=run.splits.get("train"),
        eval_dataset=run.splits.get("validation"),
        data_collator=run.data_collator,
        processing_class=run.tokenizer,
        compute_metrics=run.compute_metrics,
        preprocess_logits_for_metrics=argmax_of_logits if run.compute_metrics else None,
        answers=run.answers,
    )
    run.finish(trainer, command_line(__file__, argv, run.training_args))


if __name__ == "__main__":
    run_script(main)

r"""Fine-tune a decoder-only model by TRL's SFTTrainer, each target token's loss weighted by t^p.

What finetune_causal_lm.py does to the same rows, in one screen and with TRL's defaults (bf16, gradient checkpointing).
SmolLM2-135M-Instruct with LoRA summarizes docstrings, no model hub needed; on a GPU:

    accelerate launch recipes/finetune_sft.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --output_dir outputs/smollm2_sft_docstrings

A look at the whole way in about a minute, on two CPU cores:

    accelerate launch recipes/finetune_sft.py --config recipes/configs/summarization/smollm2_lora_docstrings.yaml \
        --max_steps 2 --max_train_samples 64 --max_eval_samples 4 --bf16 false --gradient_checkpointing false \
        --output_dir outputs/smollm2_sft_docstrings_look

Other pairs of text and summary, and other models, by the flags of finetune_causal_lm.py; those of training are
SFTConfig's.
"""

import sys
from collections.abc import Sequence

from transformers import set_seed

from hf_temporal.data.loading import DataArguments
from hf_temporal.data.summarization import SummarizationArguments
from hf_temporal.errors import run_script
from hf_temporal.finetuning.adapters import add_adapter
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.dtype import settle_dtype
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.finetuning.tasks import Summarization
from hf_temporal.trl import TemporalSFTConfig, TemporalWeightSFTTrainer

ARGUMENTS = (ModelArguments, DataArguments, SummarizationArguments, TemporalSFTConfig)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and save."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, summarization_args, training_args = parse(ARGUMENTS, argv, description=__doc__)
    settle_dtype(model_args, training_args)
    set_seed(training_args.seed)  # the adapter's
    training_args.eval_on_start = True  # evaluate() before train() would leave several processes without DDP
    with training_args.main_process_first():
        model, tokenizer = load_causal_lm(model_args, None)
        pairs = Summarization(data_args, summarization_args)
        pairs.unused = ("test",)
        rows = pairs.encode(tokenizer, model.config)  # input_ids, and labels that are -100 in the prompt
    trainer = TemporalWeightSFTTrainer(
        add_adapter(model, model_args, "CAUSAL_LM") if model_args.use_peft else model,
        training_args,  # training_args.temporal_power is p
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    run_script(main)

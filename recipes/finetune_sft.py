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
SFTConfig's. Batches are computed without padding, on CPUs as on GPUs, unless `--padding_free false` is given.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from hf_temporal.data.loading import DataArguments
from hf_temporal.data.summarization import SummarizationArguments
from hf_temporal.errors import run_script
from hf_temporal.finetuning.adapters import add_adapter
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.dtype import settle_dtype
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.finetuning.tasks import Summarization
from hf_temporal.padding_free import use_padding_free
from hf_temporal.trl import TemporalSFTConfig, TemporalWeightSFTTrainer


@dataclass(repr=False)
class SFTArguments(TemporalSFTConfig):
    """SFTConfig, whose `padding_free` is chosen where it is not given."""

    padding_free: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Whether a batch is one row without padding; unset: where its losses stay the same."},
    )


ARGUMENTS = (ModelArguments, DataArguments, SummarizationArguments, SFTArguments)


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
    trained = add_adapter(model, model_args, "CAUSAL_LM") if model_args.use_peft else model
    pad_nothing(trained, training_args, rows)
    trainer = TemporalWeightSFTTrainer(
        trained,
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


def pad_nothing(model: PreTrainedModel | PeftModel, args: SFTArguments, rows: Mapping[str, Dataset]) -> None:
    """Set `padding_free` where it is not given, and let the model's attention run document by document."""
    if args.padding_free is False and not args.packing:
        return
    keeps_documents_apart = all(gather_object([use_padding_free(model)]))  # the same on every process
    if args.packing:
        return
    longest = max(len(ids) for split in rows.values() for ids in split["input_ids"])
    is_whole = longest <= (args.max_length or longest)
    if args.padding_free is None:
        args.padding_free = keeps_documents_apart and is_whole and args.per_device_train_batch_size > 1
    if args.padding_free and is_whole:
        args.max_length = None  # TRL cuts no row of a batch without padding, and here there is none to cut


if __name__ == "__main__":
    run_script(main)

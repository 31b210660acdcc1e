r"""Train an encoder–decoder, each target token's loss weighted by t^p.

A small T5 from scratch learns to summarize docstrings, minutes on two CPU cores, no model hub needed. It learns; it is
not good:

    accelerate launch recipes/finetune_seq2seq.py --config recipes/configs/summarization/t5_small_docstrings.yaml

A look at the whole way in about a minute:

    accelerate launch recipes/finetune_seq2seq.py --config recipes/configs/summarization/t5_small_docstrings.yaml \
        --max_steps 2 --max_eval_samples 4 --output_dir outputs/t5_small_docstrings_look

One from scratch learns to copy five digits over a blank of thirty:

    accelerate launch recipes/finetune_seq2seq.py --config recipes/configs/copying/small_t5.yaml

Any model and data set of the Hub, or files of your own, on the GPUs of one machine:

    accelerate launch --num_processes 8 recipes/finetune_seq2seq.py --model_name_or_path google-t5/t5-small \
        --dataset_name abisee/cnn_dailymail --dataset_config_name 3.0.0 --text_column article \
        --summary_column highlights --source_prefix "summarize: " --bf16 --do_train --do_eval \
        --predict_with_generate --max_eval_samples 512 --output_dir outputs/t5_cnn_dailymail

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from accelerate import PartialState
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_temporal.data.loading import IGNORED
from hf_temporal.data.small_t5 import small_t5_config, tokenizer_folder
from hf_temporal.finetuning.adapters import add_adapter, check_mergeable
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.models import Seq2SeqModelArguments, load_seq2seq_lm, require_4bit
from hf_temporal.finetuning.run import (
    CardMixin,
    begin,
    carry_out,
    command_line,
    publish,
    settings_of,
    share_cores,
    tell_powers,
    tell_search,
)
from hf_temporal.finetuning.tasks import TASK_KINDS, Summarization, Task, load_task
from hf_temporal.trainer import TemporalWeightSeq2SeqTrainer
from hf_temporal.training_args import TemporalSeq2SeqTrainingArguments

VOCABULARY = 8192


class Seq2SeqTrainer(CardMixin, TemporalWeightSeq2SeqTrainer):
    """The trainer, with the recipe's model card."""


def load_model(arguments: Seq2SeqModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is named, with its tokenizer; else a small T5 from scratch, its tokenizer trained on the texts.

    Raises ValueError where none is named and the task has no texts.
    """
    named = arguments.model_name_or_path or arguments.encoder_model_name_or_path or arguments.model_type
    if named:
        return load_seq2seq_lm(arguments, task.tokenizer(arguments.tokenizer_name))
    if not isinstance(task, Summarization) or "train" not in task.data.splits:
        raise ValueError("model_name_or_path=None: a small T5 is made from training texts alone; accepted: a model")
    pairs = task.data.splits["train"]
    texts = (f"{pair['text']}\n{pair['summary']}" for pair in pairs)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(task.data.sha256[:16], texts, VOCABULARY))
    return T5ForConditionalGeneration(small_t5_config(len(tokenizer))), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    kinds = (Seq2SeqModelArguments, *TASK_KINDS, TemporalSeq2SeqTrainingArguments)
    *arguments, training_args = parse(kinds, argv, description=__doc__)
    model_args, task_args, _, summarization_args, _, _ = arguments
    require_4bit(model_args)
    share_cores()
    set_seed(training_args.seed)
    task = load_task(arguments[1:], training_args)
    generates = training_args.predict_with_generate
    training_args.generation_max_length = training_args.generation_max_length or task.answer_length + 1
    training_args.generation_num_beams = training_args.generation_num_beams or summarization_args.num_beams
    training_args.do_train &= not (task_args.suggest_power or task_args.search_power)
    run = begin(training_args, arguments, task)

    def load() -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(model_args, task)
        return add_adapter(model, model_args, "SEQ_2_SEQ_LM") if model_args.use_peft else model, tokenizer

    with training_args.main_process_first():
        model, tokenizer = load()
        splits = task.encode(tokenizer, model.config)
    scores = task.scores(tokenizer, model.config)
    trainer = Seq2SeqTrainer(
        model,
        training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        compute_metrics=scores if generates else None,
    )
    if task_args.suggest_power:
        tell_powers(trainer)
        return
    if task_args.search_power:
        tell_search(trainer, lambda: load()[0], settings_of(arguments, task), trials=task_args.search_power)
        return
    if model_args.merge_adapter:
        check_mergeable(trainer)
    carry_out(trainer, run, task, scores if generates else None, splits)
    if training_args.do_train:
        pair = (model_args.encoder_model_name_or_path, model_args.decoder_model_name_or_path)
        base = model_args.model_name_or_path
        made = " and ".join(filter(None, pair)) or model_args.model_type or "a small T5"
        publish(
            trainer,
            task,
            model_args,
            command=command_line(__file__, argv, training_args),
            num_beams=training_args.generation_num_beams,
            trained=base or made,
            base_model=base,
            base_model_note=None if base else f"A new model: {made}.",
        )


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()

r"""Train an encoder–decoder to summarize, each target token's loss weighted by t^p.

A small T5 from scratch on docstrings, minutes on two CPU cores, no model hub needed. It learns; it is not good:

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

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_temporal.tasks.small_t5 import small_t5_config, tokenizer_folder
from hf_temporal.tasks.summarization import (
    IGNORED,
    SummarizationArguments,
    SummarizationData,
    SummaryScores,
    encode_for_seq2seq_lm,
    load_pairs,
)
from hf_temporal.trainer import TemporalWeightSeq2SeqTrainer
from hf_temporal.training_args import TemporalSeq2SeqTrainingArguments
from recipes.configuration import parse
from recipes.summarization_run import (
    CardMixin,
    ModelArguments,
    begin,
    carry_out,
    command_line,
    encode,
    publish,
    share_cores,
)

VOCABULARY = 8192
USAGE = '''
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
inputs = tokenizer("""{prefix}""" + text, truncation=True, max_length={max_length}, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={max_new_tokens}, num_beams={num_beams})
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
'''.strip()


class SummarizationTrainer(CardMixin, TemporalWeightSeq2SeqTrainer):
    """The trainer, with the recipe's model card."""


def load_model(arguments: ModelArguments, data: SummarizationData) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, from the Hub or a folder; else a small T5 from scratch, its tokenizer trained."""
    if arguments.model_name_or_path is None:
        pairs = data.splits["train"]
        texts = (f"{pair['text']}\n{pair['summary']}" for pair in pairs)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(data.sha256[:16], texts, VOCABULARY))
        return T5ForConditionalGeneration(small_t5_config(len(tokenizer))), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, revision=arguments.model_revision)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        arguments.model_name_or_path, revision=arguments.model_revision, dtype=arguments.dtype
    )
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate before and after, and report."""
    argv = sys.argv[1:] if argv is None else argv
    kinds = (ModelArguments, SummarizationArguments, TemporalSeq2SeqTrainingArguments)
    model_args, data_args, training_args = parse(kinds, argv, description=__doc__)
    training_args.generation_max_length = training_args.generation_max_length or data_args.max_target_length
    training_args.generation_num_beams = training_args.generation_num_beams or data_args.num_beams
    share_cores()
    set_seed(training_args.seed)
    with training_args.main_process_first():
        data = load_pairs(data_args)
    run = begin(training_args, model_args, data_args, data)
    with training_args.main_process_first():
        model, tokenizer = load_model(model_args, data)
    splits = encode(data, encode_for_seq2seq_lm, tokenizer, training_args, data_args)
    scores = SummaryScores(tokenizer)
    trainer = SummarizationTrainer(
        model,
        training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        compute_metrics=scores if training_args.predict_with_generate else None,
    )
    carry_out(trainer, run, scores, splits)
    if training_args.do_train:
        publish(
            trainer,
            data,
            command=command_line(__file__, argv, training_args),
            summary=f"{model_args.model_name_or_path or 'A small T5'} trained to summarize: {data.name}.",
            usage=USAGE.format(
                name=Path(str(training_args.output_dir)).name,
                prefix=data_args.source_prefix,
                max_length=data_args.max_source_length,
                max_new_tokens=training_args.generation_max_length,
                num_beams=training_args.generation_num_beams,
            ),
            base_model=model_args.model_name_or_path,
            base_model_note=None if model_args.model_name_or_path else "A small T5 from scratch.",
        )


if __name__ == "__main__":
    main()

"""A fine-tuning run but for its trainer: what the trainer is given, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    TrainingArguments,
    set_seed,
)

from hf_temporal.data.embedded_model import EMBEDDED_MODEL, EMBEDDED_PROVENANCE
from hf_temporal.data.small_t5 import small_t5_config, tokenizer_folder
from hf_temporal.positions import IGNORE_INDEX
from hf_temporal.training_args import TemporalSeq2SeqTrainingArguments, TemporalTrainingArguments

from .adapters import add_adapter, check_mergeable
from .continuation import Continuation
from .models import ModelArguments, Seq2SeqModelArguments, load_causal_lm, load_seq2seq_lm, require_4bit
from .run import begin, carry_out, publish, settings_of, share_cores, tell_powers, tell_search
from .tasks import TASK_KINDS, Scores, Summarization, Task, load_task
from .trainers import Answers

CAUSAL_ARGUMENTS = (ModelArguments, *TASK_KINDS, TemporalTrainingArguments)
SEQ2SEQ_ARGUMENTS = (Seq2SeqModelArguments, *TASK_KINDS, TemporalSeq2SeqTrainingArguments)
VOCABULARY = 8192  # of the small T5

Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]


@dataclass
class FineTuning:
    """A run whose trainer is still to be made.

    Attributes:
        training_args: of the trainer.
        model: to be trained, in its adapter if it gets one.
        tokenizer: the trainer's `processing_class`.
        splits: the tokenized examples: train, validation and test, as far as they are there.
        data_collator: makes batches of them.
        compute_metrics: scores what the trainer predicts in an evaluation; None where it predicts nothing to score.
        answers: how a decoder-only model's answers are generated in an evaluation; None where they are not.
        arguments: the dataclasses that, beside the training's, make a run the same one.
        task: what is learned.
        continuation: where training goes on.
        load: makes an untrained model once more.
        scores: what an evaluation's record is taken from.
        num_beams: of generation.
        origin: what the card says of where the model comes from, by the names of `publish`.
    """

    training_args: TrainingArguments
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Any]
    data_collator: Any
    compute_metrics: Scores | None
    answers: Answers | None
    arguments: Sequence[Any]
    task: Task
    continuation: Continuation
    load: Callable[[], Loaded]
    scores: Scores | None
    num_beams: int
    origin: dict[str, Any]

    def finish(self, trainer: Any, command: str) -> None:
        """Train, evaluate before and after, report and save; or tell of powers, where that is asked for instead.

        Args:
            trainer: has a `CardMixin` in front.
            command: what was typed, for the model card.
        """
        model_args, task_args = self.arguments[:2]
        if task_args.suggest_power:
            tell_powers(trainer)
        elif task_args.search_power:
            settings = settings_of(self.arguments, self.task)
            tell_search(trainer, lambda: self.load()[0], settings, trials=task_args.search_power)
        else:
            if model_args.merge_adapter:
                check_mergeable(trainer)
            carry_out(trainer, self.continuation, self.task, self.scores, self.splits)
            if self.training_args.do_train:
                publish(trainer, self.task, model_args, command=command, num_beams=self.num_beams, **self.origin)


def prepare_causal_lm(parsed: Sequence[Any]) -> FineTuning:
    """The run of a decoder-only model.

    Args:
        parsed: an object of each of `CAUSAL_ARGUMENTS`, further ones in front of the last; all but the last make a
            run the same one.
    """
    *arguments, training_args = parsed
    model_args, summarization_args, language_modeling_args = arguments[0], arguments[3], arguments[5]
    task, continuation = _begin(arguments, training_args)

    def load() -> Loaded:
        model, tokenizer = load_causal_lm(model_args, task.tokenizer(model_args.tokenizer_name))
        return add_adapter(model, model_args, "CAUSAL_LM") if model_args.use_peft else model, tokenizer

    with training_args.main_process_first():
        model, tokenizer = load()
        splits = task.encode(tokenizer, model.config)
    scores = task.scores(tokenizer, model.config)
    num_beams = summarization_args.num_beams
    packs = language_modeling_args.packing
    base = model_args.model_name_or_path or model_args.model_type or EMBEDDED_MODEL
    return FineTuning(
        training_args=training_args,
        model=model,
        tokenizer=tokenizer,
        splits=splits,
        data_collator=(
            DataCollatorWithFlattening()
            if packs
            else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)
        ),
        compute_metrics=None if task.generates else scores,
        answers=Answers(scores, task.answer_length, num_beams) if task.generates and scores is not None else None,
        arguments=arguments,
        task=task,
        continuation=continuation,
        load=load,
        scores=scores,
        num_beams=num_beams,
        origin={
            "trained": base,
            "base_model": None if model_args.model_type else base,
            "base_model_note": EMBEDDED_PROVENANCE if base == EMBEDDED_MODEL else None,
        },
    )


def prepare_seq2seq(parsed: Sequence[Any]) -> FineTuning:
    """The run of an encoder–decoder, from an object of each of `SEQ2SEQ_ARGUMENTS`, as in `prepare_causal_lm`."""
    *arguments, training_args = parsed
    model_args, summarization_args = arguments[0], arguments[3]
    task, continuation = _begin(arguments, training_args)
    training_args.generation_max_length = training_args.generation_max_length or task.answer_length + 1
    training_args.generation_num_beams = training_args.generation_num_beams or summarization_args.num_beams

    def load() -> Loaded:
        model, tokenizer = _seq2seq_model(model_args, task)
        return add_adapter(model, model_args, "SEQ_2_SEQ_LM") if model_args.use_peft else model, tokenizer

    with training_args.main_process_first():
        model, tokenizer = load()
        splits = task.encode(tokenizer, model.config)
    scores = task.scores(tokenizer, model.config) if training_args.predict_with_generate else None
    pair = (model_args.encoder_model_name_or_path, model_args.decoder_model_name_or_path)
    made = " and ".join(filter(None, pair)) or model_args.model_type or "a small T5"
    base = model_args.model_name_or_path
    return FineTuning(
        training_args=training_args,
        model=model,
        tokenizer=tokenizer,
        splits=splits,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORE_INDEX),
        compute_metrics=scores,
        answers=None,
        arguments=arguments,
        task=task,
        continuation=continuation,
        load=load,
        scores=scores,
        num_beams=training_args.generation_num_beams,
        origin={
            "trained": base or made,
            "base_model": base,
            "base_model_note": None if base else f"A new model: {made}.",
        },
    )


def _begin(arguments: Sequence[Any], training_args: TrainingArguments) -> tuple[Task, Continuation]:
    """The task with its data, and where the run goes on; nothing of the model is loaded yet."""
    model_args, task_args = arguments[:2]
    require_4bit(model_args)
    share_cores()
    set_seed(training_args.seed)
    task = load_task(arguments[1 : 1 + len(TASK_KINDS)], training_args)
    training_args.do_train &= not (task_args.suggest_power or task_args.search_power)
    return task, begin(training_args, arguments, task)


def _seq2seq_model(arguments: Seq2SeqModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is named, with its tokenizer; else a small T5 from scratch, its tokenizer trained on the texts.

    Raises:
        ValueError: none is named, and the task has no texts.
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

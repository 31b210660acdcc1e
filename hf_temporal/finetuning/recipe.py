"""All of a fine-tuning run but its trainer: the model, the data, and what happens before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_temporal._peft import base_model
from hf_temporal.data.cache import made_once
from hf_temporal.data.embedded_model import EMBEDDED_MODEL, EMBEDDED_PROVENANCE
from hf_temporal.data.rows import RowCollator
from hf_temporal.data.small_t5 import small_t5_config, train_tokenizer
from hf_temporal.model.model_loss import read_model_loss
from hf_temporal.padding_free import switch_attention
from hf_temporal.positions import IGNORE_INDEX
from hf_temporal.training_args import TemporalSeq2SeqTrainingArguments, TemporalTrainingArguments

from .adapters import add_adapter, check_mergeable
from .continuation import Continuation
from .dtype import settle_dtype
from .end_tokens import agree_on_the_end
from .models import ModelArguments, Seq2SeqModelArguments, load_causal_lm, load_seq2seq_lm, require_4bit
from .process import keep_freed_memory, share_cores
from .run import begin, carry_out, publish, settings_of, tell_powers
from .tasks import TASK_KINDS, LanguageModeling, Scores, Summarization, Task, load_task
from .trainers import Answers
from .weight_shares import tell_shares

logger = logging.get_logger(__name__)

CAUSAL_ARGUMENTS = (ModelArguments, *TASK_KINDS, TemporalTrainingArguments)
SEQ2SEQ_ARGUMENTS = (Seq2SeqModelArguments, *TASK_KINDS, TemporalSeq2SeqTrainingArguments)
VOCABULARY = 8192  # of the small T5

Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]


@dataclass
class FineTuning:
    """A run whose trainer is still to be made."""

    training_args: TrainingArguments
    arguments: Sequence[Any]  # the other dataclasses of arguments
    task: Task
    continuation: Continuation  # the checkpoint that training resumes from
    load: Callable[[], Loaded]  # makes an untrained model once more, in its adapter if it gets one
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Any]  # the tokenized examples, as far as the run needs them
    data_collator: Any
    scores: Scores | None  # compare answers with references; None where there are no answers
    num_beams: int
    origin: dict[str, Any]  # what the card says of where the model comes from, by the names of `publish`

    @property
    def answers(self) -> Answers | None:
        """How a decoder-only model's answers are generated in an evaluation; None where they are not."""
        if self.scores is None or self.model.config.is_encoder_decoder or not self.task.generates:
            return None
        return Answers(self.scores, self.task.answer_length, self.num_beams)

    @property
    def compute_metrics(self) -> Scores | None:
        """Scores what the trainer itself predicts in an evaluation; None where it predicts nothing to score."""
        return None if self.answers else self.scores

    def for_trainer(self) -> dict[str, Any]:
        """What the trainer is given by name: data, collator, tokenizer and metrics."""
        return {
            "train_dataset": self.splits.get("train"),
            "eval_dataset": self.splits.get("validation"),
            "data_collator": self.data_collator,
            "processing_class": self.tokenizer,
            "compute_metrics": self.compute_metrics,
        }

    def finish(self, trainer: Any, command: str) -> None:
        """Train, evaluate before and after, report and save; or suggest or search p, where that is asked for instead.

        The trainer has a `CardMixin` in front; `command` is what was typed, for the model card.
        """
        model_args, task_args = self.arguments[:2]
        if task_args.suggest_power:
            tell_powers(trainer)
        elif task_args.search_power:
            from .search import search_power  # Optuna takes its time, and is needed here alone

            settings = settings_of(self.arguments, self.task)
            print(search_power(trainer, lambda: self.load()[0], settings, trials=task_args.search_power))
        else:
            if model_args.merge_adapter:
                check_mergeable(trainer)
            if self.training_args.do_train and isinstance(self.task, LanguageModeling):
                tell_shares(trainer, self.splits["train"])
            carry_out(trainer, self.continuation, self.task, self.scores, self.splits)
            if self.training_args.do_train:
                publish(trainer, self.task, model_args, command=command, num_beams=self.num_beams, **self.origin)


def prepare_causal_lm(parsed: Sequence[Any]) -> FineTuning:
    """The run of a decoder-only model, from an object of each of `CAUSAL_ARGUMENTS`; others may precede the last."""
    model_args = parsed[0]
    base = model_args.model_name_or_path or model_args.model_type or EMBEDDED_MODEL
    run = _prepare(
        parsed,
        lambda task: load_causal_lm(model_args, task.tokenizer(model_args.tokenizer_name)),
        trained=base,
        base_model=None if model_args.model_type else base,
        base_model_note=EMBEDDED_PROVENANCE if base == EMBEDDED_MODEL else None,
    )
    pad_nothing(run)
    return run


def prepare_seq2seq(parsed: Sequence[Any]) -> FineTuning:
    """The run of an encoder–decoder, from an object of each of `SEQ2SEQ_ARGUMENTS`, as in `prepare_causal_lm`."""
    model_args, training_args = parsed[0], parsed[-1]
    pair = (model_args.encoder_model_name_or_path, model_args.decoder_model_name_or_path)
    made = " and ".join(filter(None, pair)) or model_args.model_type or "a small T5"
    base = model_args.model_name_or_path
    run = _prepare(
        parsed,
        lambda task: _seq2seq_model(model_args, task),
        trained=base or made,
        base_model=base,
        base_model_note=None if base else f"A new model: {made}.",
    )
    training_args.generation_max_length = training_args.generation_max_length or run.task.answer_length + 1
    training_args.generation_num_beams = run.num_beams = training_args.generation_num_beams or run.num_beams
    if not training_args.predict_with_generate:
        run.scores = None
    pad_nothing(run)
    return run


def pad_nothing(run: FineTuning) -> None:
    """Put the examples of a batch into one row, where that is asked for or the model and the run allow it.

    Where it is asked for, a model whose attention cannot be replaced goes over the row as a whole.
    """
    asked = run.arguments[5].wants_one_row
    if run.arguments[5].padding_free == "off":
        return
    if asked and (run.model.config.is_encoder_decoder or not read_model_loss(run.model).keeps_documents_apart):
        raise ValueError(
            f"{asked} for a {type(base_model(run.model)).__name__}, in which a packed document depends on those "
            "before it; accepted: padding_free='auto' or 'off', without packing"
        )
    problem = _need_of_padding(run) or next(filter(None, gather_object([switch_attention(run.model)])), "")
    if problem and not asked:
        logger.warning(f"padding_free='auto': batches are padded, since {problem}.")
        return
    run.data_collator = DataCollatorWithFlattening()
    if problem:
        logger.warning(f"{asked}: the model's own attention goes over each row as a whole, since {problem}.")
        return
    load = run.load

    def load_switched() -> Loaded:
        model, tokenizer = load()
        switch_attention(model)
        return model, tokenizer

    run.load = load_switched


def _need_of_padding(run: FineTuning) -> str:
    """Why this run of a decoder-only model needs one example per row, else empty."""
    args, data_args = run.training_args, run.arguments[2]
    how: Any = args.accelerator_config
    parallel: Any = args.parallelism_config
    if run.model.config.is_encoder_decoder:
        return ""
    if run.compute_metrics:
        return "answers are read off the rows"
    if args.world_size > 1 and (data_args.streaming or how.dispatch_batches or how.split_batches):
        return "one process makes the batches of all"
    return "rows are split between processes" if parallel is not None and parallel.cp_size > 1 else ""


def _prepare(parsed: Sequence[Any], load_model: Callable[[Task], tuple[Any, Any]], **origin: str | None) -> FineTuning:
    """Load the data and find the checkpoint to resume from, then make the model and tokenize the data."""
    *arguments, training_args = parsed
    model_args, task_args, summarization_args = arguments[0], arguments[1], arguments[3]
    require_4bit(model_args)
    share_cores()
    keep_freed_memory()
    settle_dtype(model_args, training_args)
    set_seed(training_args.seed)
    task = load_task(arguments[1 : 1 + len(TASK_KINDS)], training_args)
    if not training_args.do_predict and len(task.data.splits) > 1:
        task.unused = ("test",)
    training_args.do_train &= not (task_args.suggest_power or task_args.search_power)
    continuation = begin(training_args, arguments, task)

    def load() -> Loaded:
        model, tokenizer = load_model(task)
        if template := arguments[5].chat_template:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        return add_adapter(model, model_args, kind) if model_args.use_peft else model, tokenizer

    with training_args.main_process_first():
        model, tokenizer = load()
        splits = task.encode(tokenizer, model.config)
    agree_on_the_end(model, tokenizer, task.ends)
    collator = RowCollator(tokenizer, model=model, label_pad_token_id=IGNORE_INDEX)
    scores, num_beams = task.scores(tokenizer, model.config), summarization_args.num_beams
    prepared = (model, tokenizer, splits, collator, scores, num_beams, origin)
    return FineTuning(training_args, arguments, task, continuation, load, *prepared)


def _seq2seq_model(arguments: Seq2SeqModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is named, with its tokenizer; else a small T5 from scratch with one trained on the texts."""
    named = arguments.model_name_or_path or arguments.encoder_model_name_or_path or arguments.model_type
    if named:
        return load_seq2seq_lm(arguments, task.tokenizer(arguments.tokenizer_name))
    if not isinstance(task, Summarization) or "train" not in task.data.splits:
        raise ValueError("model_name_or_path=None: a small T5 is made from training texts alone; accepted: a model")
    pairs = task.data.splits["train"]
    texts = (f"{pair['text']}\n{pair['summary']}" for pair in pairs)
    name = f"tokenizer-{task.data.sha256[:16]}-{VOCABULARY}"
    folder = made_once(name, lambda folder: train_tokenizer(texts, VOCABULARY).save_pretrained(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return T5ForConditionalGeneration(small_t5_config(len(tokenizer))), tokenizer

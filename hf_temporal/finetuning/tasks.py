"""The tasks of the recipes: each loads and tokenizes its data, scores the answers, and names its metrics."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from datasets import Dataset, IterableDataset
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from hf_temporal.collator import LOSS_WEIGHTS
from hf_temporal.data import argument, check_counts, language_modeling, summarization
from hf_temporal.data.copying import FORMS, CopyingArguments, CopyScores, tokenize_texts
from hf_temporal.data.language_modeling import LanguageModelingArguments, load_texts
from hf_temporal.data.loading import ROW, DataArguments, TaskData, head_of
from hf_temporal.data.rows import CUT
from hf_temporal.data.summarization import SummarizationArguments, SummaryScores, load_pairs
from hf_temporal.installed import require
from hf_temporal.positions import IGNORE_INDEX

from .end_tokens import LOOKED_AT, ends_of_answers, texts_of_answers

logger = logging.get_logger(__name__)

MADE_ON_THE_FLY = {"train": 1_000_000, "validation": 256, "test": 256}
LOSSES = {
    "loss": ("loss", 3),
    "temporal_loss": ("weighted loss", 3),
    "first_token_loss": ("loss, first token of the target", 3),
    "head_loss": ("loss, first quarter of the target", 3),
    "tail_loss": ("loss, last quarter of the target", 3),
    "last_token_loss": ("loss, last token of the target", 3),
}


@dataclass
class TaskArguments:
    """What is learned."""

    task: str = argument(
        "summarization",
        "summarization; copying, made on the fly; language_modeling: text, prompt and completion, or chat messages.",
        ["summarization", "copying", "language_modeling"],
    )
    suggest_power: bool = argument(False, "Train nothing; tell what each p would do with this model and these data.")
    search_power: int = argument(
        0,
        "Train this many models, each with a p that Optuna suggests, and tell which p was best by "
        "metric_for_best_model; needs optuna.",
    )

    def __post_init__(self) -> None:
        check_counts(0, search_power=self.search_power)
        if self.search_power:
            require("search")


class Recorder(Protocol):
    """Keeps in `record` what an evaluation found beside its metrics."""

    record: dict[str, list[Any]]


class Scores(Recorder, Protocol):
    """Compares answers with references, both rows of tokens, and records their texts, `generated` and `references`."""

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """A Trainer's `compute_metrics`."""

    def score(self, generated: Any, labels: Any) -> dict[str, float]:
        """The same for generated tokens, without prompt."""


class Task(ABC):
    """What a recipe has to know of its task."""

    verb: str  # what a model learns to do
    pipeline_tag: ClassVar[str] = "text-generation"  # the Hub's name for it
    metrics: ClassVar[dict[str, tuple[str, int]]]  # what a table shows, by name in the logs: title and decimals
    data_args: DataArguments
    data: TaskData  # the examples, not tokenized yet
    cut: ClassVar[str] = ""  # what cuts rows, and what that takes
    answer_length: int  # the largest number of tokens to generate
    generates: bool = True  # a decoder-only model's answers; else they are read off at each position
    ends: Mapping[int, int] = MappingProxyType({})  # how often each token ends an answer in a chat template
    unused: Collection[str] = ()  # splits that the run does not need, so that they are not tokenized

    def tokenizer(self, tokenizer_name: str | None) -> PreTrainedTokenizerBase | None:  # noqa: ARG002
        """The tokenizer that comes with the task, unless another one is named; None: the model's."""
        return None

    def used(self) -> list[str]:
        """The names of the splits that are tokenized."""
        return [split for split in self.data.splits if split not in self.unused]

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
        """The examples by split, as the model of this configuration takes them."""

    def scores(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Scores | None:  # noqa: ARG002
        return None

    def _mapped(self, split: str, function: Callable[..., Any], *, with_indices: bool = False, **settings: Any) -> Any:
        """`function(batch, **settings)` over a split; the next time it comes from the cache of `datasets`."""
        examples = self.data.splits[split]
        how: dict[str, Any] = {"batched": True, "with_indices": with_indices, "fn_kwargs": settings}
        if isinstance(examples, IterableDataset):
            return examples.map(function, remove_columns=head_of(examples).column_names, **how)
        workers = self.data_args.preprocessing_num_workers
        how |= {"remove_columns": examples.column_names, "num_proc": workers, "desc": f"Tokenizing {split}"}
        return examples.map(function, **how)

    def _tokenized(
        self, config: PreTrainedConfig, function: Callable[..., Any], *, with_ends: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """Every split through `function(batch, **settings)`, without the rows that the model cannot learn from.

        That of a decoder-only model is told the numbers of the rows and the split, for its errors. If `with_ends`, the
        tokens that end the answers are counted in `ends`.
        """
        encoded = {}
        for split in self.used():
            if config.is_encoder_decoder:
                rows = self._mapped(split, function, **settings)
            else:
                own = {"encode": function, "where": split, "numbers": self.data.rows.get(split)}
                rows = self._mapped(split, _encode_numbered, with_indices=True, **own, **settings)
            limits = {"input_ids": positions(config, "encoder"), "labels": positions(config, "decoder")}
            how: dict[str, Any] = {"limits": limits, "first": int(not config.is_encoder_decoder)}
            if isinstance(rows, IterableDataset):
                self.ends = ends_of_answers(head_of(rows)) if with_ends else self.ends
                encoded[split] = rows.filter(_can_be_learned, fn_kwargs={**how, "cut": self.cut}).remove_columns(CUT)
                continue
            if cut := sum(rows[CUT]):
                logger.warning(f"{split}: {cut} of {len(rows)} rows are cut: {self.cut}.")
            if with_ends and not self.ends:
                self.ends = ends_of_answers(rows)
            rows = rows.remove_columns(CUT)
            kept = rows.filter(_can_be_learned, fn_kwargs=how, desc=f"Checking {split}")
            if left_out := len(rows) - len(kept):
                what = (
                    f"{left_out} of {len(rows)} rows have no target token or more tokens than the model has positions"
                )
                if not len(kept):
                    raise ValueError(f"{split}: {what} ({limits['input_ids']}); accepted: a row or more that fits")
                logger.warning(f"{split}: {what} ({limits['input_ids']}); left out.")
            encoded[split] = kept
        return encoded


class Summarization(Task):
    """A text, and its summary."""

    verb = "summarize"
    pipeline_tag = "summarization"
    metrics: ClassVar = {
        "rouge1": ("ROUGE-1", 1),
        "rouge2": ("ROUGE-2", 1),
        "rougeL": ("ROUGE-L", 1),
        **LOSSES,
        "gen_len": ("tokens per summary", 1),
        "empty": ("empty summaries, %", 1),
    }
    cut: ClassVar = "max_source_length ends a text, or max_target_length a summary, which then has no end token"

    def __init__(
        self,
        data_args: DataArguments,
        arguments: SummarizationArguments,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.data_args, self.arguments, self.chat_template_kwargs = data_args, arguments, chat_template_kwargs
        self.data = load_pairs(data_args, arguments)
        self.answer_length = arguments.max_target_length

    def encode(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
        settings: dict[str, Any] = {"tokenizer": tokenizer, "arguments": self.arguments, "counted": True}
        if not config.is_encoder_decoder:
            settings |= {"chat_template_kwargs": self.chat_template_kwargs, "with_ends": bool(tokenizer.chat_template)}
            return self._tokenized(config, summarization.encode_pairs_for_causal_lm, **settings)
        for side, name in (("encoder", "max_source_length"), ("decoder", "max_target_length")):
            limit, length = positions(config, side), getattr(self.arguments, name)
            if limit is not None and length > limit:
                raise ValueError(f"{name}={length}, and the model has {limit} positions; accepted: at most that")
        settings["decoder_start_token_id"] = getattr(config, "decoder_start_token_id", None)
        return self._tokenized(config, summarization.encode_for_seq2seq_lm, **settings)

    def scores(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Scores:  # noqa: ARG002
        return SummaryScores(tokenizer, self.arguments.rouge_tokenizer)


class Copying(Task):
    """What stood earlier in a sequence is asked for later, in one of several forms."""

    metrics: ClassVar = {
        "recall": ("recall of the answer's tokens", 3),
        "exact_match": ("answered without a mistake", 3),
        "blank_accuracy": ("accuracy on the blank", 3),
        "chain_accuracy": ("accuracy on the chain", 3),
        **LOSSES,
        "gen_len": ("tokens per answer", 1),
        "empty": ("empty answers, %", 1),
    }

    def __init__(
        self, data_args: DataArguments, arguments: CopyingArguments, *, text_column: str | None, seed: int
    ) -> None:
        self.data_args, self.arguments, self.seed = data_args, arguments, seed
        self.form = FORMS[arguments.copying_form]
        self.verb, self.generates = self.form.verb, self.form.generates
        if data_args.streaming:
            raise ValueError("streaming=True for task='copying', which draws its examples; accepted: no streaming.")
        self.answer_length = len(self.form.scored(arguments.held_out)) + (1 if self.generates else 0)
        self.sizes = {split: limit or MADE_ON_THE_FLY[split] for split, limit in data_args.limits.items()}
        settings = arguments.settings
        name = self.form.title
        if self.form.from_texts:
            texts = load_texts(data_args, text_column)
            if "text" not in next(iter(texts.splits.values())).column_names:
                form = f"copying_form={arguments.copying_form!r}"
                raise ValueError(f"{form} needs a column of texts; accepted: data with one, --text_column")
            name = name.format(texts=texts.name, **settings)
            self.data = TaskData(texts.splits, name, texts.sha256, texts.provenance)
        else:
            known = json.dumps([settings, self.sizes, seed])
            examples = {split: range(size) for split, size in self.sizes.items()}
            self.data = TaskData(examples, name.format(**settings), hashlib.sha256(known.encode()).hexdigest())

    def tokenizer(self, tokenizer_name: str | None) -> PreTrainedTokenizerBase | None:
        return None if tokenizer_name else self.form.tokenizer_of(self.arguments)

    def example(self) -> tuple[list[int], list[int]]:
        """The first held-out input of a form that is not generated, and at which places of it the answer is read."""
        how: dict[str, Any] = {"split": "validation", "seed": self.seed, "is_encoder_decoder": False}
        arguments = self.arguments.held_out
        row = self.form(arguments, size=1, **how)[0]
        places = [place - 1 for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
        return row["input_ids"][:-1], [*compress(places, self.form.scored(arguments))]

    def encode(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
        encoded: dict[str, Any] = {}
        rows, tokens = config.get_text_config(decoder=True).vocab_size, len(tokenizer)
        if "symbols" in self.arguments.settings and rows != tokens:
            symbols = f"symbols={self.arguments.symbols} make {tokens} tokens"
            raise ValueError(f"{symbols}, and the model has {rows}; accepted: a model of as many")
        for split in self.used():
            how: dict[str, Any] = {"split": split, "seed": self.seed, "is_encoder_decoder": config.is_encoder_decoder}
            if self.generates:
                how["tokenizer"] = tokenizer
            if self.form.from_texts:
                how["texts"] = self._mapped(split, tokenize_texts, tokenizer=tokenizer)["tokens"]
            arguments = self.arguments if split == "train" else self.arguments.held_out
            encoded[split] = self.form(arguments, size=self.sizes[split], **how)
            for side, row in (("encoder", "input_ids"), ("decoder", "labels")):
                limit, length = positions(config, side), len(encoded[split][0][row])
                if limit is not None and length > limit:
                    named = [f"{name}={value}" for name, value in arguments.settings.items() if value is not None]
                    raise ValueError(
                        f"{' and '.join(named[1:])} make {length} tokens, and the model has {limit} positions; "
                        "accepted: at most that"
                    )
        return encoded

    def scores(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Scores:
        return CopyScores(tokenizer, self.arguments.held_out, generated=config.is_encoder_decoder)


class LanguageModeling(Task):
    """Plain text, prompt and completion, or chat messages."""

    verb = "continue"
    metrics: ClassVar = LOSSES
    cut: ClassVar = "block_size ends them, and what is cut off is not learned"
    answer_length = 0
    generates = False

    def __init__(
        self, data_args: DataArguments, arguments: LanguageModelingArguments, *, text_column: str | None
    ) -> None:
        self.data_args, self.arguments = data_args, arguments
        self.data = load_texts(data_args, text_column)

    def encode(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Any]:
        if config.is_encoder_decoder:
            raise ValueError("task='language_modeling' is for finetune_causal_lm.py; accepted: summarization, copying")
        examples = head_of(next(iter(self.data.splits.values())))
        settings = {"tokenizer": tokenizer, "arguments": self.arguments, "counted": True}
        with_ends = language_modeling.are_conversations(examples[:1])
        if with_ends and "strftime_now" in str(tokenizer.chat_template):
            logger.warning(
                "The chat template writes the date of the day on which a row is made: what the model is given later "
                "differs there. Where the template reads a date, --chat_template_kwargs sets it."
            )
        encoded = self._tokenized(config, language_modeling.encode_for_causal_lm, with_ends=with_ends, **settings)
        if patterns := self.arguments.patterns:
            few = head_of(encoded[next(iter(encoded))])
            answers = texts_of_answers(few.select(range(min(LOOKED_AT, len(few)))), tokenizer)
            for pattern in patterns:
                if not any(start < end for answer in answers for start, end in pattern.spans(answer)):
                    given = f"weight_pattern {pattern.regex.pattern!r}"
                    logger.warning(f"{given} matches nothing in the first {len(answers)} texts that are learned.")
        return encoded

    def _mapped(self, split: str, function: Callable[..., Any], **settings: Any) -> Dataset:
        examples = self.data.splits[split]
        weighted = isinstance(examples, IterableDataset)  # whose later rows may bring weights
        weighted = weighted or language_modeling.brings_weights(examples, self.arguments)
        rows = super()._mapped(split, function, weighted=weighted, **settings)
        if isinstance(rows, Dataset) and len(rows) > len(examples) and "text" not in examples.column_names:
            times = f"{len(rows) / len(examples):.2f} times as many"
            logger.warning(
                f"{split}: {len(examples)} conversations make {len(rows)} rows, {times}: where the chat template "
                "renders earlier turns anew, or the tokenizer joins an answer with its prompt, answers get rows of "
                "their own, each with the context that the model is given. --train_on last keeps one of each "
                "conversation."
            )
        return rows


TASK_KINDS = (TaskArguments, DataArguments, SummarizationArguments, CopyingArguments, LanguageModelingArguments)


def load_task(arguments: Sequence[Any], training_args: TrainingArguments) -> Task:
    """The task with its data, from one object of each of `TASK_KINDS`."""
    task_args, data_args, summarization_args, copying_args, language_modeling_args = arguments
    text_column = summarization_args.text_column
    packs, form = language_modeling_args.wants_one_row, copying_args.copying_form
    if packs and task_args.task == "copying" and not FORMS[form].generates:
        raise ValueError(f"{packs} and copying_form={form!r}: each row is read alone; accepted: one of them")
    with training_args.main_process_first():
        if task_args.task == "summarization":
            kwargs = language_modeling_args.chat_template_kwargs
            return Summarization(data_args, summarization_args, kwargs)
        if task_args.task == "copying":
            return Copying(data_args, copying_args, text_column=text_column, seed=training_args.seed)
        return LanguageModeling(data_args, language_modeling_args, text_column=text_column)


def _encode_numbered(
    batch: dict[str, list[Any]],
    indices: list[int],
    encode: Callable[..., dict[str, list[Any]]],
    where: str,
    numbers: list[int] | None,
    **settings: Any,
) -> dict[str, list[Any]]:
    """The rows of a batch, in which errors count the rows of the file."""
    rows = batch.get(ROW) or (indices if numbers is None else [numbers[index] for index in indices])
    return encode(batch, rows=rows, split=where, **settings)


def _can_be_learned(
    example: dict[str, Any], limits: dict[str, int | None], first: int, cut: str | None = None
) -> bool:
    """Whether a row fits and has a target with a weight from the place `first` on; nothing predicts one before it.

    Of a stream, which names `cut`, what does not is told at once.
    """
    fits = all(limit is None or len(example[name]) <= limit for name, limit in limits.items())
    weights = example.get(LOSS_WEIGHTS) or [1.0] * len(example["labels"])
    targets = [*zip(example["labels"], weights, strict=True)][first:]
    learned = fits and any(label != IGNORE_INDEX and weight > 0 for label, weight in targets)
    if cut and example[CUT]:
        logger.warning_once(f"Rows of the stream are cut: {cut}.")
    if cut and not learned:
        logger.warning_once("Rows of the stream without a target token, or longer than the model, are left out.")
    return learned


def positions(config: PreTrainedConfig, side: str) -> int | None:
    """How many positions the encoder or the decoder has, either for a decoder-only model; None: any, as in T5."""
    part = getattr(config, side, config)
    own = part if isinstance(part, PreTrainedConfig) else config
    limit: int | None = getattr(own, f"max_{side}_position_embeddings", getattr(own, "max_position_embeddings", None))
    return limit

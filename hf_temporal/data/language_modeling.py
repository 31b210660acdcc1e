"""Language modeling: plain text, prompt and completion, or conversations, and which of their tokens are learned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_temporal.collator import LOSS_WEIGHTS

from . import argument, check_counts
from .chat import encode_conversations
from .formats import FORMS, TEXTS, alpaca_prompts, conversations_of
from .loading import DataArguments, TaskData, check_column, load_columns
from .rows import Row, as_batch
from .tokenizing import rows_of_pairs, rows_of_texts
from .weights import Pattern, read_weights

logger = logging.get_logger(__name__)


@dataclass
class LanguageModelingArguments:
    """How long a row may be, whether several share one, and what of a conversation is learned."""

    block_size: int = argument(1024, "Tokens of a row at most: plain text is cut into such rows, the rest is cut off.")
    packing: bool = argument(
        False, "Put the examples of a batch into one row without padding; none attends to another."
    )
    train_on: str = argument(
        "all", "The answers of a conversation that are learned: all, or the last.", ["all", "last"]
    )
    weight_pattern: list[str] | None = argument(
        None,
        "REGEX=w, one or more: the tokens of an answer that the expression matches, or its groups if it has any, "
        "weigh w times as much.",
    )
    chat_template: str | None = argument(None, "File of the chat template that replaces the tokenizer's.")
    chat_template_kwargs: dict[str, Any] | str | None = argument(
        None, "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
    )

    def __post_init__(self) -> None:
        check_counts(2, block_size=self.block_size)
        if self.train_on not in ("all", "last"):
            raise ValueError(f"train_on={self.train_on!r}; accepted: 'all', 'last'.")
        self.patterns  # noqa: B018 - a wrong one is told before any data are loaded
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                given = f"chat_template_kwargs={self.chat_template_kwargs!r} ({error})"
                raise ValueError(f"{given}; accepted: a mapping in JSON.") from error
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(f"chat_template_kwargs={self.chat_template_kwargs!r}; accepted: a mapping in JSON.")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ValueError(f"chat_template={self.chat_template!r} is no file; accepted: a file of a Jinja template.")

    @property
    def patterns(self) -> list[Pattern]:
        """The weights of spans, read from `weight_pattern`."""
        return [Pattern.parse(given) for given in self.weight_pattern or ()]


def load_texts(data_args: DataArguments, text_column: str | None = None) -> TaskData:
    """Load the columns of the first form in `formats.FORMS` that the train data have.

    The text is in `text_column` where it is given; that of the embedded data is the docstring's body.
    """

    def choose(splits: dict[str, Dataset], split: str, embedded: bool) -> dict[str, str]:
        there, here = next(iter(splits.values())).column_names, splits[split].column_names
        weights = {LOSS_WEIGHTS: LOSS_WEIGHTS} if LOSS_WEIGHTS in here else {}
        if text_column is not None:
            check_column("text_column", text_column, splits[split], split)
            return {text_column: "text", **weights}
        if embedded:
            return {"body": "text"}
        for needed, optional in FORMS.items():
            if all(column in there for column in needed):
                also = [column for column in optional if column in here]
                for column in (*needed, *also):
                    holds_texts = column in TEXTS or isinstance(splits[split].features.get(column), Value)
                    check_column("column", column, splits[split], split, holds_texts=holds_texts)
                read = {column: column for column in (*needed, *also)} | weights
                if unread := [column for column in here if column not in read]:
                    logger.warning(f"{split}: {', '.join(read)} are read; not read: {', '.join(unread)}.")
                return read
        forms = "; ".join(" and ".join(needed) for needed in [*FORMS][1:] + [*FORMS][:1])
        raise ValueError(f"the data have the columns {', '.join(there)}; accepted: {forms}; or --text_column")

    optional = {column for columns in FORMS.values() for column in columns} | {LOSS_WEIGHTS}
    return load_columns(data_args, choose, optional=optional)


def encode_for_causal_lm(
    batch: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: LanguageModelingArguments,
    *,
    rows: Sequence[int] = (),
    split: str = "the data",
    weighted: bool = False,
    counted: bool = False,
) -> dict[str, list[Any]]:
    """Rows of at most `arguments.block_size` tokens, with labels and, where the data bring weights, `loss_weights`.

    In a text every token is a target, and so is the end token behind it; in prompt and completion, the completion and
    its end token; in conversations, what the assistant says, up to the end token of each turn, in the context that the
    model is given at inference (`chat.encode_conversations`). No special token that a text holds is added once more.
    Longer rows are cut at the tokenizer's `truncation_side`, but plain text goes on in a further row.

    Args:
        batch: the columns of one form, as `load_texts` names them.
        tokenizer: the model's.
        arguments: what is learned of them.
        rows: the numbers of the rows for errors; none: counted from 0.
        split: what an error calls the data.
        weighted: whether there is a column `loss_weights` even where this batch brings no weights.
        counted: whether there is a column `rows.CUT` of the rows that were cut.

    Raises:
        ValueError: by column, row and message, what cannot be learned as it stands there.
    """
    size = next(iter(map(len, batch.values())))
    names = [f"row {row} of {split}" for row in rows or range(size)]
    if "input_ids" in batch:
        per_example = [[_given(batch, place, name)] for place, name in enumerate(names)]
    elif "text" in batch:
        per_example = [[row] for row in rows_of_texts(batch["text"], tokenizer, arguments.patterns)]
    elif are_conversations(batch, names):
        settings = arguments.chat_template_kwargs
        assert not isinstance(settings, str)
        conversations = conversations_of(batch, names, settings or {}, train_on=arguments.train_on)
        per_example = encode_conversations(conversations, tokenizer, arguments.patterns)
    else:
        prompts = batch["prompt"] if "prompt" in batch else alpaca_prompts(batch)
        completions = batch["completion" if "prompt" in batch else "output"]
        named = [f"completion of {name}" for name in names]
        per_example = [[row] for row in rows_of_pairs(prompts, completions, named, tokenizer, arguments.patterns)]
    own = batch.get(LOSS_WEIGHTS)
    if own is not None and "input_ids" not in batch:
        for place, name in enumerate(names):
            weight = read_weights(own[place], None, f"{LOSS_WEIGHTS} of {name}")
            per_example[place] = [row.times(weight) for row in per_example[place]]
    made = [row for several in per_example for row in several]
    if "text" in batch:
        made = [block for row in made for block in row.blocks(arguments.block_size)]
    weighted = weighted or any(row.weights is not None for row in made)
    from_left = tokenizer.truncation_side == "left"
    short = [row.cut(arguments.block_size, from_left=from_left) for row in made]
    cut = [len(row.tokens) > arguments.block_size for row in made] if counted else None
    return as_batch(short, weighted=weighted, cut=cut)


def brings_weights(examples: Dataset, arguments: LanguageModelingArguments) -> bool:
    """Whether the examples have weights of rows or messages, or spans of theirs are weighted."""
    if arguments.weight_pattern or LOSS_WEIGHTS in examples.column_names:
        return True
    columns = [name for name in ("messages", "conversations", "completion") if name in examples.column_names]
    key = re.compile(r'"weight\\?"')  # its quotes are escaped in messages that are JSON themselves
    return any(key.search(json.dumps(value)) for name in columns for value in examples[name])


def are_conversations(batch: Mapping[str, Sequence[Any]], names: Sequence[str] = ()) -> bool:
    """Whether a batch holds messages, and not texts; `names` are what an error calls its rows, where it is checked."""
    if "messages" in batch or "conversations" in batch:
        return True
    if "prompt" not in batch:
        return False
    are_texts = isinstance(batch["prompt"][0], str)
    for name, *pair in zip(names, batch["prompt"], batch["completion"], strict=bool(names)):
        if any(isinstance(each, str) != are_texts for each in pair):
            accepted = "two texts, or two lists of messages, the same in all rows"
            raise ValueError(f"prompt and completion of {name} are of two kinds; accepted: {accepted}.")
    return not are_texts


def _given(batch: Mapping[str, Sequence[Any]], place: int, name: str) -> Row:
    """A row that is tokenized already, without its padding; without labels, all of it is learned."""
    given = {column: batch[column][place] for column in ("input_ids", "labels", "attention_mask") if column in batch}
    for column, values in given.items():
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"{column} of {name} is {str(values)[:80]}; accepted: a list of integers.")
        if len(values) != len(given["input_ids"]):
            accepted = f"{len(given['input_ids'])}, one for each of input_ids"
            raise ValueError(f"{column} of {name} are {len(values)}; accepted: {accepted}.")
    tokens = given["input_ids"]
    row = Row(tokens, given.get("labels", tokens))
    if LOSS_WEIGHTS in batch:
        row = row.times(read_weights(batch[LOSS_WEIGHTS][place], len(tokens), f"{LOSS_WEIGHTS} of {name}"))
    read = [bool(each) for each in given.get("attention_mask", [1] * len(tokens))]
    weights = row.weights and [*compress(row.weights, read)]
    return Row([*compress(row.tokens, read)], [*compress(row.labels, read)], weights)

"""Language modeling: plain text, prompt and completion, or chat messages, and which of their tokens are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from . import argument, check_counts
from .loading import DataArguments, TaskData, check_column, load_columns
from .rows import Row, as_batch, learned_after


@dataclass
class LanguageModelingArguments:
    """How long a row may be, and whether several share one."""

    block_size: int = argument(1024, "Tokens of a row at most: plain text is cut into such rows, the rest is cut off.")
    packing: bool = argument(
        False, "Put the examples of a batch into one row without padding; none attends to another."
    )

    def __post_init__(self) -> None:
        check_counts(2, block_size=self.block_size)


def load_texts(data_args: DataArguments, text_column: str | None = None) -> TaskData:
    """Load the columns "messages", "prompt" and "completion", or "text", whichever the train data have.

    The text is in `text_column` where it is given; that of the embedded data is the docstring's body.
    """

    def choose(splits: dict[str, Dataset], split: str, embedded: bool) -> dict[str, str]:
        if text_column is not None:
            check_column("text_column", text_column, splits[split], split)
            return {text_column: "text"}
        if embedded:
            return {"body": "text"}
        there = next(iter(splits.values())).column_names
        for columns in (["messages"], ["prompt", "completion"], ["text"]):
            if all(column in there for column in columns):
                for column in columns:
                    check_column("column", column, splits[split], split, holds_texts=column != "messages")
                return {column: column for column in columns}
        accepted = "messages; prompt and completion; text; or --text_column"
        raise ValueError(f"the data have the columns {', '.join(there)}; accepted: {accepted}.")

    return load_columns(data_args, choose)


def encode_texts(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, arguments: LanguageModelingArguments
) -> dict[str, list[list[int]]]:
    """Rows of at most `arguments.block_size` tokens, with their labels.

    In a text every token is a target, and so is the end token behind it; in prompt and completion, the completion and
    its end token; in messages, what the assistant says, up to the end token of each turn.
    """
    size, end = arguments.block_size, tokenizer.eos_token_id
    if "messages" in batch:
        rows = [_chat(messages, tokenizer) for messages in batch["messages"]]
    elif "prompt" in batch:
        prompts = [_without_end(prompt, tokenizer) for prompt in batch["prompt"]]
        completions = tokenizer(batch["completion"], add_special_tokens=False, verbose=False).input_ids
        rows = [learned_after(prompt, [*row, end]) for prompt, row in zip(prompts, completions, strict=True)]
    else:
        closed = [[*_without_end(text, tokenizer), end] for text in batch["text"]]
        blocks = [tokens[start : start + size] for tokens in closed for start in range(0, len(tokens), size)]
        rows = [(block, block) for block in blocks]
    return as_batch((tokens[:size], labels[:size]) for tokens, labels in rows)


def _without_end(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Each turn is tokenized by itself, as it is when the model has to answer what came before."""
    if tokenizer.chat_template is None:
        raise ValueError("the data hold messages, and the tokenizer has no chat template; accepted: one that has it.")
    accepted = "accepted: a list of mappings with role and content."
    if not (isinstance(messages, list) and all(isinstance(each, Mapping) and "role" in each for each in messages)):
        raise ValueError(f"messages hold {messages!r}; {accepted}")

    def rendered(turns: int, *, answer: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=answer))
        except Exception as error:  # a template may raise anything
            reason = f"of which the tokenizer's chat template makes nothing ({error})"
            raise ValueError(f"messages hold {messages[:turns]!r}, {reason}; {accepted}") from error

    tokens: list[int] = []
    labels: list[int] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = rendered(index, answer=True), rendered(index + 1)
        if not (asked.startswith(before) and answered.startswith(asked)):
            given = "the tokenizer's chat template renders earlier turns anew with every further one"
            raise ValueError(f"{given}; accepted: one that only adds to them, or data of prompt and completion.")
        given = tokenizer(asked[len(before) :], add_special_tokens=False, verbose=False).input_ids
        target = tokenizer(answered[len(asked) :], add_special_tokens=False, verbose=False).input_ids
        behind = target[::-1].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in target else 0
        tokens += given + target
        labels += [IGNORE_INDEX] * len(given) + target[: len(target) - behind] + [IGNORE_INDEX] * behind
        before = answered
    return tokens, labels

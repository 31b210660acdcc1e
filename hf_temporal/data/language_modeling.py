"""Language modeling: plain text, prompt and completion, or chat messages, and which of their tokens are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .loading import (
    EMBEDDED_DATA,
    DataArguments,
    TaskData,
    check_column,
    check_texts,
    load_splits,
    named_columns,
    sha256_of,
)


@dataclass
class LanguageModelingArguments:
    """How long a row may be, and whether several share one."""

    block_size: int = field(
        default=1024,
        metadata={"help": "Tokens of a row at most: plain text is cut into such rows, the rest is cut off."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put the examples of a batch into one row without padding; none attends to another."},
    )

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size!r}: a whole number of at least 2 is accepted")


def load_texts(data_args: DataArguments, text_column: str | None = None) -> TaskData:
    """Load the columns "messages", "prompt" and "completion", or the text, whichever the train data have.

    The text is in `text_column`, or else in "text"; the embedded data's are the docstrings' bodies.

    Raises ValueError where there is none of these, or not in every split, or no texts in it.
    """
    splits, name, provenance = load_splits(data_args)
    columns = _columns(next(iter(splits.values())), text_column or ("body" if name == EMBEDDED_DATA else None))
    chosen = {}
    for split, examples in splits.items():
        for column in columns:
            argument = "text_column" if column == text_column else "column"
            check_column(argument, column, examples, split)
            if column != "messages" or column == text_column:
                check_texts(argument, column, examples, split)
        chosen[split] = named_columns(examples, split, columns, data_args.limits[split])
    return TaskData(chosen, name, sha256_of(chosen), provenance)


def _columns(examples: Dataset, text_column: str | None) -> dict[str, str]:
    """The columns that are read, and what they are called from there on."""
    if text_column is not None:
        return {text_column: "text"}
    for columns in (["messages"], ["prompt", "completion"], ["text"]):
        if all(column in examples.column_names for column in columns):
            return {column: column for column in columns}
    raise ValueError(
        f"the data have the columns {', '.join(examples.column_names)}; accepted: messages; prompt and completion; "
        "text; or --text_column"
    )


def encode_texts(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, arguments: LanguageModelingArguments
) -> dict[str, list[list[int]]]:
    """Rows of at most `arguments.block_size` tokens, with their labels.

    Of a text every token is a target, the end token behind it too; of prompt and completion the completion and its
    end token; of messages what the assistant says, up to the end token of each turn.

    Raises ValueError for a chat template from which the assistant's tokens cannot be told, and for messages of which
    it makes nothing.
    """
    size = arguments.block_size
    if "messages" in batch:
        rows = [_chat(messages, tokenizer) for messages in batch["messages"]]
    elif "prompt" in batch:
        texts = zip(batch["prompt"], batch["completion"], strict=True)
        rows = [_completion(prompt, completion, tokenizer) for prompt, completion in texts]
    else:
        closed = [[*_without_end(text, tokenizer), tokenizer.eos_token_id] for text in batch["text"]]
        blocks = [tokens[start : start + size] for tokens in closed for start in range(0, len(tokens), size)]
        rows = [(block, block) for block in blocks]
    return {
        "input_ids": [tokens[:size] for tokens, _ in rows],
        "attention_mask": [[1] * len(tokens[:size]) for tokens, _ in rows],
        "labels": [labels[:size] for _, labels in rows],
    }


def _without_end(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    given = _without_end(prompt, tokenizer)
    target = [*tokenizer(completion, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
    return given + target, [IGNORE_INDEX] * len(given) + target


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Each turn is tokenized apart, as it is when the model has to answer what came before."""
    if tokenizer.chat_template is None:
        raise ValueError("the data hold messages, and the tokenizer has no chat template; accepted: one that has it")
    if not (isinstance(messages, list) and all(isinstance(each, Mapping) and "role" in each for each in messages)):
        raise ValueError(f"messages hold {messages!r}; accepted: a list of mappings with role and content")

    def rendered(turns: int, *, answer: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=answer))
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"messages hold {messages[:turns]!r}, of which the tokenizer's chat template makes nothing ({error}); "
                "accepted: a list of mappings with role and content"
            ) from error

    tokens: list[int] = []
    labels: list[int] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = rendered(index, answer=True), rendered(index + 1)
        if not (asked.startswith(before) and answered.startswith(asked)):
            raise ValueError(
                "the tokenizer's chat template renders earlier turns anew with every further one, so that what the "
                "assistant says cannot be told apart; accepted: a template that only adds, or prompt and completion"
            )
        given = tokenizer(asked[len(before) :], add_special_tokens=False, verbose=False).input_ids
        target = tokenizer(answered[len(asked) :], add_special_tokens=False, verbose=False).input_ids
        end = len(target) - target[::-1].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in target else None
        learned = target[:end]
        tokens += given + target
        labels += [IGNORE_INDEX] * len(given) + learned + [IGNORE_INDEX] * (len(target) - len(learned))
        before = answered
    return tokens, labels

"""The forms in which people write down what a model is to say, as conversations or as prompts and completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from .chat import Conversation, Message
from .weights import read_weight

logger = logging.get_logger(__name__)

CHAT_COLUMNS = ("tools", "documents", "chat_template_kwargs")  # beside conversations
# The columns that tell a form, and those that may stand beside them; the first form whose columns are there counts.
FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("input_ids",): ("labels", "attention_mask"),
    ("messages",): CHAT_COLUMNS,
    ("conversations",): ("system", *CHAT_COLUMNS),
    ("prompt", "completion"): CHAT_COLUMNS,
    ("instruction", "output"): ("input",),
    ("text",): (),
}
TEXTS = ("system", "instruction", "input", "output", "text")  # columns that hold texts and nothing else
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
CALL = "function_call"  # ShareGPT's role of an assistant's call, which is a text of JSON
OWN_ROLES = ("system", "developer", "user", "assistant", "tool")

ALPACA = (
    "Below is an instruction that describes a task{input_said}. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT = ", paired with an input that provides further context"


def conversations_of(
    batch: Mapping[str, Sequence[Any]], names: Sequence[str], settings: Mapping[str, Any], *, train_on: str
) -> list[Conversation]:
    """The conversations of a batch with the columns of a form.

    Args:
        batch: columns of `FORMS`: messages, conversations, or prompt and completion that hold messages.
        names: what an error calls each row, such as "row 3 of train".
        settings: what every row's template gets beside its own `chat_template_kwargs`.
        train_on: "all" answers, or the "last".

    Raises:
        ValueError: by column, row and message, what is no message, a part that is no text, an unknown role, a weight
            that is no number of at least 0 or that belongs to no answer.
    """
    made = []
    for place, row in enumerate(names):
        values = {column: batch[column][place] for column in batch}
        prompt: list[Message] = []
        if "prompt" in values:
            column, prompt = "prompt and completion", _messages(values["prompt"], "prompt", row)
            messages = prompt + _messages(values["completion"], "completion", row)
        else:
            column = "messages" if "messages" in values else "conversations"
            first = [{"role": "system", "content": values["system"]}] if values.get("system") else []
            messages = first + _messages(values[column], column, row)
            if first and messages[1:2] and messages[1]["role"] == "system":
                raise ValueError(f"system and {column} of {row} both hold a system message; accepted: one of them.")
        answers = _answers(messages, column, row, context=len(prompt))
        learned = [index for index in answers if index >= len(prompt)]
        learned = learned[-1:] if train_on == "last" else learned
        weights = {index: answers[index] for index in learned if answers[index]}
        own = {each: _list(values[each], each, row) for each in ("tools", "documents") if values.get(each)}
        own = {each: given for each, given in own.items() if given}
        more = _json(values.get("chat_template_kwargs") or {}, f"chat_template_kwargs of {row}")
        if not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs of {row} is {more!r}; accepted: a mapping, or its JSON.")
        made.append(Conversation(messages, weights, {**settings, **own, **_without_nulls(more)}, column, row))
    return made


def _answers(messages: list[Message], column: str, row: str, *, context: int) -> dict[int, float]:
    """The weight of each answer, taken out of the messages; the first `context` messages are not learned."""
    answers = {}
    for index, message in enumerate(messages):
        where = f"weight of {column} of {row}, message {index},"
        weight = read_weight(message.pop("weight", 1), where)
        if message["role"] == "assistant":
            answers[index] = weight
        if (message["role"] != "assistant" or index < context) and weight not in (0, 1):
            accepted = "0 or 1 there, and any weight of an assistant's message that is learned"
            raise ValueError(f"{where} of the role {message['role']}, is {weight}; accepted: {accepted}.")
    return answers


def alpaca_prompts(batch: Mapping[str, Sequence[Any]]) -> list[str]:
    """The usual prompt of Stanford Alpaca's data, for columns instruction and, where there is one, input.

    Source: https://github.com/tatsu-lab/stanford_alpaca
    """
    prompts = []
    inputs = batch.get("input") or [None] * len(batch["instruction"])
    for instruction, given in zip(batch["instruction"], inputs, strict=True):
        parts = [ALPACA.format(input_said=ALPACA_INPUT if given else ""), f"### Instruction:\n{instruction}"]
        prompts.append("\n\n".join([*parts, *([f"### Input:\n{given}"] if given else []), "### Response:"]))
    return prompts


def _messages(value: Any, column: str, row: str) -> list[Message]:
    messages = []
    for index, given in enumerate(_list(value, column, row)):
        where = f"{column} of {row}, message {index}"
        message: Message = {key: each for key, each in given.items() if each is not None}
        if "from" in message and "value" in message:
            message = {"role": message.pop("from"), "content": message.pop("value"), **message}
        if not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where} is {given!r}; accepted: a mapping with role and content, or with from and value."
            )
        role = message["role"] = ROLES.get(message["role"], message["role"])
        if role == CALL:
            call = _json(message.pop("content", None), where)
            calls = call if isinstance(call, list) else [call]
            if not all(isinstance(each, Mapping) for each in calls):
                raise ValueError(f"{where} is {given!r}; accepted: a call with name and arguments, or its JSON.")
            called = [{"type": "function", "function": each} for each in calls]
            message = {**message, "role": "assistant", "tool_calls": called}
        elif role not in OWN_ROLES:
            raise ValueError(f"{where} is of role {role!r}; accepted: {', '.join((*OWN_ROLES, *ROLES, CALL))}.")
        if message.get("tool_calls"):
            message["tool_calls"] = _list(message["tool_calls"], "tool_calls", where)
        if "content" in message:
            message["content"] = _content(message["content"], column, f"message {index} of {row}")
        messages.append(message)
    return messages


def _content(content: Any, column: str, where: str) -> str | list[dict[str, str]]:
    """A content that is a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"{column} hold the content {content!r} ({where}), of which a chat template makes nothing; accepted: a "
            "text, null, or a list of text parts."
        )
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"{column} hold a part of type {kind!r} ({where}: {str(part)[:80]}); accepted: parts of type 'text'. "
                "To train on images, put the mixin in front of TRL's SFTTrainer."
            )
        parts.append({"type": "text", "text": text})
    return parts


def _list(value: Any, column: str, row: str) -> list[dict[str, Any]]:
    """A list of mappings, which may be given as JSON."""
    looks_like_json = isinstance(value, str) and value.lstrip().startswith("[")
    read = _json(value, f"{column} of {row}") if looks_like_json else value
    if not isinstance(read, (list, tuple)) or not all(isinstance(each, Mapping) for each in read):
        more = "" if column in (*CHAT_COLUMNS, "tool_calls") else " with role and content"
        given = repr(value)[:200]
        raise ValueError(f"{column} hold {given}; accepted: a list of mappings{more}, or its JSON ({row}).")
    return list(read) if isinstance(value, str) else [_without_nulls(each) for each in read]


def _json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is {value[:80]!r}, which is no JSON ({error}); accepted: JSON.") from error


def _without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        if any(each is None for each in value.values()):
            logger.warning_once(
                "Keys that are null in a conversation are left out: Parquet and Arrow write every key of one row into "
                "all rows, and a null that was meant cannot be told from one that only fills a row."
            )
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(each) for each in value]
    return value

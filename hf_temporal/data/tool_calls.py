"""Tool calls of messages: their arguments as a chat template reads them, and what it has to write of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

PROBE = {"place": "somewhere"}


def with_arguments_as_read(
    message: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tools: Any, name: str
) -> list[dict[str, Any]]:
    """The tool calls of a message, the arguments as a mapping or as its JSON, whichever the chat template reads.

    OpenAI's files hold JSON, which many templates would write in quotes once more; others take nothing else.

    Raises:
        ValueError: by `name`, arguments that are no mapping in JSON, for a template that reads mappings.
    """
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str) and not _reads(tokenizer, tools, as_json=True):
            arguments = _parsed(arguments, name)
        elif isinstance(arguments, Mapping) and not _reads(tokenizer, tools, as_json=False):
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            calls.append({**call})
            continue
        called = {**function, "arguments": arguments}
        calls.append({**call, "function": called} if "function" in call else called)
    return calls


_empty: dict[tuple[str, bool], dict[str, Any]] = {}


def no_content_as_read(tokenizer: PreTrainedTokenizerBase, tools: Any) -> dict[str, Any]:
    """A message that calls without words has no content, null, or an empty text, whichever the template reads."""
    key = str(tokenizer.chat_template), bool(tools)
    if key not in _empty:
        forms: list[dict[str, Any]] = [{}, {"content": None}, {"content": ""}]
        made = [[_written(tokenizer, tools, each, form) for each in (PROBE, json.dumps(PROBE))] for form in forms]
        taken = (form for form, texts in zip(forms, made, strict=True) if any(t and "None" not in t for t in texts))
        _empty[key] = next(taken, {})
    return _empty[key]


def said_by(calls: Any) -> list[str]:
    """What a template that writes tool calls writes: names, and the longest word of each text in the arguments."""
    said = []
    for call in calls or []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            texts = _texts_in(function.get("arguments"))
            words = [max(re.findall(r"\w+", text), key=len, default="") for text in texts]
            said += [str(function.get("name", "")), *words]
    return said


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for each in inner for text in _texts_in(each)]


def _parsed(arguments: str, name: str) -> Mapping[str, Any]:
    try:
        read = json.loads(arguments or "{}")
    except ValueError:
        read = None
    if not isinstance(read, Mapping):
        given = f"{name} has a tool call with the arguments {arguments[:80]!r}"
        raise ValueError(f"{given}, of which the chat template reads a mapping; accepted: a mapping, or its JSON.")
    return read


_read: dict[tuple[str, bool], tuple[bool, bool]] = {}


def _reads(tokenizer: PreTrainedTokenizerBase, tools: Any, *, as_json: bool) -> bool:
    """Whether arguments are left as they are, JSON or a mapping: where both are read, or neither, each is."""
    key = str(tokenizer.chat_template), bool(tools)
    if key not in _read:
        from_json, from_mapping = (_written(tokenizer, tools, each) for each in (json.dumps(PROBE), PROBE))
        _read[key] = (not from_mapping or from_json == from_mapping, bool(from_mapping) or not from_json)
    return _read[key][not as_json]


def _written(
    tokenizer: PreTrainedTokenizerBase, tools: Any, arguments: Any, content: Mapping[str, Any] | None = None
) -> str:
    """What the template makes of a call with these arguments; empty where it raises or leaves them out."""
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "a_function", "arguments": arguments}}
    messages: list[Any] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", **({"content": ""} if content is None else content), "tool_calls": [call]},
    ]
    try:
        made = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:  # noqa: BLE001 - a template may raise anything
        return ""
    return made if PROBE["place"] in made else ""

"""Random conversations, and what inference gives for each of their answers: the oracle of the encoder's tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.data.chat_templates import Family

Conversation = dict[str, Any]  # the columns of one row

PLAIN = [
    "What is the weather in Paris today?",
    "It is sunny in Paris.",
    "Be short, please.",
    "The value of x is 12.",
    "One more sentence",
    "First:\n\n1. add the numbers\n2. answer\n\nThat is all.",
    "Ein schöner Tag, 你好 🙂!",
]
ODD = [
    "", " ", "\n", "\n\nhello", "  two  spaces  ", "ends in a newline\n", "ends in two\n\n", "\tx\r\ny ", "user",
    "None", "assistant\n", "user: no\nassistant: yes", "### Response:\nno", " ASSISTANT: no", "model", "'s", "-100",
    "[/INST] no [INST]", "</think>", "<think>\nhm\n</think>\n\nSo it is 12.", "<think></think>x", "a <think> b",
    "ends in </think>\n\n", "{{ messages }}", "{% if x %}", '{"name": "get_weather"}', "e\u0301 ﬁ Ａ",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u00a0 \u200b", "▁x ▁", "<tool_call>\n</tool_call>", "<|im_end|>",
    "a</s>b", "<|end|>", ">", "|>\n", "12 345", "\u2028", "<0x0A>", "<unk>", "##s",
]  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": "About " + name, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "which"}}, "required": ["city"]}}}
    for name in ("get_weather", "get_time")
]  # fmt: skip
ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Paris"},
    {"city": "Zürich <b> 'x'", "days": 2},
    {},
    {"of": {"a": [1, None]}},
]

NOTHING = "the template writes no answer"

contents = st.one_of(
    st.sampled_from(PLAIN), st.sampled_from(ODD), st.builds(str.__add__, st.sampled_from(ODD), st.sampled_from(PLAIN))
)
weights = st.sampled_from([None, None, 0, 0.5, 2, 1])


@st.composite
def plain_conversations(draw: st.DrawFn) -> Conversation:
    """User and assistant in turn, one to three times, nothing odd: no template may refuse them."""
    rounds = draw(st.integers(1, 3))
    sentences = st.sampled_from(PLAIN)
    messages = [{"role": role, "content": draw(sentences)} for _ in range(rounds) for role in ("user", "assistant")]
    return {"messages": messages}


@st.composite
def _answers(draw: st.DrawFn, content: Any, thoughts: Any, *, calling: bool) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    if calling and draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(["get_weather", "get_time"]), min_size=1, max_size=2))
        calls: list[dict[str, Any]] = [
            {"id": f"call{place}xxxx", "type": "function", "function": {"name": name, "arguments": arguments}}
            for place, name in enumerate(names)
            for arguments in [draw(st.sampled_from(ARGUMENTS))]
        ]
        said = draw(st.one_of(st.none(), st.just(""), contents))
        answers.append(
            {"role": "assistant", "content": said, "tool_calls": calls, "reasoning_content": draw(thoughts)}
        )
        answers += [
            {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": draw(contents)}
            for call in calls
        ]
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2]))):
        answers.append({"role": "assistant", "content": draw(content), "reasoning_content": draw(thoughts)})
    return answers


@st.composite
def conversations(draw: st.DrawFn, *, weighted: bool = False) -> Conversation:
    """Everything that people's files hold; values that are None stand for keys that are not there."""
    parts = st.lists(contents, min_size=1, max_size=2).map(lambda texts: [{"type": "text", "text": x} for x in texts])
    content = draw(st.sampled_from([st.sampled_from(PLAIN), contents, contents, st.one_of(contents, parts)]))
    thoughts = draw(st.sampled_from([st.none(), st.none(), st.sampled_from([None, "I think: 12.", "\nhm\n", ""])]))
    calling = draw(st.sampled_from([False, False, True]))
    messages: list[dict[str, Any]] = []
    if draw(st.integers(0, 3)) == 0:
        messages.append({"role": "system", "content": draw(content)})
    for _ in range(draw(st.integers(1, 4))):
        users = draw(st.sampled_from([1, 1, 1, 1, 1, 2]))
        messages += [{"role": "user", "content": draw(content)} for _ in range(users)]
        messages += draw(_answers(content, thoughts, calling=calling))
    if draw(st.integers(0, 7)) == 0:
        messages.append({"role": "user", "content": draw(content)})
    for message in messages:
        if weighted and message["role"] == "assistant":
            message["weight"] = draw(weights)
    messages = [{k: v for k, v in each.items() if v is not None or k == "content"} for each in messages]
    if draw(st.sampled_from([False, False, True])):
        messages = [with_arguments(message, as_json=True) for message in messages]
    conversation: Conversation = {"messages": messages}
    if any(message.get("tool_calls") for message in messages):
        conversation["tools"] = TOOLS
    return conversation


@dataclass(frozen=True)
class Expected:
    """What inference gives for one answer: the prompt's tokens and the text that has to be produced behind it."""

    index: int  # of the message
    prompt: list[int]
    answer: str
    tokens: list[int]  # of prompt, answer and whatever the template writes behind it
    spanning: str  # why the two are not tokenized together as they are one after the other, "" where they are


class CannotBeLearnedError(Exception):
    """The prompt of inference and this answer do not fit together, and why."""


def joined(content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def with_arguments(message: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """The message with the arguments of its tool calls as JSON, which OpenAI's files hold, or as a mapping."""
    if "tool_calls" not in message:
        return message
    read = [json.loads(given) if isinstance(given := call["function"]["arguments"], str) else given
            for call in message["tool_calls"]]  # fmt: skip
    arguments = [json.dumps(each, ensure_ascii=False) if as_json else each for each in read]
    calls = [
        {**call, "function": {**call["function"], "arguments": given}}
        for call, given in zip(message["tool_calls"], arguments, strict=True)
    ]
    return {**message, "tool_calls": calls}


def variants(family: Family, messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages in every form in which the template may be given them, the most natural one first."""
    forms = _forms_of_content(family, [with_arguments(message, as_json=False) for message in messages])
    return forms + [[with_arguments(message, as_json=True) for message in form] for form in forms]


def _forms_of_content(family: Family, messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    strings = [{**message, "content": joined(message["content"])} for message in messages]
    as_parts = [
        {**each, "content": [{"type": "text", "text": each["content"]}] if isinstance(each["content"], str) else None}
        for each in strings
    ]
    if family.content == "parts":
        return [[{**m, "content": s["content"] if isinstance(m["content"], str) else m["content"]}
                 for m, s in zip(messages, as_parts, strict=True)], as_parts]  # fmt: skip
    filled = [{**message, "content": message["content"] or ""} for message in strings]
    return [strings, filled, *([messages, as_parts] if family.content == "either" else [])]


def rendered(
    tokenizer: PreTrainedTokenizerFast, row: Conversation, stop: int | None = None, *, prompt: bool = False, **how: Any
) -> Any:
    """The template's text, or its tokens, for the messages before `stop`."""
    options = {"tokenize": False, **(row.get("chat_template_kwargs") or {}), **how}
    # a null says the same as no key: newer releases of transformers leave it out themselves
    messages = [{key: each for key, each in message.items() if each is not None} for message in row["messages"][:stop]]
    return tokenizer.apply_chat_template(messages, row.get("tools"), add_generation_prompt=prompt, **options)


def expected(family: Family, tokenizer: PreTrainedTokenizerFast, row: Conversation, index: int) -> Expected:
    """What the model is given and has to produce for message `index`.

    Raises:
        CannotBeLearnedError: if it is given something else than what the template then writes in front of the answer.
    """
    messages = row["messages"]
    try:
        asked = rendered(tokenizer, row, index, prompt=True)
        prompt = rendered(tokenizer, row, index, prompt=True, tokenize=True, return_dict=False)
        answered = rendered(tokenizer, row, index + 1)
    except Exception as error:
        raise CannotBeLearnedError("the template raises") from error
    said = str(joined(messages[index].get("content")) or "").lstrip()
    if not answered.startswith(asked) and asked.endswith("<think>\n") and said.startswith("<think>") and family.ends:
        opened = said.removeprefix("<think>").removeprefix("\n") + family.ends[0]  # as R1's model has written it
        return Expected(index, prompt, opened, prompt, "the template drops the thought")
    if not answered.startswith(asked):
        raise CannotBeLearnedError("the prompt is not what stands before the answer")
    written = answered[len(asked) :]
    answer = family.answer(messages, index) if family.answer else _up_to_the_end(written, family.ends)
    if answer is None or not written.startswith(answer):
        raise AssertionError(f"the test's own answer {answer!r} is not what {family.name} writes: {written!r}")
    tokens = tokenizer(answered, add_special_tokens=False).input_ids
    closed = tokenizer(asked + answer, add_special_tokens=False).input_ids
    if tokens[: len(prompt)] != prompt:
        return Expected(index, prompt, answer, tokens, "a token spans prompt and answer")
    if len(closed) <= len(prompt):
        raise CannotBeLearnedError(NOTHING)
    return Expected(
        index, prompt, answer, tokens, "" if tokens[: len(closed)] == closed else "a token spans the answer's end"
    )


def _up_to_the_end(written: str, ends: tuple[str, ...]) -> str:
    stops = [written.rindex(end) + len(end) for end in ends if end in written]
    return written[: max(stops)] if stops else written


def may_be_refused(family: Family, tokenizer: PreTrainedTokenizerFast, row: Conversation, index: int) -> str | None:
    """A reason to refuse message `index` although it could be learned: something of it would be lost in silence."""
    message = row["messages"][index]
    said = joined(message.get("content")) or ""
    whole = family.answer(row["messages"], index) if family.answer else None
    if message.get("tool_calls") and not family.calls:
        return "tool calls are not written"
    if (message.get("reasoning_content") or "</think>" in said) and not family.thinks:
        return "thinking is not written"
    if "</think>" in said and not said.split("</think>")[0].split("<think>")[-1].strip():
        return "an empty thought is written otherwise"
    if family.answer is None:
        try:
            asked = rendered(tokenizer, row, index, prompt=True)
            whole = rendered(tokenizer, row, index + 1)[len(asked) :]
        except Exception:  # noqa: BLE001 - a template may raise anything
            return "the template raises"
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    thought = (message.get("reasoning_content") or "").strip()
    if not all(each in str(whole) for each in (said.split("</think>")[-1].strip(), thought, *names)):
        return "the template leaves something out"
    if any(str(whole).count(name) < names.count(name) for name in names):
        return "the template leaves a call out"
    return None


def answers_of(row: Conversation, train_on: str) -> list[int]:
    """The places of the messages to be learned."""
    places = [place for place, each in enumerate(row["messages"]) if each["role"] == "assistant"]
    if train_on == "last":
        places = places[-1:]
    return [place for place in places if row["messages"][place].get("weight") != 0]


def squashed(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    """The tokens as text without white space, which not every tokenizer gives back."""
    return "".join(str(tokenizer.decode(tokens)).replace("▁", " ").lower().split())

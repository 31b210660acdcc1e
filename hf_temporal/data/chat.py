"""Conversations as rows: which tokens are an answer, and whether the model will be given what stands before them."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .rows import Row
from .tokenizing import continued, tokenize
from .tool_calls import no_content_as_read, said_by, with_arguments_as_read
from .weights import Pattern, spread

Message = dict[str, Any]
PROBE = "a text to be found again"
OPENING = 40  # characters at the end of a prompt that may begin an answer, such as <think>
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys that transformers gives a template as one
OF_EVERY_TEMPLATE = ("messages", "add_generation_prompt", "raise_exception", "strftime_now")


@dataclass(frozen=True)
class Conversation:
    """Messages, of which some answers are learned.

    `answers` has the index and the weight of each answer that is learned, `settings` what else the template gets
    (`tools`, `documents`, arguments of its own), and `column` and `row` are what an error calls the conversation.
    """

    messages: list[Message]
    answers: dict[int, float]
    settings: dict[str, Any]
    column: str
    row: str

    def where(self, message: int) -> str:
        """What an error calls a message."""
        return f"{self.column} of {self.row}, message {message}"


class Answer(NamedTuple):
    """An answer as text: what the model is given, what it has to write, and up to where that is learned."""

    message: int  # its index
    prompt: str
    text: str
    end: int  # characters of `text` up to the end of the turn, that included
    lead: int  # where the last special token of the prompt begins, before which nothing depends on what follows


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, patterns: Sequence[Pattern] = ()
) -> list[list[Row]]:
    """The rows of each conversation, in which the answers are the targets.

    A conversation is rendered as a whole and tokenized once. An answer begins where the tokens end that
    `apply_chat_template(messages_before, add_generation_prompt=True)` gives at inference, which is checked token by
    token, and ends with the token that ends its turn. Where a template renders earlier turns anew, or the tokenizer
    joins an answer with the end of its prompt, so that no row holds all answers in the context that the model is
    given, there is a row for each context. A conversation without an answer to learn makes one empty row.

    Args:
        conversations: what `formats.conversations_of` makes of a batch.
        tokenizer: one with a chat template and with character offsets.
        patterns: the weights of spans of the answers.

    Raises:
        ValueError: by the name of the conversation and the number of its message: a template that raises, that leaves
            a part of an answer out, or whose prompt is no beginning of what it writes; an answer at the very start.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the data hold conversations, and the tokenizer has no chat template; accepted: a tokenizer that has one, "
            "or --chat_template FILE."
        )
    ends = _ends(tokenizer, _tokens_of_template(tokenizer))
    grouped: list[list[list[Answer]]] = []
    for conversation in conversations:
        _check_settings(conversation, tokenizer)
        _give_as_it_is_read(conversation, tokenizer)
        grouped.append(_in_one_context(_answers(conversation, tokenizer, ends)))
    every = [group for groups in grouped for group in groups]
    encoded = iter(tokenize(tokenizer, [group[-1].prompt + group[-1].text for group in every]))
    leads = [*{answer.prompt[answer.lead :] for group in every for answer in group}]  # mostly the same few
    lead_ids = {lead: lead_encoded.ids for lead, lead_encoded in zip(leads, tokenize(tokenizer, leads), strict=True)}
    rows: list[list[Row]] = []
    for conversation, groups in zip(conversations, grouped, strict=True):
        made = [] if groups else [Row([], [])]
        for group in groups:
            whole = next(encoded)
            starts = [_start(whole, answer, lead_ids[answer.prompt[answer.lead :]]) for answer in group]
            within = [(answer, start) for answer, start in zip(group, starts, strict=True) if start is not None]
            if within:
                made.append(_row(whole.ids, whole.offsets, within, conversation, patterns))
            alone = [answer for answer, start in zip(group, starts, strict=True) if start is None]
            made += [_row_of_one(answer, conversation, patterns, tokenizer) for answer in alone]
        rows.append(made)
    return rows


def _start(whole: Any, answer: Answer, lead: list[int]) -> int | None:
    """Where an answer begins in the encoding of its conversation; None if its prompt has other tokens by itself.

    A tokenizer splits a text at special tokens first, so that the tokens before the last one in the prompt are those
    of the prompt alone. From there on, they are compared with those of the prompt's end, `lead`.
    """
    first = whole.char_to_token(answer.lead)
    if first is None or whole.ids[first : first + len(lead)] != lead:
        return None
    return int(first) + len(lead)


def _row(
    tokens: list[int],
    offsets: list[tuple[int, int]],
    answers: list[tuple[Answer, int]],
    conversation: Conversation,
    patterns: Sequence[Pattern],
) -> Row:
    """A row of answers, each with the place where it begins among the tokens."""
    labels, weights = [IGNORE_INDEX] * len(tokens), [0.0] * len(tokens)
    starts = [start for start, _ in offsets]
    for answer, start in answers:
        first = len(answer.prompt)
        end = bisect_left(starts, first + answer.end, lo=start)
        spans = [(begin - first, stop - first) for begin, stop in offsets[start:end]]
        labels[start:end] = tokens[start:end]
        weight = conversation.answers[answer.message]
        weights[start:end] = spread(answer.text[: answer.end], spans, weight, patterns)
    is_weighted = bool(patterns) or any(weight != 1 for weight in conversation.answers.values())
    return Row(tokens, labels, weights if is_weighted else None)


def _row_of_one(
    answer: Answer, conversation: Conversation, patterns: Sequence[Pattern], tokenizer: PreTrainedTokenizerBase
) -> Row:
    """The row of one answer behind the tokens of its prompt."""
    name, first = conversation.where(answer.message), len(answer.prompt)
    asked, whole = tokenize(tokenizer, [answer.prompt, answer.prompt + answer.text])
    tokens, spans = continued(asked.ids, answer.prompt, answer.text, whole, tokenizer, name)
    offsets = [*asked.offsets, *((start + first, end + first) for start, end in spans)]
    return _row([*asked.ids, *tokens], offsets, [(answer, len(asked.ids))], conversation, patterns)


def _check_settings(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the template reads what it is given: tools that it leaves out would be trained on in silence."""
    if taken := {"messages", "add_generation_prompt"} & {*conversation.settings}:
        raise ValueError(
            f"chat_template_kwargs for the {conversation.column} of {conversation.row} hold "
            f"{', '.join(sorted(taken))}, which the rows are made with; accepted: other arguments of the template."
        )
    try:
        template = str(tokenizer.get_chat_template(tools=conversation.settings.get("tools")))
    except ValueError as error:
        where = f"the {conversation.column} of {conversation.row}"
        accepted = "a tokenizer with a default template, or --chat_template FILE"
        raise ValueError(
            f"none of the tokenizer's chat templates is for {where} ({error}); accepted: {accepted}."
        ) from error
    known = _variables(template)
    for name in conversation.settings:
        if known and name not in known:
            accepted = ", ".join(sorted(known - {*OF_EVERY_TEMPLATE, *tokenizer.special_tokens_map})) or "nothing else"
            raise ValueError(
                f"{name}, for the {conversation.column} of {conversation.row}, is nothing that the chat template "
                f"reads; it reads: {accepted}. Accepted: another template (--chat_template FILE), or data without "
                f"{name}."
            )


def _give_as_it_is_read(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the contents texts, or lists of parts, whichever the template writes; both are the same at inference."""
    for index, message in enumerate(conversation.messages):
        if message.get("tool_calls"):
            where, tools = conversation.where(index), conversation.settings.get("tools")
            message["tool_calls"] = with_arguments_as_read(message, tokenizer, tools, where)
            if "content" not in message:
                message |= no_content_as_read(tokenizer, tools)
        content = message.get("content")
        if isinstance(content, list) and not _writes(tokenizer, as_parts=True):
            message["content"] = "".join(_texts(content))
        elif isinstance(content, str) and not _writes(tokenizer, as_parts=False) and _writes(tokenizer, as_parts=True):
            message["content"] = [{"type": "text", "text": content}]


_written: dict[tuple[str, bool], bool] = {}


def _writes(tokenizer: PreTrainedTokenizerBase, *, as_parts: bool) -> bool:
    """Whether the template writes a content that is a list of parts, or that is a text, as what it says."""
    key = str(tokenizer.chat_template), as_parts
    if key not in _written:
        content: Any = [{"type": "text", "text": PROBE}] if as_parts else PROBE
        try:
            made = str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        except Exception:  # noqa: BLE001 - a template may raise anything
            made = ""
        _written[key] = PROBE in made and "'type'" not in made and '"type"' not in made
    return _written[key]


@cache
def _variables(template: str) -> frozenset[str]:
    """The names that a template reads; empty where its syntax is none of plain Jinja's."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)  # only parses
    try:
        tree = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(tree))


def _answers(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, ends: Ends) -> list[Answer]:
    """The answers to learn, each rendered as the last message of its conversation."""
    messages, indices = conversation.messages, [*conversation.answers]
    if not indices:
        return []
    if indices[0] == 0:
        raise ValueError(
            f"{conversation.where(0)}: an answer to nothing, before which the model is given no message; "
            "accepted: a message before it, or weight 0, so that it is context alone."
        )
    prompts = _render(conversation, [messages[:index] for index in indices], tokenizer, prompt=True)
    whole = _render(conversation, [messages[: index + 1] for index in indices], tokenizer, prompt=False)
    answers = []
    for index, prompt, rendered in zip(indices, prompts, whole, strict=True):
        message, name = messages[index], conversation.where(index)
        text = rendered[len(prompt) :] if rendered.startswith(prompt) else _opened(prompt, rendered, message, name)
        _check_written(message, prompt[-OPENING:] + text, name)
        lead = max([0, *(prompt.rfind(token) for token in ends.tokens)])
        answers.append(Answer(index, prompt, text, _end_of_turn(message, text, ends), lead))
    return answers


def _render(
    conversation: Conversation, parts: list[list[Message]], tokenizer: PreTrainedTokenizerBase, *, prompt: bool
) -> list[str]:
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **conversation.settings}
    made: list[str] = []
    try:
        made.extend(str(tokenizer.apply_chat_template(part, **how)) for part in parts)
    except Exception as error:  # a template may raise anything
        last, role = len(parts[len(made)]) - 1, parts[len(made)][-1]["role"]
        raise ValueError(
            f"{conversation.column} hold a message of the role {role} (message {last} of {conversation.row}) of "
            f"which, behind those before it, the chat template makes nothing ({type(error).__name__}: {error}); "
            "accepted: messages that it takes, or another template (--chat_template FILE)."
        ) from error
    return made


def _opened(prompt: str, rendered: str, message: Message, name: str) -> str:
    """The text of an answer whose beginning, such as <think>, stands in the prompt and not in what is rendered.

    The template drops it, and what belongs to it, from an answer that is over. The model has to write the message's
    own content from there on.
    """
    pairs = enumerate(zip(prompt, rendered, strict=False))
    common = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(rendered)))
    opening, written = prompt[common:], rendered[common:]
    content = message.get("content")
    if not opening.strip() or not isinstance(content, str) or not content.lstrip().startswith(opening.strip()):
        raise ValueError(
            f"{name}: the chat template renders earlier turns anew with the answer behind them: the prompt ends in "
            f"{prompt[-40:]!r}, behind which it does not write the answer; accepted: an answer whose content begins "
            "like that end, arguments of the template that leave it out (--chat_template_kwargs), or another template "
            "(--chat_template FILE)."
        )
    answer = content.lstrip()[len(opening.strip()) :].rstrip()
    if opening.endswith("\n"):
        answer = answer.removeprefix("\n")
    shown = next((size for size in range(len(written), 0, -1) if answer.endswith(written[:size].strip())), 0)
    return answer + written[:shown][len(written[:shown].rstrip()) :] + written[shown:]


def _check_written(message: Message, text: str, name: str) -> None:
    """Check that a template has written all that the message says, be it that the end of the prompt begins it."""
    said = {"content": message.get("content"), "tool_calls": said_by(message.get("tool_calls"))}
    reasoning = next((key for key in REASONING if message.get(key)), None)
    if reasoning is not None:
        said[reasoning] = message[reasoning]
    for key, values in said.items():
        for value in _texts(values):
            if value in text or _squeezed(value) in _squeezed(text):
                continue
            if json.dumps(value)[1:-1] in text or json.dumps(value, ensure_ascii=False)[1:-1] in text:
                continue
            raise ValueError(
                f"{name}: the chat template leaves out its {key} ({value[:80]!r}), or a part of it; accepted: "
                "messages that it writes as a whole, or another template (--chat_template FILE)."
            )


def _texts(content: Any) -> list[str]:
    parts = [content] if isinstance(content, str) else content or []
    return [part if isinstance(part, str) else part["text"] for part in parts]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _tokens_of_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special and added tokens that have a name, such as eos_token, or that stand in the chat template."""
    named = [text for text in tokenizer.special_tokens_map.values() if isinstance(text, str)]
    template = str(tokenizer.chat_template)
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return [text for text in tokens if text.strip() and (text in named or text in template)]


def ends_a_turn(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token may be the end of a turn: a special or an added one."""
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


class Ends(NamedTuple):
    """What may end a turn in a tokenizer's chat template."""

    usual: str  # what stands behind an answer in words; empty where that is white space alone
    tokens: Sequence[str]  # special and added tokens


def _ends(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Ends:
    probe: Any = PROBE if _writes(tokenizer, as_parts=False) else [{"type": "text", "text": PROBE}]
    messages = [{"role": role, "content": probe} for role in ("user", "assistant")]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - a template may raise anything
        text = ""
    behind = text.rpartition(PROBE)[2] if text.count(PROBE) >= 2 else ""
    usual = re.match(rf"\s*((?:{'|'.join(map(re.escape, tokens))})+)", behind) if tokens else None
    return Ends(usual.group(1) if usual else "", tokens)


def _end_of_turn(message: Message, text: str, ends: Ends) -> int:
    """Where an answer's turn ends: behind what usually ends one, or else behind the last special or added token.

    What follows is learned no more: a newline, or the end of the whole conversation. Without any such token, the white
    space at the end is none of the turn, unless it is the message's own.
    """
    place = text.rfind(ends.usual) if ends.usual else -1
    if place >= 0:
        return place + len(ends.usual)
    said = next((part.strip() for part in reversed(_texts(message.get("content"))) if part.strip()), "")
    stripped = len(text.rstrip())
    behind = text.rfind(said) + len(said) if said in text and not message.get("tool_calls") else 0
    last, size = max(((text.rfind(token), len(token)) for token in ends.tokens), default=(-1, 0))
    if last >= 0 and (last >= behind or last + size == stripped):
        return last + size
    return stripped if stripped > behind else len(text)


def _in_one_context(answers: list[Answer]) -> list[list[Answer]]:
    """Answers in groups, each of which one text holds: every prompt goes on where the answer before it ended."""
    groups: list[list[Answer]] = []
    for answer in answers:
        before = groups[-1][-1] if groups else None
        if before is not None and answer.prompt.startswith(before.prompt + before.text[: before.end]):
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups

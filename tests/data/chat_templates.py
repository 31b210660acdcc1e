"""Chat templates of many families, each with a function that says what the model has to produce for one message.

They are written from the documented shape of each family; none is a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Answer = Callable[[list[Message], int], "str | None"]


@dataclass(frozen=True, repr=False)
class Family:
    """One template; `answer(messages, i)` is what has to be produced behind `messages[:i]`, None where nothing can be.

    `answer` is None for templates whose own rendering is the only authority (TRL's files); the turn's end is one of
    `ends` there. `content` says what the template takes: a string, a list of parts, or either.
    """

    name: str
    template: str
    answer: Answer | None
    ends: tuple[str, ...]
    eos: str = "<|endoftext|>"
    bos: str = "<s>"
    content: str = "string"
    calls: bool = False  # tool calls are written
    thinks: bool = False  # reasoning_content is written
    refuses_plain: bool = False  # not even a plain conversation is written as the model would have to answer
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found = re.findall(r"<\|?/?[^<>\s'\"|{}%]{2,40}\|?>|\[/?[A-Z_]{4,}\]", self.template)
        object.__setattr__(self, "tokens", tuple(dict.fromkeys([*self.ends, *found, *self.tokens])))

    def __repr__(self) -> str:
        return self.name


def text(message: Message) -> str:
    return str(message.get("content") or "")


def _said(end: str, before: str = "", *, trim: bool = False) -> Answer:
    def answer(messages: list[Message], index: int) -> str:
        content = text(messages[index])
        return before + (content.strip() if trim else content) + end

    return answer


def _nothing(_messages: list[Message], _index: int) -> None:
    """The prompt opens a thought, and the template writes none."""


CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MARKED = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}{{ (message.content or '') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """\
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- for message in messages[first:] %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles have to alternate') }}{% endif %}
{%- if message.role == 'user' %}
{%- set asked = message.content.strip() %}
{%- if first and loop.first %}{% set asked = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' + asked %}{% endif %}
{{- bos_token + '[INST] ' + asked + ' [/INST]' }}
{%- else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

LLAMA3 = """\
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set rest = messages[1:] %}{% endif %}
{%- if tools %}{{ '\nFunctions:\n' + tools | tojson }}{% endif %}{{ '<|eot_id|>' }}
{%- for message in rest %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('One call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def _llama3(messages: list[Message], index: int) -> str | None:
    calls = messages[index].get("tool_calls")
    if not calls:
        return text(messages[index]).strip() + "<|eot_id|>"
    call = calls[0]["function"]
    return f'{{"name": "{call["name"]}", "parameters": {json.dumps(call["arguments"], ensure_ascii=False)}}}<|eot_id|>'


GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles have to alternate') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set turns = namespace(count=0) %}
{%- set last_user = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{%- if (message.role == 'user') != (turns.count % 2 == 0) %}{{ raise_exception('Roles have to alternate') }}{% endif %}
{%- set turns.count = turns.count + 1 %}
{%- endif %}
{%- if message.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + message.content + '[/SYSTEM_PROMPT]' }}
{%- elif message.role == 'user' %}
{%- if tools and message == last_user %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- ', ' if not loop.first else '' }}{{ call.function | tojson }}
{%- endfor %}{{ ']' + eos_token }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""


def _mistral(messages: list[Message], index: int) -> str | None:
    calls = messages[index].get("tool_calls")
    if not calls:
        return f" {text(messages[index])}</s>"
    return "[TOOL_CALLS] [" + ", ".join(json.dumps(call["function"], ensure_ascii=False) for call in calls) + "]</s>"


QWEN3 = """\
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set query = namespace(last=0) %}
{%- for message in messages if message.role == 'user' %}{% set query.last = messages.index(message) %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set said = message.content if message.content is string else '' %}
{%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
{%- if not thought and '</think>' in said %}
{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > query.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
{%- else %}{{ said }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n' if not loop.first or said else '' }}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The same with a prompt that opens the thought, as DeepSeek-R1's and the thinking Qwen3.5's.
THOUGHT_OPENED = QWEN3.replace(
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n'",
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n'",
)


def _thought_and_said(message: Message) -> tuple[str, str]:
    thought, said = message.get("reasoning_content") or "", text(message)
    if not thought and "</think>" in said:
        head, said = said.split("</think>")[0], said.split("</think>")[-1]
        thought, said = head.rstrip("\n").split("<think>")[-1].lstrip("\n"), said.lstrip("\n")
    return thought, said


def _qwen3(messages: list[Message], index: int) -> str | None:
    """The message that has to be answered is the last one, so its thought is written, even an empty one."""
    thought, said = _thought_and_said(messages[index])
    written = said.lstrip("\n")
    queries = [place for place, each in enumerate(messages[: index + 1]) if each["role"] == "user"]
    last = messages.index(messages[queries[-1]]) if queries else 0
    written = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{written}" if index > last else said
    for place, call in enumerate(messages[index].get("tool_calls") or []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        written += "\n" if place or said else ""
        written += f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return written + "<|im_end|>"


def _thought_opened(messages: list[Message], index: int) -> str | None:
    written = _qwen3(messages, index)
    return written.removeprefix("<think>\n") if written and written.startswith("<think>\n") else None


R1 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

PHI = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

ZEPHYR = """\
{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

COMMAND = """\
{{- bos_token }}
{%- set names = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM', 'tool': 'SYSTEM'} %}
{%- for message in messages %}
{{- '<|START_OF_TURN_TOKEN|><|' + names[message.role] + '_TOKEN|>' + message.content.strip() }}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

HARMONY = """\
{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') }}
{%- if tools %}{{ '\n' + tools | tojson }}{% endif %}{{ '<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set last = loop.last and not add_generation_prompt %}
{%- if message.reasoning_content and (last or message.tool_calls) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.reasoning_content + '<|end|>' }}
{%- endif %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if last else '<|end|>') }}
{%- endif %}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions.' + message.name + ' to=assistant<|message|>' + message.content + '<|end|>' }}
{%- else %}
{%- set role = 'developer' if message.role == 'system' else message.role %}
{{- '<|start|>' + role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


def _harmony(messages: list[Message], index: int) -> str | None:
    message = messages[index]
    thought = message.get("reasoning_content") or ""
    before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if not message.get("tool_calls"):
        return f"{before}<|channel|>final<|message|>{text(message)}<|return|>"
    call = message["tool_calls"][0]["function"]
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return f"{before} to=functions.{call['name']}<|channel|>commentary json<|message|>{arguments}<|call|>"


GLM = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
{{- '<|' + ('observation' if message.role == 'tool' else message.role) + '|>\n' + message.content.strip() }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

MERGING = """\
{%- for message in messages %}
{%- if loop.first or message.role != messages[loop.index0 - 1].role %}{{ '<|im_start|>' + message.role + '\n' }}
{%- else %}{{ '\n' }}{% endif %}
{{- message.content }}
{%- if loop.last or message.role != messages[loop.index0 + 1].role %}{{ '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def _merging(messages: list[Message], index: int) -> str | None:
    """An answer behind an answer goes on in the same turn, which no prompt asks for."""
    if index and messages[index - 1]["role"] == "assistant":
        return None
    return text(messages[index]) + "<|im_end|>"


HEADINGS = """\
{%- set names = {'user': 'Instruction', 'assistant': 'Response', 'system': 'Setting', 'tool': 'Result'} %}
{%- for message in messages %}
{%- set end = eos_token if message.role == 'assistant' else '' %}
{{- '### ' + names[message.role] + ':\n' + message.content + end + '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""

VICUNA = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ ' ASSISTANT: ' + message.content + eos_token }}
{%- elif message.role == 'user' %}{{ 'USER: ' + message.content }}
{%- else %}{{ message.content + ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""

PARTS = """\
{%- for message in messages %}{{ message.role | capitalize + ': ' }}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{{- '<end_of_utterance>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def _parts(messages: list[Message], index: int) -> str | None:
    content = messages[index].get("content") or ""
    written = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return f" {written}<end_of_utterance>"


ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
FAMILIES = [
    Family("chatml", CHATML, _said("<|im_end|>"), ("<|im_end|>",)),
    Family("marked", MARKED, _said("<|im_end|>"), ("<|im_end|>",)),
    Family("llama2", LLAMA2, _said(" </s>", " ", trim=True), ("</s>",), "</s>"),
    Family("llama3", LLAMA3, _llama3, ("<|eot_id|>",), "<|end_of_text|>", "<|begin_of_text|>", calls=True),
    Family("gemma", GEMMA, _said("<end_of_turn>", trim=True), ("<end_of_turn>",), "<eos>", "<bos>"),
    Family("mistral", MISTRAL, _mistral, ("</s>",), "</s>", calls=True),
    Family("qwen3", QWEN3, _qwen3, ("<|im_end|>",), "<|im_end|>", calls=True, thinks=True),
    Family("thought-opened", THOUGHT_OPENED, _thought_opened, ("<|im_end|>",), "<|im_end|>", calls=True, thinks=True,
           refuses_plain=True),
    Family("r1", R1, _nothing, ("<|eos|>",), "<|eos|>", refuses_plain=True),
    Family("phi", PHI, _said("<|end|>"), ("<|end|>",), tokens=ROLES),
    Family("zephyr", ZEPHYR, _said("</s>"), ("</s>",), "</s>"),
    Family("command", COMMAND, _said("<|END_OF_TURN_TOKEN|>", trim=True), ("<|END_OF_TURN_TOKEN|>",),
           tokens=("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")),
    Family("harmony", HARMONY, _harmony, ("<|return|>", "<|call|>"), "<|return|>", calls=True, thinks=True),
    Family("glm", GLM, _said("", "\n", trim=True), (), tokens=(*ROLES, "<|observation|>")),
    Family("merging", MERGING, _merging, ("<|im_end|>",), "<|im_end|>"),
    Family("headings", HEADINGS, _said("</s>"), ("</s>",), "</s>"),
    Family("vicuna", VICUNA, _said("</s>", " "), ("</s>",), "</s>"),
    Family("parts", PARTS, _parts, ("<end_of_utterance>",), "</s>", content="parts"),
]  # fmt: skip

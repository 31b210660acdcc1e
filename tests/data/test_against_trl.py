"""What TRL's SFTTrainer learns of the same conversations with assistant_only_loss, and where it is something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data.conversations import TOOLS, Conversation, variants
from tests.data.test_conversations import encode, runs, tokenizer_for
from tests.data.trl_chat_templates import FAMILIES
from tests.tiny_models import tiny_model

trl = pytest.importorskip("trl", minversion="1.16.0")
from datasets import Dataset  # noqa: E402

BY_NAME = {family.name.removeprefix("trl-"): family for family in FAMILIES}
NO_MARKERS = [name for name in BY_NAME if name.startswith(("gemma4", "llama3_"))]  # TRL has no marked variant


@dataclass(frozen=True)
class Difference:
    """What TRL's targets have in front of an answer and behind it that ours do not have, and which rows differ."""

    before: str = ""  # stands in the prompt already
    behind: str = ""  # the model has stopped before it
    alone: bool = False  # a later turn renders the answer anew, so that ours has a row for each answer


SAME = Difference()
NEWLINE = Difference(behind="\n")
DIFFERENCES = {
    **dict.fromkeys(("cohere", "cohere2", "llama3", "llava_next"), SAME),
    **dict.fromkeys(("diffusion_gemma", "gemma", "gemma3", "idefics3", "smolvlm"), NEWLINE),
    **dict.fromkeys(("lfm2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"), NEWLINE),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"), NEWLINE),
    "phi3": NEWLINE,
    "phi3_5": NEWLINE,
    "qwen2_5": Difference(before="\n", behind="\n"),
    "qwen3": Difference(behind="\n", alone=True),
    "qwen3_5_nothink": Difference(before="<think>\n\n</think>\n\n", behind="\n", alone=True),
    "qwen3_5_think": Difference(before="<think>\n", behind="\n", alone=True),
    "qwen3_6": Difference(before="<think>\n", behind="\n", alone=True),
    "qwen3_8": Difference(before="<think>\n", behind="\n", alone=True),
    "glm4moe": Difference(behind="<|user|>"),
    "gptoss": Difference(before="<|start|>assistant", alone=True),
    "muse_glimmer": Difference(before="<|start|>assistant"),
}
# The prompt opens a thought that neither template writes without one: TRL learns an answer that is never asked for.
REFUSED = [name for name in BY_NAME if name.startswith(("deepseek", "nemotron"))]

PLAIN = [
    {"role": "user", "content": "What is the weather in Paris today?"},
    {"role": "assistant", "content": "It is sunny in Paris."},
    {"role": "user", "content": "And the value of x?"},
    {"role": "assistant", "content": "  The value of x is 12.\n"},
]
THOUGHT = [{**each, "reasoning_content": "I think."} if each["role"] == "assistant" else each for each in PLAIN]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CALLED: list[dict[str, Any]] = [
    PLAIN[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "sunny"},
    PLAIN[1],
]


def row_of(name: str, messages: list[dict[str, Any]], **columns: Any) -> Conversation:
    return {"messages": variants(BY_NAME[name], messages)[0], **columns}


def learned_by_trl(name: str, row: Conversation, folder: Path) -> dict[str, Any]:
    settings = trl.SFTConfig(
        output_dir=str(folder), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = trl.SFTTrainer(
        model=tiny_model("llama"),
        args=settings,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer_for(BY_NAME[name], "bytes-qwen"),
    )
    (prepared,) = trainer.train_dataset
    return {**prepared, "attention_mask": [1] * len(prepared["labels"])}


def texts(name: str, row: dict[str, Any]) -> list[str]:
    tokenizer = tokenizer_for(BY_NAME[name], "bytes-qwen")
    return [str(tokenizer.decode(row["input_ids"][start:stop])) for start, stop in runs(row)]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_plain_conversation(name: str, tmp_path: Path) -> None:
    difference, row = DIFFERENCES[name], row_of(name, PLAIN)
    theirs = learned_by_trl(name, row, tmp_path)
    ours = encode([row], tokenizer_for(BY_NAME[name], "bytes-qwen"))
    expected = texts(name, theirs)
    assert all(text.startswith(difference.before) for text in expected)
    if name.startswith("phi3"):  # behind the last answer TRL learns the end of the whole conversation too
        assert expected[-1].endswith("\n<|endoftext|>")
        expected[-1] = expected[-1].removesuffix("<|endoftext|>")
    if name == "gptoss":  # an earlier answer ends otherwise than the one that the model has to give
        assert expected[0].endswith("<|end|>")
        expected[0] = expected[0].removesuffix("<|end|>") + "<|return|>"
    assert all(text.endswith(difference.behind) for text in expected)
    expected = [text.removeprefix(difference.before).removesuffix(difference.behind) for text in expected]
    assert [text for each in ours for text in texts(name, each)] == expected
    assert len(ours) == (2 if difference.alone else 1)
    if difference in (SAME, NEWLINE) and not name.startswith("phi3"):
        assert ours[0]["input_ids"] == theirs["input_ids"]
    if difference == SAME:
        assert ours[0]["labels"] == theirs["labels"]


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_that_no_prompt_asks_for(name: str, tmp_path: Path) -> None:
    row = row_of(name, PLAIN)
    tokenizer = tokenizer_for(BY_NAME[name], "bytes-qwen")
    prompt = str(tokenizer.apply_chat_template(PLAIN[:1], tokenize=False, add_generation_prompt=True))
    assert prompt.endswith("<think>\n")
    assert not any(text.startswith("<think>\n") for text in texts(name, learned_by_trl(name, row, tmp_path)))
    with pytest.raises(ValueError, match="row 0"):
        encode([row], tokenizer)


@pytest.mark.parametrize("name", NO_MARKERS)
def test_templates_that_trl_does_not_know_how_to_mark(name: str, tmp_path: Path) -> None:
    row = row_of(name, PLAIN)
    with pytest.raises(ValueError, match="not training-compatible"):
        learned_by_trl(name, row, tmp_path)
    (ours,) = encode([row], tokenizer_for(BY_NAME[name], "bytes-qwen"))
    end = BY_NAME[name].ends[0]
    assert texts(name, ours) == [f"It is sunny in Paris.{end}", f"The value of x is 12.{end}"]


def all_or_nothing(name: str, row: Conversation, written: list[str], folder: Path) -> tuple[bool, bool]:
    """Whether TRL learns all of the texts, and whether ours does; ours refuses the row where it does not."""
    tokenizer = tokenizer_for(BY_NAME[name], "bytes-qwen")
    try:
        rows = encode([row], tokenizer)
        ours = "".join(text for each in rows for text in texts(name, each))
        assert all(ours.count(text) >= written.count(text) for text in written)
        refused = False
    except ValueError:
        refused = True
    theirs = "".join(texts(name, learned_by_trl(name, row, folder)))
    return all(theirs.count(text) >= written.count(text) for text in written), not refused


@pytest.mark.parametrize("name", [*DIFFERENCES, *REFUSED])
def test_thoughts_are_learned_or_refused(name: str, tmp_path: Path) -> None:
    by_trl, by_ours = all_or_nothing(name, row_of(name, THOUGHT), ["I think.", "I think."], tmp_path)
    keeps = ("muse", "qwen3_5_think", "qwen3_6", "qwen3_8")
    assert by_trl == name.startswith(keeps) or name in ("qwen3", "qwen3_5_nothink")
    writes = (*keeps, "diffusion_gemma", "glm", "gptoss", "lfm2_2_5", "nemotron")
    assert by_ours == (name.startswith(writes) or name == "qwen3")


@pytest.mark.parametrize("name", [name for name in DIFFERENCES if not name.startswith(("cohere", "gemma", "llava"))])
def test_calls_of_tools_are_learned_or_refused(name: str, tmp_path: Path) -> None:
    by_trl, by_ours = all_or_nothing(name, row_of(name, CALLED, tools=TOOLS), ["get_weather"], tmp_path)
    drops = ("idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm")
    assert (by_trl, by_ours) == (name not in drops, name not in drops)

"""The code in a model card is what a person would write."""

from __future__ import annotations

import ast

import pytest
from transformers import LlamaConfig, T5Config

from hf_temporal.data.loading import DataArguments
from hf_temporal.data.summarization import SummarizationArguments
from hf_temporal.finetuning.models import ModelArguments
from hf_temporal.finetuning.tasks import Summarization
from hf_temporal.finetuning.usage import usage
from tests.tiny_run import Tiny
from tests.tiny_summarization import tiny_tokenizer


@pytest.mark.parametrize("config", [LlamaConfig(), T5Config()])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prefix", ["", "Summarize:\n"])
def test_a_prefix_stands_in_front_of_the_text_where_there_is_one(
    prefix: str, chat: bool, config: LlamaConfig | T5Config, tiny: Tiny
) -> None:
    arguments = SummarizationArguments(source_prefix=prefix)
    task = Summarization(DataArguments(train_file=tiny.data_flags[1]), arguments)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}" if chat else None
    code = usage(task, ModelArguments(), tokenizer, config, name="mine", num_beams=1)
    ast.parse(code)
    assert (f'"""{prefix}""" + text' in code) == bool(prefix)
    assert '""""""' not in code

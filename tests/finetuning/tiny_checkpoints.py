"""Checkpoints of tiny models in folders, as fixtures, and arguments that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertTokenizer

from hf_temporal.finetuning.models import Seq2SeqModelArguments
from tests import chinese
from tests.tiny_summarization import tiny_llama, tiny_tokenizer

TEXT = chinese.PAIRS[0]["title"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder-only model with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_pegasus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of T5-PEGASUS's shape."""
    folder = tmp_path_factory.mktemp("checkpoints") / "t5_pegasus"
    chinese.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = chinese.vocabulary()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    BertLMHeadModel(config).save_pretrained(folder)
    BertTokenizer({word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


def as_bert(folder: Path) -> Seq2SeqModelArguments:
    return Seq2SeqModelArguments(model_name_or_path=str(folder), tokenizer_type="bert")


def pair_of(bert: Path, **settings: Any) -> Seq2SeqModelArguments:
    names = {"encoder_model_name_or_path": str(bert), "decoder_model_name_or_path": str(bert)}
    return Seq2SeqModelArguments(**(names | settings))


def seq2seq_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    inputs = tokenizer([chinese.PAIRS[0]["abstract"]], return_tensors="pt")
    labels = tokenizer([TEXT], return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(**inputs, labels=labels).logits

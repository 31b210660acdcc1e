"""A tiny model with its tokenizer and a few pairs, in files as the recipes read them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PAIRS = [
    {
        "article": f"The value of x{index} is taken from file {index} of the folder. Then it is returned."
        + " So be it." * (index % 4),
        "highlights": f"Take x{index} from file {index}" + (" and return it." if index % 2 else "."),
    }
    for index in range(40)
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose padding token is its end token, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for pair in PAIRS for text in pair.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    """Two layers of width 32, with weights so large that what it generates depends on the prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def write_pairs(folder: Path) -> dict[str, Path]:
    """`train`, `validation` and `test` as JSON Lines with the columns `article` and `highlights`."""
    files = {}
    for split, pairs in (("train", PAIRS[:24]), ("validation", PAIRS[24:31]), ("test", PAIRS[31:36])):
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return files

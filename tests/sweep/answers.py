"""What a model answers in batches, against the tokens that it finds likeliest for each prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_temporal.finetuning.generation import UNROUNDED, generate_completions, is_read_alone
from hf_temporal.shared_prefix import MIN_PREFIX

from .shrink import DATA_BELOW, VOCABULARY

NEW_TOKENS = 6
ROWS = 8  # a batch has room for every set of prompts
IN_BATCHES, ALONE, OWN, OTHERS = "in batches", "one at a time", "generate's own", "others"


def answers(model: Any) -> str:
    """How a decoder-only model's answers are generated; `OTHERS` where they are not those of a prompt alone."""
    model = copy.deepcopy(model).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    words = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(padding))

    def generated(prompts: list[list[int]]) -> list[list[int]]:
        return generate_completions(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=ROWS)

    how = IN_BATCHES if is_read_alone(model, padding, UNROUNDED) else ALONE
    for prompts in _prompts(padding):
        together = generated(prompts)
        if together != [_likeliest(model, prompt) for prompt in prompts]:
            how = OWN
            if together != [answer for prompt in prompts for answer in generated([prompt])]:
                return OTHERS
    return how


def _prompts(padding: int) -> Iterator[list[list[int]]]:
    """Prompts of one length, of several, and with a common beginning."""
    generator = torch.Generator().manual_seed(2)

    def drawn(length: int) -> list[int]:
        tokens = torch.randint(4, DATA_BELOW, (length,), generator=generator).tolist()
        return [3 if token == padding else token for token in tokens]

    yield [drawn(7) for _ in range(4)]
    yield [drawn(length) for length in (3, 6, 10, 11)]
    beginning = drawn(MIN_PREFIX + 3)
    yield [beginning + drawn(length) for length in (2, 5, 9, 10)]


@torch.no_grad()
def _likeliest(model: Any, prompt: list[int]) -> list[int]:
    """The greedy answer, every token of the row computed anew for each new one."""
    row = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        row = torch.cat([row, model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return row[0, len(prompt) :].tolist()

"""Generation of a decoder-only model's answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .waiting import brief_waiting_when_busy


def prompt_of(encoded: dict[str, list[int]]) -> list[int]:
    """The tokens in front of the first target: all that a model may see when it generates."""
    targets = [position for position, label in enumerate(encoded["labels"]) if label != IGNORE_INDEX]
    return encoded["input_ids"][: targets[0]]


@torch.no_grad()
def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    **generate_arguments: Any,
) -> list[list[int]]:
    """The tokens with which a decoder-only `model` continues each prompt, end and padding included.

    Batches of similar length, left-padded, no sampling.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: list[list[int]] = [[]] * len(prompts)
    with brief_waiting_when_busy():
        for start in tqdm(range(0, len(order), batch_size), "Generating", leave=False):
            chosen = order[start : start + batch_size]
            batch: BatchEncoding = tokenizer.pad(
                {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
            )
            tokens = model.generate(
                **batch.to(model.device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **generate_arguments,
            )
            for index, row in zip(chosen, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                completions[index] = row
    model.train(was_training)
    return completions

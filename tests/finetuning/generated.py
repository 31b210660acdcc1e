"""What the tests of generation share: an adapter that changes answers, random prompts, answers without padding."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

WORDS = 300  # of the vocabulary


def with_adapter(model: Any, **settings: Any) -> Any:
    """A model with an adapter that changes what it says."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **settings})
    adapted = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def some_prompts(number: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, WORDS) for _ in range(generator.randrange(2, 40))] for _ in range(number)]


def up_to_the_end(row: list[int], ends: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]

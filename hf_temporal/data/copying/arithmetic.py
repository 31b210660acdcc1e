"""Chains of arithmetic: each step works on what the step before came to, and the answer comes last."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_temporal.data.rows import Row

from .arguments import CopyingArguments
from .text import SLOT, PromptedDataset

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(eq=False)
class ArithmeticChains(PromptedDataset):
    """The prompt gives a number and n operations; the target is all n steps, the answer the last one's two digits.

        Start with 37 …: +5,*2,-9        37+5=42;42*2=84;84-9=75

    All of the chain is learned, and its end token, and the last number alone is scored as the answer. Numbers have two
    digits, operands are 2..9, and each operation is drawn uniformly from those that stay between 10 and 99, so all
    chains of n steps have 8n − 1 tokens: each character is one, the last of those that the tokenizer makes of it
    alone. A chain of intermediate results in front of the answer is the scratchpad of Nye et al. (2021,
    arXiv:2112.00114) and, for arithmetic, the form of Feng et al. (2023, arXiv:2305.15408), who write the steps of an
    expression.

    Chance, of one of the 90 numbers, is (1/9 + 1/10)/2 in recall, the mean over the two digits, and 1/90 in
    exact_match.
    """

    title: ClassVar = "arithmetic in chains of {num_steps} steps"
    verb: ClassVar = "calculate"
    rest: ClassVar = "chain_accuracy"
    prompt: ClassVar = (
        f"Start with {SLOT} and apply these operations one after the other: {SLOT}. Write down every step as an "
        "equation, separated by semicolons, and nothing else."
    )
    characters: ClassVar = "0123456789+-*=;,"
    opening: ClassVar = "\n\nSteps:\n"

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        return [False] * (8 * arguments.num_steps - 3) + [True] * 2

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:  # noqa: ARG004
        return (1 / 9 + 1 / 10) / 2

    def _example(self, rng: np.random.Generator) -> Row:
        value = start = int(rng.integers(10, 100))
        operations, steps = [], []
        for _ in range(self.arguments.num_steps):
            possible = [
                (f"{sign}{operand}", result)
                for sign, operation in OPERATIONS.items()
                for operand in range(2, 10)
                if 10 <= (result := operation(value, operand)) <= 99
            ]
            operation, result = possible[rng.integers(len(possible))]
            operations.append(operation)
            steps.append(f"{value}{operation}={result}")
            value = result
        parts = (str(start), ",".join(operations))
        return self._prompted([*map(self._written, parts)], self._written(";".join(steps)))

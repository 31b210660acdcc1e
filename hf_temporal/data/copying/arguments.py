"""What is asked of the memory, and the settings that each form of the task reads."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hf_temporal.data import argument, check_counts

READS = {
    "digits": ("copy_length", "blank_length"),
    "text": ("copy_length", "blank_length"),
    "selective": ("copy_length", "blank_length", "symbols"),
    "induction": ("blank_length", "symbols"),
    "mqar": ("blank_length", "symbols", "num_pairs", "num_queries", "gap_exponent"),
    "needles": ("copy_length", "blank_length", "num_needles", "num_queries"),
    "arithmetic": ("num_steps",),
}
ROOMS = range(10, 100)  # the names of needles


@dataclass
class CopyingArguments:
    """What is to be remembered, and over which distance; a setting that the form does not read may not be changed."""

    copying_form: str = argument(
        "digits",
        "digits after a blank; text: a passage after another text; selective: symbols scattered among blanks; "
        "induction: what followed a mark; mqar: values of many keys; needles: pass keys hidden in text; arithmetic: "
        "a chain of steps.",
        READS,
    )
    copy_length: int = argument(
        10, "digits, text, selective: tokens that are copied, L. needles: digits of a pass key."
    )
    blank_length: int = argument(
        100,
        "digits, selective: blanks, T. text: tokens of the other text. induction: symbols before the question. mqar: "
        "tokens behind the pairs. needles: tokens of the text around the pass keys.",
    )
    symbols: int = argument(16, "selective, induction, mqar: how many symbols there are; half of mqar's are keys.")
    num_pairs: int = argument(4, "mqar: pairs of a key and a value.")
    num_queries: int | None = argument(
        None, "mqar: keys that are asked for; unset: each once. needles: pass keys that are asked for; unset: all."
    )
    gap_exponent: float = argument(
        0.01, "mqar: a, where the i-th place behind the pairs is a query's in proportion to i^(a - 1); 1: uniformly."
    )
    num_needles: int = argument(1, "needles: pass keys in the text.")
    num_steps: int = argument(4, "arithmetic: steps of the chain.")
    eval_length_factor: int = argument(
        1, "In validation and test, blank_length (arithmetic: num_steps) is so many times as large as in training."
    )

    def __post_init__(self) -> None:
        form = self.copying_form
        if form not in READS:
            raise ValueError(f"copying_form={form!r}; accepted: {', '.join(map(repr, READS))}.")
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default and each.name not in ("copying_form", "eval_length_factor", *READS[form]):
                readers = ", ".join(repr(name) for name, read in READS.items() if each.name in read)
                given = f"{each.name}={value!r} and copying_form={form!r}, which does not read it"
                raise ValueError(f"{given}; accepted: {each.default!r}, or copying_form={readers}.")
        names = ("copy_length", "blank_length", "num_pairs", "num_queries", "num_needles", "num_steps")
        check_counts(**{name: getattr(self, name) for name in names}, eval_length_factor=self.eval_length_factor)
        check_counts(2, symbols=self.symbols)
        if not (math.isfinite(self.gap_exponent) and self.gap_exponent > 0):
            raise ValueError(f"gap_exponent={self.gap_exponent!r}; accepted: a number above 0.")
        if form == "mqar":
            self._check_most("num_pairs", self.num_pairs, self.symbols // 2, "half the symbols")
            self._check_most("num_queries", self.queries, self.blank_length // 2, "half of blank_length")
        if form == "needles":
            self._check_most("num_needles", self.num_needles, len(ROOMS), "the rooms that they are of")
            self._check_most("num_queries", self.queries, self.num_needles, "num_needles")

    def _check_most(self, name: str, value: int, most: int, what: str) -> None:
        if value > most:
            raise ValueError(f"{name}={value!r}; accepted: at most {most}, {what}.")

    @property
    def queries(self) -> int:
        """How many keys of mqar, or needles, are asked for."""
        return self.num_queries or (self.num_pairs if self.copying_form == "mqar" else self.num_needles)

    @property
    def settings(self) -> dict[str, Any]:
        """The form and the settings that it reads, by name."""
        factor = () if self.eval_length_factor == 1 else ("eval_length_factor",)
        read = ("copying_form", *READS[self.copying_form], *factor)
        return {name: value for name, value in asdict(self).items() if name in read}

    @property
    def held_out(self) -> CopyingArguments:
        """The settings of validation and test."""
        name = "num_steps" if self.copying_form == "arithmetic" else "blank_length"
        return replace(self, **{name: getattr(self, name) * self.eval_length_factor}, eval_length_factor=1)

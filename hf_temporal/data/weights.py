"""Weights that data files bring: of a message, of a row, and of spans that match a pattern."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and the weight of the text that it matches.

    Where the expression has groups, they are weighted, and else all of the match: `</think>(.*)=2` weights what
    follows the tag.
    """

    regex: re.Pattern[str]
    weight: float

    @classmethod
    def parse(cls, given: str) -> Pattern:
        """Read `REGEX=w`."""
        regex, equals, weight = given.rpartition("=")
        accepted = "accepted: REGEX=w, a regular expression and a number of at least 0"
        if not equals or not regex:
            raise ValueError(f"weight_pattern={given!r}; {accepted}.")
        try:
            return cls(re.compile(regex), read_weight(weight, f"weight_pattern={given!r}: the weight"))
        except re.error as error:
            raise ValueError(f"weight_pattern={given!r}: {error}; {accepted}.") from error

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters that are weighted, as pairs of start and end."""
        groups = range(1, self.regex.groups + 1) or [0]
        return [match.span(group) for match in self.regex.finditer(text) for group in groups if match.end(group) > 0]


def read_weight(value: Any, name: str) -> float:
    """A weight as a number; a text is read as one, since all cells of a CSV file are texts.

    Raises:
        ValueError: by `name`, anything but a finite number of at least 0.
    """
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} is {value!r}; accepted: a number of at least 0.")
    return weight


def read_weights(value: Any, tokens: int | None, name: str) -> float | list[float]:
    """The `loss_weights` of a row: one number for all its targets, or one for each of its `tokens` if it has them.

    Raises:
        ValueError: by `name`, weights that are null, negative or not finite, or not as many as tokens.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} is {value[:80]!r}, which is no JSON ({error}); accepted: JSON.") from error
    if not isinstance(value, (list, tuple)):
        return read_weight(value, name)
    if tokens is None:
        raise ValueError(f"{name} is a list; accepted: one number for the row, since only input_ids have tokens yet.")
    if len(value) != tokens:
        raise ValueError(f"{name} has {len(value)} values; accepted: {tokens}, one for each of input_ids.")
    return [read_weight(each, f"{name}, value {place}") for place, each in enumerate(value)]


def spread(text: str, spans: Sequence[tuple[int, int]], weight: float, patterns: Sequence[Pattern]) -> list[float]:
    """`weight` for each token, times that of each pattern that matches one of the token's characters in `text`."""
    weights = [weight] * len(spans)
    for pattern in patterns:
        matched = bytearray(len(text))
        for start, end in pattern.spans(text):
            matched[start:end] = b"\1" * (end - start)
        for place, (first, last) in enumerate(spans):
            if 1 in matched[max(first, 0) : max(last, first + 1)]:
                weights[place] *= pattern.weight
    return weights

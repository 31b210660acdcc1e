"""Which parts of the answers have the weight, told before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_temporal.collator import LOSS_WEIGHTS
from hf_temporal.data.chat import ends_a_turn
from hf_temporal.data.loading import head_of
from hf_temporal.data.rows import runs_of_targets
from hf_temporal.positions import IGNORE_INDEX, target_positions
from hf_temporal.tables import markdown
from hf_temporal.weighting import TemporalWeighting

ROWS = 1000  # that are looked at
TURNS = 8  # that get a line each
END_OF_THINKING = ("</think>", "[/THINK]")


def weight_shares(
    rows: Any, weighting: TemporalWeighting, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[float, float]]:
    """What share of the target tokens, and of Σw, each part of the answers has.

    w is t^p times the row's `loss_weights`, with t, origin and normalization of the weighting. An answer is a run of
    target tokens; its thinking ends with </think> or [/THINK], and its end of turn is a special token at its end.

    Args:
        rows: input_ids and labels, each row a document; the first ones are looked at.
        weighting: the weighting at its final power.
        tokenizer: tells which tokens end a thought or a turn.
    """
    few = head_of(rows)
    few = few.select(range(min(ROWS, len(few))))
    labels = _padded(few["labels"], IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX  # nothing predicts the first token
    weights = weighting.weights(target_positions(labels, origin=weighting.origin)).double()
    if LOSS_WEIGHTS in few.column_names:
        weights = weights * _padded(few[LOSS_WEIGHTS], 0.0).double()
    parts: dict[str, Tensor] = {}
    for place, row in enumerate(labels.tolist()):
        for name, tokens in _parts(row, tokenizer):
            parts.setdefault(name, torch.zeros_like(labels, dtype=torch.bool))[place, tokens] = True
    targets, total = (labels != IGNORE_INDEX).sum().item(), weights.sum().item()
    return {
        name: (mask.sum().item() / max(targets, 1), weights[mask].sum().item() / (total or 1.0))
        for name, mask in parts.items()
    }


def tell_shares(trainer: Any, rows: Any) -> None:
    """Print what share of the weight each part of the answers has, as a table in Markdown."""
    if trainer.is_world_process_zero():
        weighting = trainer.weighting
        shares = weight_shares(rows, weighting, trainer.processing_class)
        lines = [[name, f"{tokens:.1%}", f"{weight:.1%}"] for name, (tokens, weight) in shares.items()]
        head = ["part of the targets", "share of the tokens", f"share of the weight at p = {weighting.power:g}"]
        print(f"\n{markdown([head, *lines])}\n")


def _padded(rows: Any, value: float) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _parts(row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """The places of each part of a row's answers, by the name of the part."""
    answers = [[*range(start, end)] for start, end in runs_of_targets(row)]
    parts: list[tuple[str, list[int]]] = []
    for turn, places in enumerate(answers, start=1):
        if len(answers) > 1:
            parts.append((f"answer {turn} of a row" if turn <= TURNS else f"answers from {TURNS + 1} on", places))
        parts += [("first token", places[:1]), ("last token", places[-1:])]
        closed = ends_a_turn(row[places[-1]], tokenizer)
        parts += [("end of turn", places[-1:])] if closed else []
        thought = _thought([*tokenizer.convert_ids_to_tokens([row[place] for place in places])])
        if thought:
            parts += [("thinking", places[:thought]), ("answer behind the thinking", places[thought:])]
    return parts


def _thought(tokens: list[str]) -> int:
    """How many tokens there are up to the end of the thinking; 0 where there is none."""
    text = "".join(tokens)
    ends = [text.find(end) + len(end) for end in END_OF_THINKING if end in text]
    if not ends:
        return 0
    length = 0
    for count, token in enumerate(tokens, start=1):
        length += len(token)
        if length >= min(ends):
            return count
    return len(tokens)

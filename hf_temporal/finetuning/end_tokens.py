"""The token that ends an answer: what is learned as one, and where `generate` stops, are made the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_temporal._transformers import align_special_tokens
from hf_temporal.data.chat import ends_a_turn
from hf_temporal.data.rows import CUT, runs_of_targets

logger = logging.get_logger(__name__)

LOOKED_AT = 1000  # rows


def ends_of_answers(rows: Any) -> Counter[int]:
    """How often each token is the last target of a run of them, in the first rows that are not cut."""
    ends: Counter[int] = Counter()
    for row in rows.select(range(min(LOOKED_AT, len(rows)))):
        if not row[CUT]:
            ends.update(row["labels"][end - 1] for _, end in runs_of_targets(row["labels"]))
    return ends


def texts_of_answers(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is learned of the rows, each run of targets as a text."""
    runs = [labels[start:end] for labels in rows["labels"] for start, end in runs_of_targets(labels)]
    return [str(tokenizer.decode(run)) for run in runs]


def agree_on_the_end(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, int]) -> None:
    """Let generation stop at the tokenizer's end token, and at the tokens that end the answers.

    `Trainer.train` does the first before its first step, and `evaluate` does not. What differs is told. Answers that
    end in no special token are told, too: a model that learns from them learns no end.

    Args:
        model: a model or an adapter; its generation configuration is changed.
        tokenizer: the model's.
        ends: how often each token ends an answer.
    """
    align_special_tokens(model, tokenizer)
    generation = getattr(model, "generation_config", None)
    known = getattr(generation, "eos_token_id", None)
    stops = [] if known is None else [known] if isinstance(known, int) else [*known]
    missing = [token for token in ends if ends_a_turn(token, tokenizer) and token not in stops]
    if missing and generation is not None:
        generation.eos_token_id = [*stops, *missing]
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing)))
        logger.warning(
            f"The chat template ends answers with {names}, at which generation did not stop: eos_token_id of the "
            f"generation configuration is now {generation.eos_token_id}."
        )
    endless = sum(count for token, count in ends.items() if not ends_a_turn(token, tokenizer))
    if endless:
        logger.warning(
            f"{endless} of {sum(ends.values())} answers end in no special token: from them, the model does not learn "
            "to stop. A chat template that closes an answer (--chat_template FILE) teaches it."
        )

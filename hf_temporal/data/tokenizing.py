"""Texts as rows of tokens, each tokenized once, as the model is given it at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from hf_temporal.positions import IGNORE_INDEX

from .rows import Row, special_tokens_around
from .weights import Pattern, spread

OPENERS = ("", "\n", ".")  # put in front of an answer that is tokenized alone, and taken off again


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    """The `tokenizers.Encoding` of each text, with ids, tokens and offsets, without special tokens around it."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; accepted: a fast tokenizer.")
    if not texts:
        return []
    encoded: BatchEncoding = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    assert encoded.encodings is not None
    return encoded.encodings


def continued(
    context: list[int], prompt: str, answer: str, whole: Any, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of an answer behind those of its prompt, and the characters of the answer that each stands for.

    Tokenized as a whole, the end of the prompt and the beginning of the answer may become one token, which no model
    can be given half of. Such an answer is tokenized by itself, and must give the same text behind the prompt.

    Args:
        context: the tokens of the prompt alone.
        prompt: the prompt as text.
        answer: the answer as text.
        whole: the encoding of prompt and answer as one text.
        tokenizer: what made both.
        name: what an error calls the answer.

    Raises:
        ValueError: an answer that the tokenizer cannot begin where the prompt ends.
    """
    first = len(prompt)
    if whole.ids[: len(context)] == context:
        return whole.ids[len(context) :], [
            (start - first, end - first) for start, end in whole.offsets[len(context) :]
        ]
    before, text = "".join(tokenizer.convert_ids_to_tokens(context)), "".join(whole.tokens)
    for opener, piece in zip(OPENERS, tokenize(tokenizer, [opener + answer for opener in OPENERS]), strict=True):
        size = len(opener)
        begin = next((place for place, (start, _) in enumerate(piece.offsets) if start >= size), len(piece.ids))
        if before + "".join(piece.tokens[begin:]) == text:
            return piece.ids[begin:], [(start - size, end - size) for start, end in piece.offsets[begin:]]
    raise ValueError(
        f"{name}: the tokenizer joins the end of its prompt ({prompt[-20:]!r}) with its beginning ({answer[:20]!r}), "
        "so that the model cannot be given the one without the other; accepted: an answer without white space in "
        "front, or a prompt that ends otherwise."
    )


def rows_of_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, patterns: Sequence[Pattern]) -> list[Row]:
    """A row of each text, all of it and the end token behind it learned; no special token that it holds is added."""
    opening, closing = _around(tokenizer)
    rows = []
    for text, encoded in zip(texts, tokenize(tokenizer, list(texts)), strict=True):
        front = [] if encoded.ids[: len(opening)] == opening else opening
        back = [] if encoded.ids[-len(closing) :] == closing else closing
        tokens = front + encoded.ids + back
        weights = None
        if patterns:
            weights = [1.0] * len(front) + spread(text, encoded.offsets, 1.0, patterns) + [1.0] * len(back)
        rows.append(Row(tokens, tokens, weights))
    return rows


def rows_of_pairs(
    prompts: Sequence[str],
    completions: Sequence[str],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    patterns: Sequence[Pattern] = (),
) -> list[Row]:
    """A row of each prompt and completion, of which the completion and its end token are learned.

    Both are tokenized as one text, and the completion begins where the tokens of the prompt alone end. `names` are
    what an error calls the completions.
    """
    opening, closing = _around(tokenizer)
    wholes = tokenize(tokenizer, [a + b for a, b in zip(prompts, completions, strict=True)])
    rows = []
    for prompt, completion, name, asked, whole in zip(
        prompts, completions, names, tokenize(tokenizer, list(prompts)), wholes, strict=True
    ):
        tokens, spans = continued(asked.ids, prompt, completion, whole, tokenizer, name)
        front = [] if asked.ids[: len(opening)] == opening else opening
        back = [] if tokens[-len(closing) :] == closing else closing
        before, learned = [*front, *asked.ids], [*tokens, *back]
        weights = None
        if patterns:
            weights = [0.0] * len(before) + spread(completion, spans, 1.0, patterns) + [1.0] * len(back)
        rows.append(Row(before + learned, [IGNORE_INDEX] * len(before) + learned, weights))
    return rows


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text, and the end token behind it."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer, a {type(tokenizer).__name__}, has no eos_token; accepted: one that has it.")
    return special_tokens_around(tokenizer)[0], [tokenizer.eos_token_id]

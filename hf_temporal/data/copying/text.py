"""Copying of text: a passage in a prompt is to be repeated after another text; and what all prompted forms share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_temporal.data.rows import Row, learned_after, special_tokens_around, tokens_without

from .arguments import CopyingArguments
from .examples import CopyingDataset

SLOT = "\ue000"  # a private character, where tokens of the example stand in a prompt


@dataclass(eq=False)
class PromptedDataset(CopyingDataset):
    """Examples of a prompt in words and an answer.

    The pieces of the prompt are tokenized by themselves, and the example's own tokens are put between them. So the
    labels are exactly tokens of the prompt; where two pieces meet, tokens may differ from those of the whole as one
    text.

    - Decoder-only: input_ids = prompt + answer + end token, labels −100 on the prompt. The prompt is the user's turn
      of the tokenizer's chat template where it has one.
    - Encoder–decoder: input_ids = prompt, labels = answer, each with the special tokens that the tokenizer puts around
      a source and around a target.
    """

    generates: ClassVar = True
    prompt: ClassVar[str]  # with a `SLOT` for each part that is the example's own
    opening: ClassVar[str]  # of the answer, at the end of a prompt without chat template
    characters: ClassVar[str] = ""  # those of which the example's own parts are written, one token each

    tokenizer: InitVar[PreTrainedTokenizerBase]

    def __post_init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__post_init__()
        how = {"is_encoder_decoder": self.is_encoder_decoder}
        self._pieces = prompt_pieces(tokenizer, self.prompt, self.opening, **how)
        self._tokens = character_tokens(tokenizer, self.characters)
        around = special_tokens_around(tokenizer, target=True)
        self._answer_around = around if self.is_encoder_decoder else ([], [tokenizer.eos_token_id])

    def _written(self, text: str) -> list[int]:
        return [self._tokens[character] for character in text]

    def _prompted(self, parts: Sequence[list[int]], answer: list[int]) -> Row:
        """The row of a prompt with `parts` in its slots."""
        first, *others = self._pieces
        prompt = [*first]
        for part, piece in zip(parts, others, strict=True):
            prompt += part + piece
        before, after = self._answer_around
        answer = [*before, *answer, *after]
        return Row(prompt, answer) if self.is_encoder_decoder else learned_after(prompt, answer)


@dataclass(eq=False)
class TextCopies(PromptedDataset):
    """Copying of text: the prompt has a passage of L tokens, T tokens of other texts, and asks to repeat the passage.

    `texts` are those of this split, as `tokenize_texts` returns them. The passage is cut from one with L tokens or
    more, the distractor from all others. Chance is practically 0: it is a text that would have to be guessed.
    """

    title: ClassVar = "passages of {texts}, {copy_length} tokens after {blank_length}"
    from_texts: ClassVar = True
    prompt: ClassVar = (
        f"Remember this passage:\n\n{SLOT}\n\nNow read this other text:\n\n{SLOT}\n\n"
        "Repeat the passage that you were to remember, word for word, and nothing else."
    )
    opening: ClassVar = "\n\nPassage:\n"

    texts: InitVar[Sequence[Sequence[int]]]

    def __post_init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[int]]) -> None:
        super().__post_init__(tokenizer)
        rows = [*texts]
        self._stream = stream_of(rows)
        self._ends = np.cumsum([0, *map(len, rows)])
        lengths = np.diff(self._ends)
        L, T, longest = self.arguments.copy_length, self.arguments.blank_length, int(lengths.max(initial=0))
        others, split = len(self._stream) - longest, self.split
        if longest < L:
            raise ValueError(f"copy_length={L}; accepted: at most {longest}, the tokens of the longest {split} text.")
        if others < T:
            most = f"at most {others}, the tokens of the {split} texts beside the longest"
            raise ValueError(f"blank_length={T}; accepted: {most}.")
        self._candidates = np.flatnonzero(lengths >= L)

    @staticmethod
    def scored(arguments: CopyingArguments) -> list[bool]:
        return [True] * arguments.copy_length

    @staticmethod
    def chance(arguments: CopyingArguments) -> float:  # noqa: ARG004
        return 0.0

    def _example(self, rng: np.random.Generator) -> Row:
        L, T = self.arguments.copy_length, self.arguments.blank_length
        text = rng.choice(self._candidates)
        start, end = self._ends[text], self._ends[text + 1]
        first = rng.integers(start, end - L + 1)
        passage = self._stream[first : first + L].tolist()
        # from the other texts, which follow this one in a circle
        first = end + rng.integers(len(self._stream) - (end - start) - T + 1)
        distractor = self._stream.take(range(first, first + T), mode="wrap").tolist()
        return self._prompted([passage, distractor], passage)


def tokenize_texts(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """The "tokens" of each "text" without special ones."""
    rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
    return {"tokens": tokens_without(set(tokenizer.all_special_ids), rows)}


def stream_of(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """The tokens of all texts one after the other."""
    return np.concatenate([*(np.array(row, dtype=np.int64) for row in texts), np.zeros(0, dtype=np.int64)])


def prompt_pieces(
    tokenizer: PreTrainedTokenizerBase, prompt: str, opening: str, *, is_encoder_decoder: bool
) -> list[list[int]]:
    """The tokens of a prompt before, between and after its slots."""
    has_template = tokenizer.chat_template is not None and not is_encoder_decoder
    if has_template:
        turns = [{"role": "user", "content": prompt}]
        rendered = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    else:
        rendered = prompt + opening
    if rendered.count(SLOT) != prompt.count(SLOT):
        raise ValueError(f"chat_template renders as {rendered!r}; accepted: one that shows a user's turn once.")
    pieces = pieces_of(tokenizer, rendered)
    if not has_template:
        before, after = special_tokens_around(tokenizer)
        pieces = [before + pieces[0], *pieces[1:-1], pieces[-1] + (after if is_encoder_decoder else [])]
    return pieces


def pieces_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
    """The tokens of a text before, between and after its slots."""
    return [tokenizer(piece, add_special_tokens=False).input_ids for piece in text.split(SLOT)]


def character_tokens(tokenizer: PreTrainedTokenizerBase, characters: str) -> dict[str, int]:
    """One token for each character: the last of those that the tokenizer makes of it alone.

    Raises:
        ValueError: If the tokenizer tells two of them not apart, or does not know one.
    """
    rows = [tokenizer(character, add_special_tokens=False).input_ids for character in characters]
    tokens = [row[-1] for row in rows if row and row[-1] not in tokenizer.all_special_ids]
    if len({*tokens}) < len(characters):
        name = tokenizer.name_or_path
        raise ValueError(f"tokenizer {name!r} makes {rows} of {characters!r}; accepted: one with a token for each.")
    return dict(zip(characters, tokens, strict=True))

"""Copying text: the passage of the prompt is the target, and the distractor is of other texts."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from hf_temporal.data.copying import CopyingArguments, TextCopies
from hf_temporal.data.copying.text import prompt_pieces
from tests.data.copies import TEXTS, passages, seq2seq_tokenizer
from tests.tiny_summarization import tiny_tokenizer


def pieces(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return prompt_pieces(tokenizer, TextCopies.prompt, TextCopies.opening, is_encoder_decoder=False)


def test_the_passage_stands_in_the_prompt_and_is_the_completion() -> None:
    tokenizer = tiny_tokenizer()
    before, between, after = pieces(tokenizer)
    texts = [tokenizer(text).input_ids for text in TEXTS]
    for example in passages(tokenizer):
        labels = [label for label in example["labels"] if label != -100]
        passage = labels[:-1]
        assert len(passage) == 6
        assert labels[-1] == tokenizer.eos_token_id
        assert example["input_ids"][-7:] == labels
        prompt = example["input_ids"][:-7]
        assert example["labels"] == [-100] * len(prompt) + labels
        start = len(before) + 6 + len(between)
        assert prompt[: len(before) + 6] == before + passage
        assert prompt[start + 30 :] == after
        assert any(passage == text[first : first + 6] for text in texts for first in range(len(text)))
        shown = str(tokenizer.decode(prompt))
        assert shown.startswith(f"user: Remember this passage:\n\n{tokenizer.decode(passage)}\n\n")
        assert shown.endswith("and nothing else.<end>assistant: ")


def test_the_distractor_is_of_other_texts_that_stand_together() -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"{word}{word} " * 20 for word in ("a", "b", "c", "d")]
    before, between, after = (
        len(piece)
        for piece in prompt_pieces(tokenizer, TextCopies.prompt, TextCopies.opening, is_encoder_decoder=False)
    )
    found = set()
    for example in passages(tokenizer, CopyingArguments("text", 6, 70), texts=texts, size=200):
        passage = str(tokenizer.decode(example["input_ids"][before : before + 6]))
        distractor = str(tokenizer.decode(example["input_ids"][before + 6 + between : -after - 7]))
        (copied,) = set(passage) - {" "}
        order = [word for word in dict.fromkeys(distractor) if word != " "]
        assert copied not in order
        assert "".join(order) in 2 * "abcd".replace(copied, "")
        found.add((copied, *order))
    assert {copied for copied, *_ in found} == set("abcd")
    assert len(found) > 8


def test_texts_that_are_too_short_for_a_passage_are_part_of_distractors_alone() -> None:
    texts = ["x.", "Then it is returned to whoever wants it.", *["y."] * 30]
    tokenizer = tiny_tokenizer()
    long = set(tokenizer(texts[1]).input_ids)
    for example in passages(tokenizer, texts=texts):
        assert set(example["labels"]) - {-100, tokenizer.eos_token_id} <= long


def test_a_text_is_copied_up_to_its_last_token() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(TEXTS[0]).input_ids
    arguments = CopyingArguments("text", len(tokens), 30)
    example = passages(tokenizer, arguments, texts=[TEXTS[0], *["y."] * 30])[0]
    assert example["labels"][-len(tokens) - 1 :] == [*tokens, tokenizer.eos_token_id]


def test_special_tokens_in_a_text_are_no_part_of_it() -> None:
    tokenizer = tiny_tokenizer()
    texts = [text.replace(" ", "<end>") for text in TEXTS]
    assert tokenizer.eos_token_id in tokenizer(texts[0]).input_ids
    for example in passages(tokenizer, texts=texts):
        assert example["labels"].count(tokenizer.eos_token_id) == 1


def test_text_examples_depend_on_seed_split_and_index_alone() -> None:
    tokenizer = tiny_tokenizer()
    first = [*passages(tokenizer)]
    assert [passages(tokenizer)[index] for index in (3, 0)] == [first[3], first[0]]
    assert [*passages(tokenizer, seed=8)] != first
    held_out = [*passages(tokenizer, split="test", seed=1)]
    assert [*passages(tokenizer, split="test", seed=2)] == held_out
    assert held_out != [*passages(tokenizer, split="validation")]


def test_without_a_chat_template_the_prompt_is_plain() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    example = passages(tokenizer)[0]
    shown = str(tokenizer.decode(example["input_ids"]))
    assert shown.startswith("Remember this passage:\n\n")
    assert shown.endswith(f"\n\nPassage:\n{tokenizer.decode(example['labels'][-7:])}")


def test_a_causal_prompt_opens_as_the_tokenizer_opens_a_text_and_is_not_closed() -> None:
    tokenizer = seq2seq_tokenizer("<pad> $A </s>")
    input_ids = passages(tokenizer)[0]["input_ids"]
    assert input_ids[0] == tokenizer.pad_token_id
    assert [place for place, token in enumerate(input_ids) if token == tokenizer.eos_token_id] == [len(input_ids) - 1]


@pytest.mark.parametrize(("template", "opening"), [("$A </s>", []), ("<pad> $A </s>", [0])])
def test_source_and_target_are_closed_as_the_tokenizer_does(template: str, opening: list[int]) -> None:
    tokenizer = seq2seq_tokenizer(template)
    for example in passages(tokenizer, is_encoder_decoder=True):
        passage = example["labels"][len(opening) : -1]
        assert len(passage) == 6
        assert example["labels"] == [*opening, *passage, 1]
        assert len(example["input_ids"]) == len(example["attention_mask"])
        source = example["input_ids"]
        assert source[: len(opening)] == opening
        assert source[-1] == 1
        assert source.count(1) == 1
        shown = str(tokenizer.decode(source[len(opening) :]))
        assert shown.startswith(f"Remember this passage:\n\n{tokenizer.decode(passage)}\n\nNow")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["x.", "y."], "copy_length=6; accepted: at most 2, the tokens of the longest train text"),
        ([], "copy_length=6; accepted: at most 0, the tokens of the longest train text"),
        (
            ["So be it. " * 20, "y."],
            "blank_length=30; accepted: at most 2, the tokens of the train texts beside the longest",
        ),
    ],
)
def test_too_little_text_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passages(tiny_tokenizer(), texts=texts)


def test_a_template_that_hides_the_users_turn_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "hello"
    with pytest.raises(ValueError, match="chat_template renders as 'hello'"):
        passages(tokenizer)

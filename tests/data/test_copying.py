"""Copying: the examples are those of the literature, the same every time, and scored at the digits' own places."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_temporal.data.bootstrap import bootstrap_interval
from hf_temporal.data.copying import (
    END,
    HELD_OUT_SEED,
    PAD,
    CopyingArguments,
    DigitCopies,
    TextCopies,
    digit_tokenizer,
    prompt_pieces,
    tokenize_texts,
)
from hf_temporal.data.copying_scores import CopyScores, argmax_of_logits
from hf_temporal.data.small_t5 import small_t5_config, train_tokenizer
from tests.tiny_summarization import PAIRS, tiny_llama, tiny_tokenizer

TEXTS = [f"{pair['article']} {pair['highlights']}" for pair in PAIRS]
SHORT = CopyingArguments(copy_length=3, blank_length=4)
PASSAGES = CopyingArguments(copying_form="text", copy_length=6, blank_length=30)


def digits(arguments: CopyingArguments = SHORT, **changes: Any) -> DigitCopies:
    settings: dict[str, Any] = {"split": "train", "size": 5, "seed": 7, "is_encoder_decoder": False}
    return DigitCopies(arguments, **settings | changes)


def passages(tokenizer: PreTrainedTokenizerBase, arguments: CopyingArguments = PASSAGES, **changes: Any) -> TextCopies:
    settings: dict[str, Any] = {"split": "train", "size": 20, "seed": 7, "is_encoder_decoder": False}
    texts = changes.pop("texts", TEXTS)
    tokens = tokenize_texts({"text": texts}, tokenizer)["tokens"] if texts else []
    return TextCopies(arguments, tokens, tokenizer, **settings | changes)


def seq2seq_tokenizer(template: str = "$A </s>") -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    return tokenizer


# ---- digits


def test_digits_stand_as_in_the_literature() -> None:
    for example in digits(is_encoder_decoder=True):
        d1, d2, d3 = copied = example["input_ids"][:3]
        assert set(copied) <= set(range(1, 9))
        assert example["input_ids"] == [d1, d2, d3, 0, 0, 0, 9, 9, 9, 9]
        assert example["labels"] == [0, 0, 0, 0, 0, 0, 0, d1, d2, d3]
        assert example["attention_mask"] == [1] * 10


def test_digits_for_one_sequence_are_the_same_a_place_later() -> None:
    for one, two in zip(digits(), digits(is_encoder_decoder=True), strict=True):
        assert one["input_ids"] == [*two["input_ids"], END]
        assert one["labels"] == [-100, *two["labels"]]
        assert one["attention_mask"] == [1] * 11


@given(L=st.integers(1, 9), T=st.integers(1, 30), seed=st.integers(0, 2**32 - 1), one=st.booleans())
def test_lengths_are_those_of_the_task(L: int, T: int, seed: int, one: bool) -> None:
    arguments = CopyingArguments(copy_length=L, blank_length=T)
    example = digits(arguments, seed=seed, is_encoder_decoder=not one)[0]
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"]) == T + 2 * L + one
    targets = [label for label in example["labels"] if label != -100]
    assert len(targets) == arguments.answer_length == T + 2 * L
    assert targets == [0] * (T + L) + example["input_ids"][:L]
    assert example["input_ids"].count(9) == L + 1


def test_every_digit_is_drawn_about_equally_often() -> None:
    copied = [digit for example in digits(size=2000) for digit in example["input_ids"][:3]]
    assert np.allclose(np.bincount(copied, minlength=9)[1:] / 6000, 1 / 8, atol=0.02)


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    first = [*digits()]
    assert [digits()[index] for index in (4, 3, 2, 1, 0)] == first[::-1]
    assert [*digits(size=3)] == first[:3]
    assert [*pickle.loads(pickle.dumps(digits()))] == first
    loader = DataLoader(digits(), batch_size=None, num_workers=2)
    assert [*loader] == first
    assert [example["input_ids"] for example in digits(seed=8)] != [example["input_ids"] for example in first]
    assert len({tuple(example["input_ids"]) for example in digits(size=50)}) > 40


def test_held_out_examples_are_the_same_for_every_seed_and_of_their_own() -> None:
    long = CopyingArguments(copy_length=10, blank_length=4)
    splits = {split: [*digits(long, split=split, seed=HELD_OUT_SEED)] for split in ("train", "validation", "test")}
    for split in ("validation", "test"):
        assert [*digits(long, split=split, seed=1)] == splits[split]
    assert [*digits(long, seed=1)] != splits["train"]
    assert len({tuple(example["input_ids"]) for examples in splits.values() for example in examples}) == 15


def test_an_index_behind_the_end_is_refused_so_that_a_loop_ends() -> None:
    assert len([*digits()]) == len(digits()) == 5
    assert digits()[-1] == digits()[4]
    with pytest.raises(IndexError):
        digits()[5]


def test_digits_are_their_own_tokens_after_saving_too(tmp_path: Path) -> None:
    digit_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (digit_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("0123456789").input_ids == [*range(10)]
        assert tokenizer.decode([3, 0, 9]) == "309"
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (PAD, END, 12)
        assert tokenizer("12</s>").input_ids == [1, 2, END]


def test_a_causal_models_loss_compares_the_logits_at_i_with_y_at_i() -> None:
    causal, y = digits(), torch.tensor([example["labels"] for example in digits(is_encoder_decoder=True)])
    model = tiny_llama(12).eval()
    batch = DataCollatorForSeq2Seq(digit_tokenizer())([*causal])
    with torch.no_grad():
        outputs = model(**batch)
    by_hand = F.cross_entropy(outputs.logits[:, : y.shape[1]].flatten(0, 1), y.flatten())
    torch.testing.assert_close(outputs.loss, by_hand)


def test_what_fills_the_last_place_changes_no_answer() -> None:
    model = tiny_llama(12).eval()
    batch = torch.tensor([example["input_ids"] for example in digits()])
    with torch.no_grad():
        logits = [model(input_ids=batch.index_fill(1, torch.tensor([10]), token)).logits[:, :10] for token in (END, 3)]
    torch.testing.assert_close(*logits)


# ---- text


def test_the_passage_stands_in_the_prompt_and_is_the_completion() -> None:
    tokenizer = tiny_tokenizer()
    before, between, after = prompt_pieces(tokenizer, is_encoder_decoder=False)
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
    before, between, after = (len(piece) for piece in prompt_pieces(tokenizer, is_encoder_decoder=False))
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
        (["x.", "y."], "copy_length=6: the longest train text has 2 tokens"),
        ([], "copy_length=6: the longest train text has 0 tokens"),
        (["So be it. " * 20, "y."], "blank_length=30: the train texts beside the longest have 2 tokens"),
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


# ---- arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copying_form": "words"}, "copying_form='words': digits, text are accepted"),
        ({"copy_length": 0}, "copy_length=0: a whole number of at least 1"),
        ({"blank_length": -3}, "blank_length=-3: a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyingArguments(**given)


@pytest.mark.parametrize(
    ("given", "message"), [({"split": "dev"}, "split='dev': train, validation, test"), ({"size": 0}, "size=0")]
)
def test_bad_splits_and_sizes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**given)


# ---- scores


def answers_by_hand(*endings: list[int], blank: int = 0) -> list[list[int]]:
    return [[blank] * 7 + ending for ending in endings]


LABELS = answers_by_hand([1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize(("L", "expected"), [(10, 0.990), (150, 0.885)])
def test_answering_blanks_recalls_nothing_though_most_positions_are_right(L: int, expected: float) -> None:
    arguments = CopyingArguments(copy_length=L, blank_length=1000)
    labels = [example["labels"] for example in digits(arguments, is_encoder_decoder=True)]
    blanks = np.zeros_like(labels)
    metrics = CopyScores(digit_tokenizer(), arguments).score(blanks, labels)
    assert metrics["recall"] == metrics["exact_match"] == metrics["recall_high"] == 0
    assert metrics["blank_accuracy"] == 1
    over_all = metrics["blank_accuracy"] * (1000 + L) + metrics["recall"] * L
    assert over_all / (1000 + 2 * L) == pytest.approx((blanks == labels).mean())
    assert (blanks == labels).mean() == pytest.approx(expected, abs=5e-4)


def test_scores_by_hand() -> None:
    scores = CopyScores(digit_tokenizer(), SHORT)
    answers = answers_by_hand([1, 2, 8], [4, 5, 6])
    answers[0][0] = 9
    metrics = scores.score(answers, LABELS)
    assert metrics["recall"] == pytest.approx(5 / 6)
    assert metrics["exact_match"] == 1 / 2
    assert metrics["blank_accuracy"] == pytest.approx(13 / 14)
    assert scores.record["recall_by_position"] == [1, 1, 1 / 2]
    assert scores.record["generated"] == ["128", "456"]
    assert scores.record["references"] == ["123", "456"]
    assert "gen_len" not in metrics


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("padded", [0, 2])
def test_the_answer_stands_at_its_offset(generated: bool, padded: int) -> None:
    answers = answers_by_hand([1, 2, 8], [4, 5, 6])
    labels = LABELS if generated else [[-100, *row] for row in LABELS]
    rows = [[PAD, *row] if generated else [*row, 7] for row in answers]
    filling = PAD if generated else -100  # predict_with_generate pads labels with the padding token
    prediction = EvalPrediction(
        predictions=np.array([[*row, *[filling] * padded] for row in rows]),
        label_ids=np.array([[*row, *[filling] * padded] for row in labels]),
    )
    scores = CopyScores(digit_tokenizer(), SHORT, generated=generated)
    metrics = scores(prediction)
    assert metrics["recall"] == pytest.approx(5 / 6)
    assert metrics["blank_accuracy"] == 1
    assert scores.record["generated"] == ["128", "456"]
    assert CopyScores(digit_tokenizer(), SHORT, generated=not generated)(prediction)["recall"] < 0.5


def test_a_generation_that_ends_early_or_is_shifted_is_wrong_where_it_is() -> None:
    scores = CopyScores(digit_tokenizer(), SHORT)
    assert scores.score([LABELS[0][:9], [*LABELS[1][:8], END, PAD]], LABELS)["recall"] == pytest.approx(3 / 6)
    assert scores.record["recall_by_position"] == [1, 1 / 2, 0]
    assert scores.record["generated"] == ["12", "4"]
    assert scores.score([row[1:] for row in LABELS], LABELS)["recall"] == 0


def test_generated_text_is_scored_against_the_passage_and_its_length_told() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    first, second = (tokenizer(text).input_ids[:6] for text in TEXTS[:2])
    labels = [[-100, -100, *first, end], [-100, *second, end, -100]]
    scores = CopyScores(tokenizer, PASSAGES)
    metrics = scores.score([[*first, end, end], [*second[:2], end]], labels)
    assert metrics["recall"] == pytest.approx(8 / 12)
    assert metrics["exact_match"] == 1 / 2
    assert metrics["gen_len"] == 4
    assert metrics["empty"] == 0
    assert "blank_accuracy" not in metrics
    assert scores.record["references"] == [str(tokenizer.decode(row)).strip() for row in (first, second)]
    assert scores.record["generated"] == [str(tokenizer.decode(row)).strip() for row in (first, second[:2])]
    assert scores.score([[end, end], [*second]], labels)["empty"] == 50
    with pytest.raises(ValueError, match="labels with 5 target tokens beside special ones; accepted: 6"):
        scores.score([first], [first[:5]])


def test_the_targets_of_an_encoder_decoder_may_open_with_a_special_token() -> None:
    tokenizer = seq2seq_tokenizer("</s> $A </s>")
    labels = [example["labels"] for example in passages(tokenizer, is_encoder_decoder=True)]
    assert labels[0][0] == 1
    generated = np.array([[1, *row, 0] for row in labels])
    metrics = CopyScores(tokenizer, PASSAGES, generated=True)(EvalPrediction(generated, np.array(labels)))
    assert metrics["recall"] == metrics["exact_match"] == 1
    assert metrics["gen_len"] == 6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_interval_holds_the_mean_and_no_more_than_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(np.array(values))
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


def test_the_interval_narrows_with_the_root_of_the_number_of_examples() -> None:
    few, many = (np.arange(count) % 2 for count in (25, 2500))
    (low, high), (lower, upper) = bootstrap_interval(few), bootstrap_interval(many)
    assert high - low == pytest.approx(4 * 0.5 / 5, rel=0.15)
    assert (high - low) / (upper - lower) == pytest.approx(10, rel=0.15)


# ---- through a Trainer


def test_a_trainer_scores_the_argmax_of_a_causal_model(tmp_path: Path) -> None:
    model, dataset, tokenizer = tiny_llama(12), digits(split="validation", size=6), digit_tokenizer()
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none", dataloader_pin_memory=False
    )
    scores = CopyScores(tokenizer, SHORT)
    trainer = Trainer(
        model,
        args,
        eval_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_metrics=scores,
        preprocess_logits_for_metrics=argmax_of_logits,
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        answers = model(torch.tensor([example["input_ids"] for example in dataset])).logits.argmax(-1)[:, :10]
    y = torch.tensor([example["labels"] for example in digits(split="validation", size=6, is_encoder_decoder=True)])
    assert metrics["eval_recall"] == pytest.approx((answers == y)[:, 7:].double().mean().item())
    assert metrics["eval_blank_accuracy"] == pytest.approx((answers == y)[:, :7].double().mean().item())
    assert scores.record["references"] == ["".join(map(str, example["input_ids"][:3])) for example in dataset]


def test_a_trainer_scores_what_an_encoder_decoder_generates(tmp_path: Path) -> None:
    tokenizer = digit_tokenizer()
    torch.manual_seed(1)
    config = small_t5_config(len(tokenizer))
    config.update({"d_model": 16, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "pad_token_id": PAD})
    config.update({"eos_token_id": END, "decoder_start_token_id": PAD, "initializer_factor": 9.0})
    model = T5ForConditionalGeneration(config).eval()
    dataset = digits(split="validation", size=6, is_encoder_decoder=True)
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=4,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        predict_with_generate=True,
        generation_max_length=SHORT.answer_length + 1,
    )
    scores = CopyScores(tokenizer, SHORT, generated=True)
    trainer = Seq2SeqTrainer(
        model,
        args,
        eval_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    metrics = trainer.evaluate()
    x, y = (torch.tensor([example[name] for example in dataset]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        answers = model.generate(x, max_new_tokens=10, do_sample=False)[:, 1:]
    answers = F.pad(answers, (0, 10 - answers.shape[1]), value=PAD)
    assert metrics["eval_recall"] == pytest.approx((answers == y)[:, 7:].double().mean().item())
    assert metrics["eval_blank_accuracy"] == pytest.approx((answers == y)[:, :7].double().mean().item())
    assert len(scores.record["generated"]) == 6

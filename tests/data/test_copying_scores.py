"""Copies are scored token by token at their own positions, by hand and through a Trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_temporal.data.copying import CopyingArguments, CopyScores, DigitCopies, argmax_of_logits, digit_tokenizer
from hf_temporal.data.copying.digits import END, PAD
from hf_temporal.data.rows import bootstrap_interval
from hf_temporal.data.small_t5 import small_t5_config
from tests.data.copies import PASSAGES, SHORT, TEXTS, digits, passages, seq2seq_tokenizer
from tests.tiny_summarization import tiny_llama, tiny_tokenizer


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
        generation_max_length=len(DigitCopies.scored(SHORT)) + 1,
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

"""Every form of the copying task: a program that reads the prompt alone answers it, and guessing reaches chance."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import EvalPrediction, PreTrainedTokenizerFast

from hf_temporal.data.copying import FORMS, CopyingArguments, CopyScores
from hf_temporal.positions import target_positions
from tests.data.copies import TEXTS, drawn, seq2seq_tokenizer
from tests.tiny_summarization import tiny_tokenizer

SETTINGS: list[dict[str, Any]] = [
    {"copying_form": "selective", "copy_length": 5, "blank_length": 20},
    {"copying_form": "selective", "copy_length": 1, "blank_length": 1, "symbols": 3},
    {"copying_form": "induction", "blank_length": 30},
    {"copying_form": "induction", "blank_length": 1, "symbols": 2},
    {"copying_form": "mqar", "blank_length": 40, "symbols": 32, "num_pairs": 8},
    {"copying_form": "mqar", "blank_length": 21, "symbols": 7, "num_pairs": 3, "num_queries": 10},
    {
        "copying_form": "mqar",
        "blank_length": 40,
        "symbols": 64,
        "num_pairs": 32,
        "num_queries": 4,
        "gap_exponent": 9.0,
    },
    {"copying_form": "needles", "copy_length": 5, "blank_length": 100},
    {"copying_form": "needles", "copy_length": 3, "blank_length": 100, "num_needles": 6, "num_queries": 2},
    {"copying_form": "needles", "copy_length": 2, "blank_length": 1, "num_needles": 90},
    {"copying_form": "arithmetic"},
    {"copying_form": "arithmetic", "num_steps": 30},
]
IDS = [" ".join(map(str, each.values())) for each in SETTINGS]


# ---- the answers of programs that know the rules and read the text in front of the answer


def solve_selective(prompt: str) -> str:
    return " ".join(word for word in prompt.split() if word.isdigit())


def solve_induction(prompt: str) -> str:
    words = prompt.split()
    assert words.count("mark") == 2
    return words[words.index("mark") + 1]


def solve_mqar(prompt: str) -> str:
    """Words come in twos: a key and its value, a key and a blank, or two blanks; the last may stand alone."""
    words = prompt.split()
    values: dict[str, str] = {}
    answers: list[str] = []
    for first, second in zip(words[::2], words[1::2], strict=False):
        if second != "_":
            assert not answers
            values[first] = second
        elif first != "_":
            answers.append(values[first])
    return " ".join(answers)


def solve_needles(prompt: str) -> str:
    keys = dict(re.findall(r"\nThe pass key of room (\d\d) is (\d+)\.\n", prompt))
    (rooms,) = re.findall(r"\n\nWhich are the pass keys of these rooms: ([\d,]+)\?", prompt)
    return ",".join(keys[room] for room in rooms.split(","))


def solve_arithmetic(prompt: str) -> str:
    (found,) = re.findall(r"Start with (\d+) and apply these operations one after the other: (\S+)\. Write", prompt)
    value, operations = int(found[0]), found[1].split(",")
    steps = []
    for operation in operations:
        before, by = value, int(operation[1:])
        value = {"+": before + by, "-": before - by, "*": before * by}[operation[0]]
        steps.append(f"{before}{operation}={value}")
    return ";".join(steps)


SOLVERS: dict[str, Callable[[str], str]] = {
    "selective": solve_selective,
    "induction": solve_induction,
    "mqar": solve_mqar,
    "needles": solve_needles,
    "arithmetic": solve_arithmetic,
}


def answer_of(labels: list[int]) -> list[int]:
    return [label for label in labels if label != -100]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_program_answers_every_example(settings: dict[str, Any], split: str) -> None:
    arguments = CopyingArguments(**settings)
    examples, tokenizer = drawn(arguments, split=split, size=200)
    for example in examples:
        prompt = example["input_ids"][:-1]  # the last is the end, or what only fills the last place
        if examples.generates:
            prompt = prompt[: example["labels"].count(-100)]
            assert example["input_ids"][len(prompt) :] == answer_of(example["labels"])
        solved = SOLVERS[arguments.copying_form](str(tokenizer.decode(prompt)))
        labels = [label for label in answer_of(example["labels"]) if label not in tokenizer.all_special_ids]
        assert solved == str(tokenizer.decode(labels)).strip()
        assert len(labels) == len(examples.scored(arguments))
        assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"])


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_an_encoder_decoder_has_the_same_question_and_answer(settings: dict[str, Any]) -> None:
    arguments, tokenizer = CopyingArguments(**settings), seq2seq_tokenizer()
    if arguments.copying_form == "mqar":
        with pytest.raises(ValueError, match="copying_form='mqar' for an encoder–decoder; accepted: a decoder-only"):
            drawn(arguments, tokenizer, is_encoder_decoder=True)
        return
    one, _ = drawn(arguments, tokenizer)
    two, reader = drawn(arguments, tokenizer, is_encoder_decoder=True)
    for row, pair in zip(one, two, strict=True):
        assert -100 not in pair["labels"]
        assert pair["labels"] == answer_of(row["labels"])
        source = str(reader.decode(pair["input_ids"]))
        answer = SOLVERS[arguments.copying_form](source.removesuffix("</s>"))
        assert answer == str(reader.decode(pair["labels"], skip_special_tokens=True)).strip()


# ---- chance


def guess(arguments: CopyingArguments, rng: np.random.Generator, labels: list[int], tokenizer: Any) -> list[int]:
    """An answer drawn uniformly from those that the form has."""
    V = arguments.symbols
    if arguments.copying_form == "mqar":
        return rng.integers(V // 2 + 1, V + 1, len(labels)).tolist()
    if not FORMS[arguments.copying_form].generates:
        return rng.integers(1, V + 1, len(labels)).tolist()
    number = str(rng.integers(10, 100)) if arguments.copying_form == "arithmetic" else ""
    digits = iter(number or "".join(map(str, rng.integers(10, size=len(labels)))))
    scored = FORMS[arguments.copying_form].scored(arguments)
    answered = [tokenizer.vocab[next(digits)] if is_one else label for is_one, label in zip(scored, labels)]  # noqa: B905
    return [*answered, tokenizer.eos_token_id]


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_uniform_guess_reaches_the_chance_that_is_stated(settings: dict[str, Any]) -> None:
    arguments = CopyingArguments(**settings)
    examples, tokenizer = drawn(arguments, size=300)
    rng = np.random.default_rng(3)
    labels = [example["labels"] for example in examples]
    guesses = [guess(arguments, rng, answer_of(row), tokenizer) for row in labels]
    found = CopyScores(tokenizer, arguments).score(guesses, labels)
    width = found["recall_high"] - found["recall_low"]  # some four standard errors
    assert 0 < width < 0.15
    assert found["recall"] == pytest.approx(FORMS[arguments.copying_form].chance(arguments), abs=width)


def test_any_value_in_the_prompt_is_right_once_in_so_many_pairs() -> None:
    arguments = CopyingArguments("mqar", blank_length=40, symbols=64, num_pairs=5)
    examples, tokenizer = drawn(arguments, size=600)
    rng = np.random.default_rng(3)
    rows = [(rng.choice(row["input_ids"][1:10:2], 5), row["labels"]) for row in examples]
    assert CopyScores(tokenizer, arguments).score(*zip(*rows, strict=True))["recall"] == pytest.approx(1 / 5, abs=0.03)


# ---- where things stand


def test_symbols_to_be_copied_are_scattered_and_asked_in_their_order() -> None:
    examples, _ = drawn(CopyingArguments("selective", 3, 9), size=4000)
    places = np.zeros(12)
    for example in examples:
        assert example["input_ids"][12:] == [17, 17, 17, 19]
        assert example["labels"][:13] == [-100] * 13
        places[np.flatnonzero(example["input_ids"][:12])] += 1
    assert places.sum() == 3 * 4000
    assert np.allclose(places / 4000, 3 / 12, atol=0.03)


def test_the_mark_stands_before_any_of_the_symbols() -> None:
    examples, _ = drawn(CopyingArguments("induction", blank_length=5), size=4000)
    places = np.zeros(5)
    for example in examples:
        *x, end = example["input_ids"]
        assert (len(x), x[-1], end) == (7, 17, 19)
        assert example["labels"][:-1] == [-100] * 7
        places[x.index(17)] += 1
    assert np.allclose(places / 4000, 1 / 5, atol=0.03)


@pytest.mark.parametrize("exponent", [0.01, 1.0, 2.0])
def test_gaps_follow_the_power_law(exponent: float) -> None:
    arguments = CopyingArguments("mqar", blank_length=16, num_queries=1, gap_exponent=exponent)
    examples, _ = drawn(arguments, size=4000)
    counts = np.zeros(8)
    for example in examples:
        place = int(np.flatnonzero(np.array(example["labels"]) != -100)[0]) - 1
        assert place % 2 == 0
        counts[(place - 8) // 2] += 1
    expected = np.arange(1, 9) ** (exponent - 1)
    assert np.allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def test_keys_are_asked_equally_often_and_t_counts_the_queries() -> None:
    examples, _ = drawn(CopyingArguments("mqar", blank_length=60, num_pairs=4, num_queries=10))
    for example in examples:
        asked = np.flatnonzero(np.array(example["labels"]) != -100) - 1
        keys = [example["input_ids"][place] for place in asked]
        assert sorted(np.unique(keys, return_counts=True)[1]) == [2, 2, 3, 3]
        t = target_positions(torch.tensor([example["labels"]]))[0]
        assert t[asked + 1].tolist() == [*range(1, 11)]
        assert len(np.unique(example["input_ids"][:8])) == 8


def test_needles_stand_at_ends_of_sentences_in_text_of_the_data_set() -> None:
    arguments = CopyingArguments("needles", 4, 120, num_needles=3, num_queries=2)
    examples, tokenizer = drawn(arguments)
    around = "".join(str(tokenizer.decode(tokenizer(text).input_ids)) for text in TEXTS * 2)
    depths = []
    for example in examples:
        whole = str(tokenizer.decode(example["input_ids"]))
        text = whole.split("\n\n", 1)[1].rsplit("\n\nWhich", 1)[0]
        hay = re.split(r"\nThe pass key of room \d\d is \d{4}\.\n", text)
        assert len(hay) == 4
        assert "".join(hay) in around
        shown, (asked,) = re.findall(r"of room (\d\d) is", text), re.findall(r"rooms: (\d\d,\d\d)\?", whole)
        assert asked.split(",") == [room for room in shown if room in asked.split(",")]
        for place, part in enumerate(hay[:-1]):  # the end of the text is one, too
            assert part == "" or part.endswith(".") or "".join(hay[place + 1 :]) == ""
        depths.append(len(hay[0]) / len("".join(hay)))
    assert min(depths) < 0.1
    assert max(depths) > 0.5


def test_results_stay_between_10_and_99_and_all_operations_occur() -> None:
    examples, tokenizer = drawn(CopyingArguments("arithmetic", num_steps=8), size=300)
    chains = [str(tokenizer.decode(answer_of(example["labels"])[:-1])) for example in examples]
    assert {len(chain) for chain in chains} == {8 * 8 - 1}
    steps = [step for chain in chains for step in chain.split(";")]
    assert all(re.fullmatch(r"[1-9]\d[-+*][2-9]=[1-9]\d", step) for step in steps)
    assert {step[2] for step in steps} == set("+-*")


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_an_example_depends_on_seed_split_and_index_alone(settings: dict[str, Any]) -> None:
    arguments = CopyingArguments(**settings)
    examples, _ = drawn(arguments)
    first = [*examples]
    again, _ = drawn(arguments)
    assert [again[index] for index in (4, 0)] == [first[4], first[0]]
    assert [*pickle.loads(pickle.dumps(examples))] == first
    assert [*drawn(arguments, seed=8)[0]] != first
    held_out = [*drawn(arguments, split="validation", seed=1)[0]]
    assert [*drawn(arguments, split="validation", seed=2)[0]] == held_out
    assert held_out != [*drawn(arguments, split="test")[0]]


# ---- scores


def test_queries_are_scored_where_they_stand() -> None:
    arguments = CopyingArguments("mqar", blank_length=8, num_pairs=2)
    scores = CopyScores(FORMS["mqar"].tokenizer_of(arguments), arguments)  # type: ignore[arg-type]
    labels = np.full((2, 14), -100)
    labels[0, [5, 9]], labels[1, [7, 11]] = (9, 10), (11, 12)
    rows = np.full((2, 14), 3)
    rows[0, [4, 8]], rows[1, [6, 10]] = (9, 10), (11, 9)
    found = scores(EvalPrediction(predictions=rows, label_ids=labels))
    assert (found["recall"], found["exact_match"]) == (3 / 4, 1 / 2)
    assert scores.record["recall_by_position"] == [1, 1 / 2]
    assert scores.record["generated"] == ["9 10", "11 9"]
    assert not {"gen_len", "blank_accuracy", "chain_accuracy"} & set(found)


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [*(tokenizer.vocab[character] for character in text), tokenizer.eos_token_id]


def test_a_chain_is_scored_on_its_last_number_and_the_rest_apart() -> None:
    arguments, tokenizer = CopyingArguments("arithmetic", num_steps=2), tiny_tokenizer()
    labels = 2 * [spelled(tokenizer, "37+5=42;42*2=84")]
    answers = [spelled(tokenizer, text) for text in ("37+5=42;42*2=85", "37-5=42;42*2=84")]
    scores = CopyScores(tokenizer, arguments)
    found = scores.score(answers, labels)
    assert (found["recall"], found["exact_match"]) == (3 / 4, 1 / 2)
    assert found["chain_accuracy"] == pytest.approx(25 / 26)
    assert found["gen_len"] == 15
    assert scores.record["recall_by_position"] == [1, 1 / 2]
    assert scores.record["references"] == ["37+5=42;42*2=84"] * 2
    assert scores.record["generated"][0] == "37+5=42;42*2=85"


def test_commas_between_pass_keys_are_not_scored() -> None:
    arguments, tokenizer = CopyingArguments("needles", 2, num_needles=2), tiny_tokenizer()
    labels, answers = ([spelled(tokenizer, text)] for text in ("12,34", "12;35"))
    scores = CopyScores(tokenizer, arguments)
    found = scores.score(answers, labels)
    assert found["recall"] == 3 / 4
    assert scores.record["recall_by_position"] == [1, 1, 1, 0]
    assert "chain_accuracy" not in found


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_pairs": 3}, "num_pairs=3 and copying_form='digits', which does not read it; accepted: 4, or copying"),
        ({"copying_form": "induction", "copy_length": 3}, "accepted: 10, or copying_form='digits', 'text'"),
        ({"copying_form": "arithmetic", "blank_length": 9}, "blank_length=9 and copying_form='arithmetic'"),
        ({"copying_form": "mqar", "num_pairs": 9}, "num_pairs=9; accepted: at most 8, half the symbols"),
        ({"copying_form": "mqar", "blank_length": 7}, "num_queries=4; accepted: at most 3, half of blank_length"),
        ({"copying_form": "mqar", "gap_exponent": 0.0}, "gap_exponent=0.0; accepted: a number above 0"),
        ({"copying_form": "mqar", "gap_exponent": float("inf")}, "gap_exponent=inf; accepted: a number above 0"),
        ({"copying_form": "mqar", "num_queries": 0}, "num_queries=0; accepted: a whole number of at least 1"),
        ({"copying_form": "selective", "symbols": 1}, "symbols=1; accepted: a whole number of at least 2"),
        ({"copying_form": "needles", "num_needles": 91}, "num_needles=91; accepted: at most 90, the rooms"),
        ({"copying_form": "needles", "num_queries": 2}, "num_queries=2; accepted: at most 1, num_needles"),
        ({"eval_length_factor": 0}, "eval_length_factor=0; accepted: a whole number of at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CopyingArguments(**given)


def test_too_little_text_and_tokenizers_without_digits_are_named() -> None:
    arguments = CopyingArguments("needles", 4, 10_000)
    with pytest.raises(ValueError, match=r"blank_length=10000; accepted: at most \d+, the tokens of the train texts"):
        drawn(arguments)
    words = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    with pytest.raises(ValueError, match=r"tokenizer '' makes .* of '0123456789,'; accepted: one with a token for"):
        drawn(CopyingArguments("needles", 4, 10), tokenizer)


def test_the_held_out_examples_are_longer_by_the_factor() -> None:
    assert CopyingArguments("mqar", eval_length_factor=4).held_out == CopyingArguments("mqar", blank_length=400)
    assert CopyingArguments("arithmetic", eval_length_factor=2).held_out == CopyingArguments("arithmetic", num_steps=8)
    assert CopyingArguments().held_out == CopyingArguments()

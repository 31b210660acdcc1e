"""The ROUGE metric that lies in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate
import pytest

import hf_temporal.data
from hf_temporal.data.rouge import CharacterTokenizer, needs_characters

FOLDER = Path(hf_temporal.data.__file__).parent / "metrics" / "rouge"


@pytest.fixture(scope="module")
def rouge() -> Any:
    return evaluate.load(str(FOLDER), keep_in_memory=True)


def test_scores_counted_by_hand(rouge: Any) -> None:
    scores = rouge.compute(predictions=["the cat sat here"], references=["the black cat sat"])
    assert scores["rouge1"] == pytest.approx(3 / 4)  # the, cat, sat
    assert scores["rouge2"] == pytest.approx(1 / 3)  # cat sat
    assert scores["rougeL"] == pytest.approx(3 / 4)  # the … cat sat


def test_mean_over_examples_and_the_same_text_scores_one(rouge: Any) -> None:
    scores = rouge.compute(predictions=["a cat sat", "dogs"], references=["a cat sat", "trees grow"])
    assert scores["rouge1"] == pytest.approx(0.5)
    assert scores["rougeL"] == pytest.approx(0.5)


def test_stems_are_compared(rouge: Any) -> None:
    assert rouge.compute(predictions=["reading files"], references=["reads file"])["rouge1"] == 1


def test_lsum_matches_line_by_line(rouge: Any) -> None:
    scores = rouge.compute(predictions=["b c\na d"], references=["a d\nb c"])
    assert scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(0.5)


def test_intervals_hold_the_mean_narrow_with_more_examples_and_repeat(rouge: Any) -> None:
    texts = {"predictions": ["a b", "c d", "e f", "a z"], "references": ["a b", "c x", "y z", "a b"]}
    few, many = rouge.compute(**texts), rouge.compute(**{name: values * 25 for name, values in texts.items()})
    for scores in (few, many):
        assert 0 <= scores["rouge1_low"] < scores["rouge1"] < scores["rouge1_high"] <= 1
    assert many["rouge1_high"] - many["rouge1_low"] < (few["rouge1_high"] - few["rouge1_low"]) / 3
    assert rouge.compute(**texts) == few


# ---- characters


def test_words_are_blind_to_chinese_and_japanese_and_characters_are_not(rouge: Any) -> None:
    for text in ("今天天气很好，我们去公园。", "今日はとても良い天気です。"):
        words = rouge.compute(predictions=[text], references=[text])
        assert {words[name] for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")} == {0}
        characters = rouge.compute(predictions=[text], references=[text], tokenizer="char")
        assert {characters[name] for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")} == {1}


def test_chinese_scores_counted_by_hand(rouge: Any) -> None:
    """我喜欢读书 against 他喜欢写书: 喜, 欢 and 书 are shared; of the pairs only 喜欢; 喜 欢 书 in order."""
    scores = rouge.compute(predictions=["我喜欢读书。"], references=["他喜欢写书！"], tokenizer="char")
    assert scores["rouge1"] == pytest.approx(3 / 5)
    assert scores["rouge2"] == pytest.approx(1 / 4)
    assert scores["rougeL"] == pytest.approx(3 / 5)


def test_japanese_scores_counted_by_hand(rouge: Any) -> None:
    """猫が寝る (4) against 犬が寝ている (6): が, 寝 and る are shared, in order; of the pairs が寝."""
    scores = rouge.compute(predictions=["猫が寝る"], references=["犬が寝ている"], tokenizer="char")
    assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 6))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (3 + 5))
    assert scores["rougeL"] == pytest.approx(2 * 3 / (4 + 6))


def test_mixed_text_scores_counted_by_hand(rouge: Any) -> None:
    """用 bert 训 练 3 天 (6) against 用 gpt 训 练 30 天 (6): BERT and GPT share no T, 3 and 30 no 3."""
    texts = {"predictions": ["用BERT训练3天"], "references": ["用 GPT 训练 30 天"]}
    scores = rouge.compute(**texts, tokenizer="char")
    assert scores["rouge1"] == pytest.approx(4 / 6)
    assert scores["rouge2"] == pytest.approx(1 / 5)
    assert rouge.compute(**texts)["rouge1"] == 0


def test_lsum_takes_chinese_line_by_line(rouge: Any) -> None:
    scores = rouge.compute(predictions=["丙丁\n甲乙"], references=["甲乙\n丙丁"], tokenizer="char")
    assert scores["rougeLsum"] == 1
    assert scores["rougeL"] == pytest.approx(0.5)


def test_another_tokenizer_is_refused(rouge: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer='chars'; accepted: default, char"):
        rouge.compute(predictions=["a"], references=["a"], tokenizer="chars")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("用BERT-base训练3.5天。", ["用", "bert", "base", "训", "练", "3", "5", "天"]),
        ("ＢＥＲＴ２模型", ["bert2", "模", "型"]),
        ("ﾃﾞｰﾀを見る_12", ["デ", "ー", "タ", "を", "見", "る", "12"]),
        (" 「」、，…！\n", []),
        ("Words, and 2 numbers", ["words", "and", "2", "numbers"]),
    ],
)
def test_characters_and_runs_of_ascii(text: str, tokens: list[str]) -> None:
    assert CharacterTokenizer().tokenize(text) == tokens


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["深度学习在医学影像中的应用"], True),
        (["基于BERT的文本分类"], True),
        (["データを見る", "猫が寝る"], True),
        (["Он читает книгу"], True),
        (["A cat sat."], False),
        (["Élève très naïf, œuvre ß", "Tiếng Việt", "Ｆｕｌｌ ｗｉｄｔｈ"], False),
        (["The title is 你好"], False),
        (["1 2 3 9 9 0", "。"], False),
        ([], False),
    ],
)
def test_who_needs_characters(texts: list[str], expected: bool) -> None:
    assert needs_characters(texts) is expected

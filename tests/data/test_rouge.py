"""The ROUGE metric that lies in the package."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

import hf_temporal.data
from hf_temporal.data.rouge import CharacterTokenizer, WordTokenizer, one_sentence_per_line

FOLDER = Path(hf_temporal.data.__file__).parent / "metrics" / "rouge"
NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


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


# ---- ASCII text: rouge_score's own numbers


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_text_has_the_tokens_of_rouge_score(text: str) -> None:
    assert WordTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


ENGLISH = st.lists(st.sampled_from(["The", "dog's", "dogs", "ran,", "running", "3.5", "miles\n", "U.S.", "x_1", "!"]))


@given(ENGLISH.map(" ".join), ENGLISH.map(" ".join))
def test_english_text_has_the_scores_of_rouge_score(prediction: str, reference: str) -> None:
    ours = RougeScorer(NAMES, tokenizer=WordTokenizer()).score(reference, prediction)
    assert ours == RougeScorer(NAMES, use_stemmer=True).score(reference, prediction)


def test_english_scores_stay_among_references_in_other_scripts(rouge: Any) -> None:
    english = ("The dogs were running home.", "A dog runs home")
    own = RougeScorer(NAMES, use_stemmer=True).score(*english)
    others = [("Он читает книгу", "Она поёт песню"), ("我喜欢读书", "天气晴朗"), ("هذا كتاب", "سماء زرقاء")]
    references, predictions = zip(english, *others, strict=True)
    scores = rouge.compute(predictions=[*predictions], references=[*references])
    assert {name: scores[name] for name in NAMES} == {name: own[name].fmeasure / 4 for name in NAMES}


# ---- words


@pytest.mark.parametrize(
    ("reference", "half", "none"),
    [
        ("кошка спит на диване", "кошка спит под столом", "завтра будет сильный дождь"),  # Russian
        ("η γάτα κοιμάται εδώ", "η γάτα παίζει έξω", "αύριο θα βρέξει πολύ"),  # Greek
        ("القطة تنام على السرير", "القطة تنام تحت الشجرة", "غدا سوف يهطل المطر"),  # Arabic
        ("کتاب روی میز است", "کتاب روی صندلی بود", "فردا باران خواهد بارید"),  # Persian
        ("החתול ישן על המיטה", "החתול ישן ליד הדלת", "מחר ירד גשם חזק"),  # Hebrew
        ("बिल्ली बिस्तर पर सोती", "बिल्ली बिस्तर में बैठी", "कल बहुत बारिश होगी"),  # Hindi
        ("বিড়াল বিছানায় ঘুমায় এখন", "বিড়াল বিছানায় খেলে রোজ", "কাল খুব বৃষ্টি হবে"),  # Bengali
        ("பூனை கட்டிலில் தூங்குகிறது இன்று", "பூனை கட்டிலில் விளையாடுகிறது தினமும்", "நாளை கனமழை பெய்யும் போல"),  # Tamil
        ("고양이가 침대에서 조용히 잔다", "고양이가 침대에서 신나게 논다", "내일은 비가 많이 온다"),  # Korean
        ("con mèo đang ngủ", "con mèo thích chơi", "ngày mai trời mưa"),  # Vietnamese
        ("die Straße führt geradeaus", "die Straße biegt rechts", "für Käse bräuchte man"),  # German
        ("l'été dernier était", "l'été prochain sera", "où êtes vous allés"),  # French
        ("კატა საწოლზე წყნარად წევს", "კატა საწოლზე ხალისით თამაშობს", "ხვალ ძლიერი წვიმა იქნება"),  # Georgian
        ("կատուն քնում է այստեղ", "կատուն քնում էր այնտեղ", "վաղը ուժեղ անձրև կգա"),  # Armenian
        ("ድመቷ አልጋ ላይ ተኛች", "ድመቷ አልጋ ስር ገባች", "ነገ ከባድ ዝናብ ይዘንባል"),  # Amharic
    ],
)
def test_two_of_four_words_are_half_and_other_words_nothing(rouge: Any, reference: str, half: str, none: str) -> None:
    for prediction, expected in ((reference, 1), (half, 0.5), (none, 0)):
        for form in ("NFC", "NFD"):
            texts = {"predictions": [unicodedata.normalize(form, prediction)], "references": [reference]}
            assert rouge.compute(**texts)["rouge1"] == pytest.approx(expected), prediction


def test_an_accent_is_part_of_its_word(rouge: Any) -> None:
    """rouge-score sees f and r in für and in fährt, and nothing in é."""
    assert rouge.compute(predictions=["für"], references=["fährt r f"])["rouge1"] == 0
    assert rouge.compute(predictions=["a résumé"], references=["a resume"])["rouge1"] == 0.5


# ---- characters


def test_chinese_japanese_thai_and_the_like_are_scored_by_the_character(rouge: Any) -> None:
    """One character of four is shared."""
    for reference, prediction in [
        ("今天下雨", "我很好雨"),
        ("猫が寝る", "犬は走る"),
        ("コーヒー", "お茶だヒ"),
        ("ขคงจ", "ขฉชซ"),
        ("ກຂຄງ", "ກຈສຊ"),
        ("កខគឃ", "កចឆជ"),
        ("ကခဂဃ", "ကစဆဇ"),
        ("ཀཁགང", "ཀཅཆཇ"),
    ]:
        for name in ("default", "char"):
            same = rouge.compute(predictions=[reference], references=[reference], tokenizer=name)
            assert {same[key] for key in NAMES} == {1}
            scores = rouge.compute(predictions=[prediction], references=[reference], tokenizer=name)
            assert scores["rouge1"] == pytest.approx(1 / 4), reference


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
    for name in ("default", "char"):
        scores = rouge.compute(**texts, tokenizer=name)
        assert scores["rouge1"] == pytest.approx(4 / 6)
        assert scores["rouge2"] == pytest.approx(1 / 5)


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
        ("हिन्दी для 3 дня", ["हि", "न्दी", "д", "л", "я", "3", "д", "н", "я"]),
    ],
)
def test_characters_and_runs_of_ascii(text: str, tokens: list[str]) -> None:
    assert CharacterTokenizer().tokenize(text) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("用BERT训练3天", "用 bert 训 练 3 天"),
        ("Models模型runs训练ing", "model 模 型 run 训 练 ing"),
        ("รุ่นiPhone15ใหม่ ราคา๙๐บาท", "รุ่ น iphone15 ให ม่ รา คา ๙๐ บา ท"),
        ("ภาษาไทยและเด็ก", "ภา ษา ไท ย และ เด็ ก"),
        ("ພາສາລາວ", "ພາ ສາ ລາ ວ"),
        ("ភាសាខ្មែរ", "ភា សា ខ្មែ រ"),
        ("မြန်မာ အင်္ဂလိပ်", "မြ န် မာ အ င်္ဂ လိ ပ်"),
        ("བོད་ཡིག།", "བོ ད ཡི ག"),
        ("サーバー2台のデータ", "サ ー バ ー 2 台 の デ ー タ"),
        ("ㄅㄆ注音〇々", "ㄅ ㄆ 注 音 〇 々"),
        ("हिन्दी में क्षत्रिय।", "हिन्दी में क्षत्रिय"),
        ("كَتَبَ، كتب؟ ٢٠٢٤", "كَتَبَ كتب ٢٠٢٤"),
        ("שָׁלוֹם עולם", "שָׁלוֹם עולם"),
        ("می\u200cخواهم Stra\u00adße क्\u200dष", "میخواهم straße क्ष"),
        ("Ինչպե՞ս ես։", "ինչպես ես"),
        ("GPT-4는 3일", "gpt 4는 3일"),
        ("ÉCOLE ﬁn Ｆｕｌｌ m²", "école fin full m2"),
        ("it’s “naïve” 🙂 …", "it s naïve"),
    ],
)
def test_words_and_characters_by_runs(text: str, tokens: str) -> None:
    for form in ("NFC", "NFD", "NFKC"):
        found = WordTokenizer().tokenize(unicodedata.normalize(form, text))
        assert found == [unicodedata.normalize("NFKC", token) for token in tokens.split(" ")]


@given(st.text())
def test_no_token_starts_with_a_mark_or_depends_on_the_form(text: str) -> None:
    tokenizer = WordTokenizer()
    tokens = tokenizer.tokenize(text)
    assert not [token for token in tokens if unicodedata.category(token[0]).startswith("M")]
    assert tokenizer.tokenize(unicodedata.normalize("NFD", text)) == tokens


# ---- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 3.5 m. Is it? Yes!", ["It is 3.5 m.", "Is it?", "Yes!"]),
        ("今天下雨。明天呢？好！", ["今天下雨。", "明天呢？", "好！"]),
        ("هل هذا كتاب؟ نعم.", ["هل هذا كتاب؟", "نعم."]),
        ("یہ کتاب ہے۔ وہ قلم ہے۔", ["یہ کتاب ہے۔", "وہ قلم ہے۔"]),
        ("यह है। वह है॥ हाँ", ["यह है।", "वह है॥", "हाँ"]),
        ("သူလာသည်။သူသွားသည်။", ["သူလာသည်။", "သူသွားသည်။"]),
        ("គាត់មក។ គាត់ទៅ។", ["គាត់មក។", "គាត់ទៅ។"]),
        ("བོད་ཡིག། ཁྱི། ༎", ["བོད་ཡིག།", "ཁྱི།", "༎"]),
        ("ሰላም። ደህና ነህ፧ አዎ", ["ሰላም።", "ደህና ነህ፧", "አዎ"]),
        ("Այո։ Ոչ։", ["Այո։", "Ոչ։"]),
    ],
)
def test_sentences_of_every_script_end(text: str, sentences: list[str]) -> None:
    assert [line.strip() for line in one_sentence_per_line(text).split("\n") if line.strip()] == sentences

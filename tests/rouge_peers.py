"""ROUGE-1 of the same pairs by this package and by others, as a table: `python -m tests.rouge_peers`.

Each language has a reference, a text that shares half its words with it (characters in Chinese, Japanese and Thai),
and a text that shares none: right is 50 and 0. Others stem and split as their documentation says for the language.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import evaluate
import jieba  # type: ignore[import-not-found]
from rouge_chinese import Rouge as RougeChinese  # type: ignore[import-not-found]
from rouge_score.rouge_scorer import RougeScorer
from sumeval.metrics.rouge import RougeCalculator  # type: ignore[import-not-found]
from torchmetrics.functional.text import rouge_score  # type: ignore[import-not-found]

METRIC = Path(__file__).parents[1] / "hf_temporal" / "data" / "metrics" / "rouge"
TEXTS = {
    "English": ("old cats were sleeping", "old cat reads books", "tomorrow brings heavy rain"),
    "German": ("die Straße führt geradeaus", "die Straße biegt ab", "für Käse bräuchte man"),
    "Russian": ("кошка спит на диване", "кошка спит под столом", "завтра будет сильный дождь"),
    "Hindi": ("बिल्ली बिस्तर पर सोती", "बिल्ली बिस्तर में बैठी", "कल बहुत बारिश होगी"),
    "Korean": ("고양이가 침대에서 조용히 잔다", "고양이가 침대에서 신나게 논다", "내일은 비가 많이 온다"),
    "Arabic": ("القطة تنام على السرير", "القطة تنام تحت الشجرة", "غدا سوف يهطل المطر"),
    "Chinese": ("今天北京下雨", "今天上海下雪", "我们喜欢读书"),
    "Japanese": ("猫が家で寝る", "猫が庭で走り", "明日は雨だね"),
    "Thai": ("ดูหนัง", "ดูหมีดำ", "กินข้าว"),
    "Chinese, English": ("用BERT训练3天", "用GPT训练2次", "明年学LLM吧"),
}
SUMEVAL = {"Chinese": "zh", "Chinese, English": "zh", "Japanese": "ja"}


def scores(ours: Any, language: str, prediction: str, reference: str) -> list[float]:
    """F1 of this package, rouge-score, torchmetrics, sumeval and rouge-chinese, from 0 to 1."""
    words = [" ".join(jieba.cut(text)) if "Chinese" in language else text for text in (prediction, reference)]
    return [
        ours.compute(predictions=[prediction], references=[reference])["rouge1"],
        RougeScorer(["rouge1"], use_stemmer=True).score(reference, prediction)["rouge1"].fmeasure,
        float(rouge_score(prediction, reference, use_stemmer=True, rouge_keys="rouge1")["rouge1_fmeasure"]),
        RougeCalculator(stopwords=False, lang=SUMEVAL.get(language, "en")).rouge_1(prediction, reference),
        RougeChinese(metrics=["rouge-1"]).get_scores(*words)[0]["rouge-1"]["f"],
    ]


def table() -> str:
    ours = evaluate.load(str(METRIC), keep_in_memory=True)
    names = ("rouge-score", "torchmetrics", "sumeval", "rouge-chinese")
    rows = [["ROUGE-1", "ours", *(f"{name} {version(name)}" for name in names)], ["---"] * (2 + len(names))]
    for language, (reference, *predictions) in TEXTS.items():
        half, none = (scores(ours, language, prediction, reference) for prediction in predictions)
        rows.append([language, *(f"{100 * f1:.0f}, {100 * f0:.0f}" for f1, f0 in zip(half, none, strict=True))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())  # noqa: T201

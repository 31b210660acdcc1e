"""ROUGE of many pairs on all cores, by words or, for scripts that put no spaces between them, by the character.

Run as a script it is one of the processes: a JSON object comes in on standard input, JSON rows of scores go out. It
imports neither torch nor transformers, so that each is ready in a second.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE_TOKENIZERS = ("default", "char")
CHARACTERS_WORTH_PROCESSES = 1_000_000  # scored in some three seconds, a process being ready in one

_TOKEN = re.compile(r"[a-z0-9]+|[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_LETTER = re.compile(r"(?!\d)[^\W_\u0250-\u1dff\u1f00-\U0010ffff]")


class CharacterTokenizer:
    """One token for each letter or digit, but for each run of ASCII ones: "用BERT训练3天" is 用, bert, 训, 练, 3, 天.

    Lower case; full-width and half-width forms are the same (Unicode NFKC); spaces and punctuation are no tokens. So
    ASCII text gives the tokens of rouge-score's own tokenizer without stemming, which finds none in Chinese.
    """

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`."""
        return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def needs_characters(texts: Iterable[str]) -> bool:
    """Whether fewer than half of all letters are Latin: words of a-z and 0-9 would then miss most of the text."""
    letters = latin = 0
    for text in texts:
        normal = unicodedata.normalize("NFKC", text)
        letters += len(_LETTER.findall(normal))
        latin += len(_LATIN_LETTER.findall(normal))
    return 2 * latin < letters


def f1_scores(
    predictions: Sequence[str], references: Sequence[str], *, use_stemmer: bool, tokenizer: str, processes: int
) -> list[list[float]]:
    """For each pair, in their order, the F1 of `ROUGE_TYPES`.

    Many pairs are shared among so many `processes`, which are started for them and know nothing of this one: no fork
    under threads, no second import of the main module, and a daemon may start them, too.

    Raises:
        RuntimeError: one of these failed; the message holds its error.
    """
    settings: dict[str, Any] = {"use_stemmer": use_stemmer, "tokenizer": tokenizer}
    if processes == 1 or sum(map(len, (*predictions, *references))) < CHARACTERS_WORTH_PROCESSES:
        return _f1(predictions, references, **settings)
    shares = [
        {"predictions": predictions[first::processes], "references": references[first::processes], **settings}
        for first in range(processes)
    ]
    scores: list[list[float]] = [[]] * len(predictions)
    with ThreadPoolExecutor(processes) as pool:
        for first, share in enumerate(pool.map(_in_another_process, shares)):
            scores[first::processes] = share
    return scores


def _f1(
    predictions: Sequence[str], references: Sequence[str], *, use_stemmer: bool, tokenizer: str
) -> list[list[float]]:
    from rouge_score.rouge_scorer import RougeScorer  # and with it all of NLTK, which takes its time

    by_character = CharacterTokenizer() if tokenizer == "char" else None
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=use_stemmer, tokenizer=by_character)
    scores = (scorer.score(*texts) for texts in zip(references, predictions, strict=True))
    return [[score[name].fmeasure for name in ROUGE_TYPES] for score in scores]


def _in_another_process(share: dict[str, Any]) -> list[list[float]]:
    answer = subprocess.run(
        [sys.executable, "-I", __file__],
        input=json.dumps({"path": [folder for folder in sys.path if isinstance(folder, str)], "share": share}),
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if answer.returncode:
        error = answer.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"ROUGE failed in a process of its own, exit code {answer.returncode}: {error}")
    scores: list[list[float]] = json.loads(answer.stdout)
    return scores


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    sys.path[:] = job["path"]
    sys.stdout.write(json.dumps(_f1(**job["share"])))

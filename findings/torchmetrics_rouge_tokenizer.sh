#!/usr/bin/env bash
# torchmetrics: ROUGEScore with a tokenizer for Chinese gives any two Chinese texts 100.
#
# ROUGEScore(tokenizer=…) takes a function that splits a text, as Chinese, Japanese and Thai need it. The function is not
# given the text, though: the default normalizer has replaced every run of characters other than a-z and 0-9 by a space.
# Of a Chinese sentence one space is left, jieba.lcut and list make a token of it, and so two sentences without a common
# character score 1.0; str.split makes none of it, and a Russian sentence scores 0.0 against itself. Nothing warns. With
# a normalizer of one's own beside the tokenizer the scores are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 jieba==0.42.1
cat > "$folder/look.py" <<'PY'
import jieba
import torch
import torchmetrics
from torchmetrics.text import ROUGEScore

jieba.setLogLevel(60)
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__, "jieba", jieba.__version__)
chinese, other, russian = "今天北京下雨", "我们喜欢读书", "кошка спит на диване"
assert not set(chinese) & set(other)


def rouge1(prediction, reference, **options):
    return ROUGEScore(rouge_keys="rouge1", **options)(prediction, reference)["rouge1_fmeasure"].item()


found = {
    f"{pair} by {name}": rouge1(*texts, tokenizer=split, **more)
    for pair, texts, name, split, more in (
        ("two Chinese sentences without a common character", (chinese, other), "jieba.lcut", jieba.lcut, {}),
        ("two Chinese sentences without a common character", (chinese, other), "list", list, {}),
        ("a Russian sentence against itself", (russian, russian), "str.split", str.split, {}),
        ("the two Chinese sentences", (chinese, other), "list and normalizer=str.lower", list, {"normalizer": str.lower}),
        ("the Russian one", (russian, russian), "str.split and normalizer=str.lower", str.split, {"normalizer": str.lower}),
    )
}
for what, score in found.items():
    print(f"ROUGE-1 of {what}: {score}")
assert [*found.values()] == [1.0, 1.0, 0.0, 0.0, 1.0], found
PY
"$folder/venv/bin/python" "$folder/look.py"

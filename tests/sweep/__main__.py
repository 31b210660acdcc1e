"""Trains every causal, seq2seq, image–text and speech class of the installed transformers for one step, made tiny.

make test-sweep ARGS='--out docs/models.md'
python -m tests.sweep --only LlamaForCausalLM BartForConditionalGeneration
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from .run import classes, examine_all
from .table import faults, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of classes")
    parser.add_argument("--out", type=Path, help="the page that is written")
    parser.add_argument("--raw", type=Path, help="what was found, as JSON lines")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    reports = []
    for report in examine_all(given.only or classes(), jobs=given.jobs):
        reports.append(report)
        if given.raw:
            with given.raw.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report), ensure_ascii=False) + "\n")
    text = page(reports)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    else:
        print(text)  # noqa: T201
    if wrong := faults(reports):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

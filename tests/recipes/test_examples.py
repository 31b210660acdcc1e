"""The examples to copy run as they stand, and learn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "recipes" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_learns(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.stem == "sft_trainer":
        pytest.importorskip("trl", minversion="1.16.0")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path), run_name="__main__")
    assert names["trainer"].temporal_power == 2
    assert re.search(r"^from hf_temporal(\.trl)? import Temporal", path.read_text("utf-8"), re.MULTILINE)
    (loss, last) = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out.splitlines()[-1]))
    assert last < loss < 3  # from ln 64 = 4.2


def test_there_are_four() -> None:
    assert [path.stem for path in EXAMPLES] == ["own_trainer", "seq2seq_trainer", "sft_trainer", "trainer"]

"""The profile of a recipe knows the functions that it names, and says so where it does not."""

from __future__ import annotations

from pathlib import Path

import profile_recipe
import pytest

from tests.tiny_run import Tiny


def test_every_part_is_found_and_all_of_them_make_the_whole(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(profile_recipe.PARTS, "renamed", [("hf_temporal/trainer.py", "no_such_function")])
    profile_recipe.main(tiny.flags(tmp_path / "run"))
    table = capsys.readouterr().out.rsplit("\n\n", 1)[1]
    rows = {part.strip(): [each.strip() for each in rest] for part, *rest in map(columns, table.splitlines()[2:])}
    assert rows["renamed"] == ["0.0", profile_recipe.NEVER]
    assert [part for part, (_, share) in rows.items() if share == profile_recipe.NEVER] == ["renamed"]
    assert [*rows] == [*profile_recipe.PARTS, "all else", "whole"]
    seconds = {part: float(taken) for part, (taken, _) in rows.items()}
    whole = seconds.pop("whole")
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.05 * len(rows))
    assert 0 < seconds["training: forward and backward pass"] < whole


def columns(line: str) -> list[str]:
    return line.strip("|").split("|")

"""The profile of a recipe knows the functions that it names, and says so where it does not."""

from __future__ import annotations

from pathlib import Path

import profile_recipe
import pytest

from tests.tiny_run import Tiny


def test_every_part_is_found_and_none_holds_another(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(profile_recipe.PARTS, "renamed", [("hf_temporal/trainer.py", "no_such_function")])
    whole, parts = profile_recipe.profiled(tiny.flags(tmp_path / "run"))
    assert [*parts] == [*profile_recipe.PARTS]
    assert [part for part, seconds in parts.items() if seconds is None] == ["renamed"]
    seconds = {part: each for part, each in parts.items() if each is not None}
    assert min(seconds.values()) > 0
    assert seconds.pop(profile_recipe.IMPORTS) < whole
    assert sum(seconds.values()) < whole


def test_the_table_has_all_parts_and_what_is_left_of_the_whole() -> None:
    table = profile_recipe.table(40, {"renamed": None, profile_recipe.IMPORTS: 4, "evaluation: losses": 20.04})
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] == [
        ["renamed", "0.0", profile_recipe.NEVER],
        ["evaluation: losses", "20.0", "50.1%"],
        ["all else", "20.0", "49.9%"],
        ["whole", "40.0", "100.0%"],
        [profile_recipe.IMPORTS, "4.0", "10.0%"],
    ]

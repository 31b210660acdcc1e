"""JSON files with a line for each item of a list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.tables import write_json


@pytest.mark.parametrize("items", [[], [{"step": 0, "text": 'é "]}\n'}], [1, [2, 3], {"loss": float("inf")}]])
def test_a_list_is_written_line_by_line(items: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    content = {"version": 1, "items": items, "others": []}
    write_json(path, content, line_by_line="items")
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.splitlines()[0] == '{"version": 1, "others": [], "items": ['
    assert len(text.splitlines()) == max(1, len(items)) + 2
    assert ("é" in text) == ("step" in str(items))
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]

"""The benchmark of the small models: its rows, and what it says of their losses."""

from __future__ import annotations

from typing import Any

import pytest
import small_models


def test_rows_of_both_kinds_of_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_models, "BATCH", 2)
    found: dict[str, Any] = {}

    def keep(name: str, settings: Any, measure: Any, columns: list[str]) -> None:
        found[name] = columns, measure(settings)

    monkeypatch.setattr(small_models, "carry_out", keep)
    small_models.main(["--models", "llama", "recurrent_gemma", "t5", "--repeats", "2"])
    columns, rows = found["small_models"]
    llama, gemma, t5 = rows
    assert all(set(columns) <= row.keys() for row in rows)
    assert [row["model"] for row in rows] == ["llama", "recurrent_gemma", "t5"]
    assert [row["loss"] for row in rows] == ["exact"] * 3
    assert [row["documents apart"] for row in (llama, gemma)] == [True, False]
    assert llama["fused head"] == "exact" != gemma["fused head"]
    assert llama["parameters"] == 83_776
    assert llama["tokens"] == gemma["tokens"] == 2 * 81
    assert t5["tokens"] == 2 * (80 + 80)
    for row in rows:
        assert len(row["all_seconds"]) == 2
        assert min(row["all_seconds"]) <= row["seconds a step"] <= max(row["all_seconds"])

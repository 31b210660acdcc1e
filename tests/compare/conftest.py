"""A recipe that takes no time, and the flags of a comparison of its runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_temporal.compare import runs
from tests.tiny_run import child_environment, tiny

from .stub_recipe import STUB

__all__ = ["child_environment", "tiny"]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that takes no time; run by Python itself."""
    monkeypatch.setattr(runs, "LAUNCHER", (sys.executable,))
    path = tmp_path / "stub_recipe.py"
    path.write_text(STUB, encoding="utf-8")
    return path


@pytest.fixture
def flags(stub: Path, tmp_path: Path) -> list[str]:
    grid = ["--powers", "0", "1", "inf", "--seeds", "0", "1", "2"]
    return [str(stub), *grid, "--metric", "recall", "--output_dir", str(tmp_path / "out")]

"""Every class of the installed transformers, one step: exact, the Trainer's own fault, or refused in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_temporal.finetuning import generation
from tests.sweep.answers import ALONE, IN_BATCHES, OTHERS
from tests.sweep.cases import LAYOUTS, examine
from tests.sweep.table import answers_cell, cell, faults


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_every_model_is_exact_or_refused() -> None:
    command = [sys.executable, "-m", "tests.sweep"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_sweep_itself() -> None:
    report = examine("BloomForCausalLM")
    assert report.reason == ""
    assert faults([report]) == []
    found = {layout: cell(report.layouts[layout]) for layout in LAYOUTS}
    assert found["right"] == found["accumulated"] == "exact"
    assert found["left"].startswith("exact; Trainer")
    assert found["packed"] == "refused"
    assert report.answers == IN_BATCHES


def test_answers_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("RwkvForCausalLM").answers == ALONE
    monkeypatch.setattr(generation, "is_read_alone", lambda *_, **__: True)
    report = examine("RwkvForCausalLM")
    assert report.answers == OTHERS
    assert answers_cell(report) == "**wrong**"
    assert faults([report]) == ["RwkvForCausalLM: answers of a batch are others than alone"]

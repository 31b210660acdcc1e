"""The benchmark of comparisons, with trees whose comparisons take no time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import comparison
import pytest

COMPARES = """
import json, sys, time
from pathlib import Path

folder, seed = Path(sys.argv[sys.argv.index("--output_dir") + 1]), sys.argv[sys.argv.index("--seeds") + 1]
if seed == "2":
    sys.exit("the comparison's last words")
cells = []
for power in (0, 4):
    cell = folder / f"p{power}_seed{seed}"
    cell.mkdir()
    (cell / "log.txt").write_text("")
    time.sleep(SECONDS)
    (cell / "all_results.json").write_text("{}")
    metrics = {"recall": 0.5, "loss": LOSS + power, "samples_per_second": SECONDS}
    cells.append({"folder": cell.name, "metrics": metrics})
(folder / "summary.json").write_text(json.dumps({"cells": cells}))
"""


def tree(folder: Path, *, seconds: float, loss: float) -> Path:
    (folder / "recipes").mkdir(parents=True)
    script = COMPARES.replace("SECONDS", str(seconds)).replace("LOSS", str(loss))
    (folder / "recipes" / "compare_powers.py").write_text(script, encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_rounds_are_run_in_turns_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "ROOT", tree(tmp_path / "now", seconds=0.2, loss=1.0))
    before = tree(tmp_path / "before", seconds=0.8, loss=1.25)
    output = tmp_path / "comparison.json"
    flags = ["--before", str(before), "--output", str(output), "--threads", "1"]
    comparison.main([*flags, "--repeats", "1"])
    with pytest.raises(RuntimeError, match="the comparison's last words"):
        comparison.main([*flags, "--repeats", "3"])
    capsys.readouterr()
    comparison.main([*flags, "--repeats", "2"])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["settings"]["before"] == comparison.measured.commit_of(before)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    first, second = found["rows"]
    assert (first["round"], second["round"], first["cells"]) == (0, 1, 2)
    assert [*first["metrics"]["now"]] == ["p0_seed0", "p4_seed0"]
    assert [*second["metrics"]["before"]] == ["p0_seed1", "p4_seed1"]
    for row in found["rows"]:
        assert row["difference"] == 0.25
        assert 1 < row["ratio"] == row["per hour"] / row["before"]
        assert 0.3 < 3600 * 2 / row["per hour"] < row["seconds"]  # The first 0.1 s may pass unseen.
        assert row["seconds before"] > 1.6
    assert "times as many, from" in capsys.readouterr().out

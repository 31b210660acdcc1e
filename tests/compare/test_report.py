"""What a comparison over p leaves: summaries and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.compare_powers import main

from .stub_recipe import starts, summary_of


def test_a_comparison_from_beginning_to_end(flags: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*flags, "--reach", "0.55"]) == 0
    output_dir = tmp_path / "out"
    assert starts(output_dir) == {f"p{power}_seed{seed}": 1 for power in ("0", "1", "inf") for seed in (0, 1, 2)}
    summary = summary_of(output_dir)
    assert summary["powers"] == [0, 1, "inf"]
    assert summary["seeds"] == [0, 1, 2]
    assert {cell["state"] for cell in summary["cells"]} == {"finished"}
    assert [each["title"] for each in summary["quantities"]] == [
        "recall", "steps until recall ≥ 0.55", "loss", "loss, first quarter", "loss, last quarter", "generated tokens",
    ]  # fmt: skip
    usual, one, last = summary["quantities"][0]["by_power"]
    assert usual["values"] == pytest.approx({"0": 0.5, "1": 0.52, "2": 0.49})
    assert "against_0" not in usual
    assert one["against_0"]["difference"] == pytest.approx(0.101)
    assert one["against_0"]["verdict"] == "better"
    assert last["power"] == "inf"
    assert last["against_0"]["holm"] <= 1
    assert summary["environment"]["versions"].keys() >= {"torch", "transformers"}
    assert summary["quantities"][1]["by_power"][0]["not_reached"] == [0, 1, 2]
    report = (output_dir / "summary.md").read_text("utf-8")
    words = one["against_0"]["words"]
    assert report.index(words) < report.index("| p ") < report.index("![") < report.index("## How it was made")
    for name in ("metric_by_power.png", "loss_by_position.png", "curves.png"):
        assert f"]({name})" in report
        assert (output_dir / name).read_bytes().startswith(b"\x89PNG")
    assert "All 9 cells are finished." in report
    assert "| > 30 " in report
    assert words in capfd.readouterr().out


VARY = ("--vary", "gain=0.1,0.0", "--vary", "offset=0,0.2", "--powers", "0", "1")


def test_combinations_have_their_own_comparison_and_one_above_them(
    flags: list[str], tmp_path: Path, capfd: Any
) -> None:
    """Which is the one that the same flags make without --vary."""
    output_dir, alone = tmp_path / "out", tmp_path / "alone"
    assert main([*flags, *VARY, "--reach", "0.55"]) == 0
    printed = capfd.readouterr().out
    assert {path.name for path in output_dir.iterdir()} == {
        *("0.1_0", "0.1_0.2", "0.0_0", "0.0_0.2"),
        *("comparison.json", "summary.json", "summary.md", "metric_by_power.png"),
    }
    plain = ["--powers", "0", "1", "--gain=0.1", "--offset=0.2", "--reach", "0.55"]
    assert main([*flags, *plain, "--output_dir", str(alone)]) == 0
    assert {path.name for path in alone.iterdir()} == {path.name for path in (output_dir / "0.1_0.2").iterdir()}
    of_combination, of_alone = summary_of(output_dir / "0.1_0.2"), summary_of(alone)
    for each in (of_combination, of_alone):
        del each["title"], each["commands"], each["environment"]
    assert of_combination == of_alone
    overview = summary_of(output_dir)
    assert [each["values"] for each in overview["combinations"]] == [
        {"gain": gain, "offset": offset} for gain in ("0.1", "0.0") for offset in ("0", "0.2")
    ]
    assert [each["folder"] for each in overview["combinations"]] == ["0.1_0", "0.1_0.2", "0.0_0", "0.0_0.2"]
    assert overview["combinations"][1]["quantities"] == of_alone["quantities"][:2]
    assert overview["settings"]["vary"] == ["gain", "offset"]
    report = (output_dir / "summary.md").read_text("utf-8")
    assert (
        "- [gain 0.1, offset 0.2](0.1_0.2/summary.md), compared with p = 0: **recall** better at p = 1; **" in report
    )
    rows = [line for line in report.splitlines() if line.startswith("| 0.")]
    assert [row.split("|")[1:4] for row in rows[2:4]] == [
        [" 0.1  ", " 0.2    ", " recall ↑                    "],
        [" 0.1  ", " 0.2    ", " steps until recall ≥ 0.55 ↓ "],
    ]
    assert rows[2].count("**better**") == 1
    assert len(rows) == 8
    assert all(line in printed for line in rows)
    assert "All 24 cells are finished." in report
    assert "--gain=0.1 --offset=0 --temporal_power=0 --seed=0 --output_dir=" in report
    assert "not for the number of rows; intervals" in report
    assert "not for the number of columns; intervals" in (output_dir / "0.1_0.2" / "summary.md").read_text("utf-8")
    assert (output_dir / "metric_by_power.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_told_by_combination(flags: list[str], tmp_path: Path) -> None:
    grid = [*flags, "--powers", "0", "1", "--seeds", "0", "1"]
    assert main([*grid, "--vary", "gain=0.1,-0.1"]) == 0
    assert main([*grid, "--vary", "gain=0.1,-0.1,0.2,nonsense", "--seeds", "0", "--max_parallel", "0"]) == 1
    report = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "- gain 0.2: no cell is finished." in report
    assert "- gain 0.2: Not finished, 2 of 2 cells: p = 0 with seed 0; p = 1 with seed 0." in report
    assert "gain 0.1: Not" not in report
    assert main([*grid, "--vary", "gain=0.1,nonsense,0.2"]) == 1
    overview = summary_of(tmp_path / "out")["combinations"]
    assert [(each["folder"], each["cells"], each["finished"]) for each in overview] == [
        ("0.1", 4, 4), ("nonsense", 4, 0), ("0.2", 4, 4),
    ]  # fmt: skip
    assert overview[1]["failed"] == {f"p{power}_seed{seed}": 2 for power in (0, 1) for seed in (0, 1)}
    assert starts(tmp_path / "out" / "0.1") == {f"p{power}_seed{seed}": 1 for power in (0, 1) for seed in (0, 1)}
    report = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "p = 1 with seed 1 (failed with exit status 2)" in report
    assert not (tmp_path / "out" / "nonsense" / "summary.md").exists()

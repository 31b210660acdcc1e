"""What a comparison over p leaves: summaries and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare.main import main
from hf_temporal.compare.report import parts_of
from hf_temporal.compare.summary import read_summary

from .stub_recipe import starts, summary_of

OTHERS = ("gradients_by_lag", "memory_lengths", "memory_tasks")


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
    of_combination = {path.name for path in (output_dir / "0.1_0.2").iterdir()}
    assert {path.name for path in alone.iterdir()} - of_combination == {"summary.json"}
    overview, of_alone = summary_of(output_dir), summary_of(alone)
    assert [each["values"] for each in overview["combinations"]] == [
        {"gain": gain, "offset": offset} for gain in ("0.1", "0.0") for offset in ("0", "0.2")
    ]
    assert [each["folder"] for each in overview["combinations"]] == ["0.1_0", "0.1_0.2", "0.0_0", "0.0_0.2"]
    assert all(overview["combinations"][1][name] == of_alone[name] for name in ("quantities", "cells"))
    reports = [(folder / "summary.md").read_text("utf-8") for folder in (output_dir / "0.1_0.2", alone)]
    found, expected = (report.split("\n\n", 1)[1].split("## How it")[0] for report in reports)
    assert found == expected
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
    assert "not for the number of columns or rows; intervals" in report
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
    states = {each["folder"]: [cell["state"] for cell in each["cells"]] for each in overview}
    assert states == {"0.1": ["finished"] * 4, "nonsense": ["failed"] * 4, "0.2": ["finished"] * 4}
    assert {cell["folder"]: cell["exit_status"] for cell in overview[1]["cells"]} == {
        f"p{power}_seed{seed}": 2 for power in (0, 1) for seed in (0, 1)
    }
    assert starts(tmp_path / "out" / "0.1") == {f"p{power}_seed{seed}": 1 for power in (0, 1) for seed in (0, 1)}
    report = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "p = 1 with seed 1 (failed with exit status 2)" in report
    assert not (tmp_path / "out" / "nonsense" / "summary.md").exists()


def report_and_pictures(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.name == "summary.md" or path.suffix == ".png"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("more", [(), VARY], ids=["alone", "combinations"])
def test_report_and_pictures_are_made_again_from_the_summary(
    flags: list[str], tmp_path: Path, more: tuple[str, ...], capfd: Any
) -> None:
    assert main([*flags, *more, "--reach", "0.55"]) == 0
    printed = capfd.readouterr().out
    made = report_and_pictures(tmp_path / "out")
    assert len(made) == (4 if not more else 2 + 4 * 4)
    summary = (tmp_path / "out" / "summary.json").rename(tmp_path / "kept.json")
    again = tmp_path / "again"
    assert main(["--redraw", str(summary), "--output_dir", str(again)]) == 0
    assert report_and_pictures(again) == made
    findings, told = capfd.readouterr().out.split(f"\n\n{again / 'summary.md'}\n")
    assert findings in printed
    assert told == f"Not drawn, as {summary} lacks the data: memory.png\n"


def test_the_summary_of_the_shipped_comparisons_is_read(tmp_path: Path) -> None:
    """All but the results of other kinds, which are named; the report over combinations of one."""
    results = Path(__file__).parents[2] / "recipes" / "results"
    found = sorted(results.glob("*.json"))
    others = {path for path in found if path.stem.startswith(("benchmarks_", "suggestions")) or path.stem in OTHERS}
    assert len(found) - len(others) >= 29
    for path in sorted({*found} - others):
        summary = read_summary(path)
        for part, record in zip(parts_of(summary), summary.get("combinations", [summary]), strict=True):
            for (quantity, differences), kept in zip(part.found, record["quantities"], strict=True):
                verdicts = [row["against_0"]["verdict"] for row in kept["by_power"] if "against_0" in row]
                assert verdicts == [each.verdict for each in differences.values()], quantity.title
    assert main(["--redraw", str(results / "docstrings_schedule.json"), "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "4" / "metric_by_power.png").is_file()


def test_what_is_no_summary_is_not_redrawn(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text, message in (("{}", "is no summary of a comparison"), ('{"version": 2}', "accepted: version 3")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            main(["--redraw", str(path), "--output_dir", str(tmp_path)])

"""The table over tasks, models and ways of weighting, from summaries made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare.merged import Row, merged, rows_of
from hf_temporal.compare.summary import read_summary
from recipes.laboratory import memory_table

BUDGET = 400.0
T_2 = 4.302653  # the quantile t_{0.975} with two degrees of freedom
FALLING = ("--temporal_power_schedule", "linear", "--temporal_power_start", "10")
MIXED = ("--temporal_mixture=0.9",)
RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "results"

Steps = Mapping[int, float | None]  # by seed; None: the run does not get there
ByPower = Mapping[float, Steps]


def by_seed(*steps: float | None) -> Steps:
    return dict(enumerate(steps))


def quantity(title: str, values: Mapping[float, Mapping[int, float]], missed: ByPower, scale: str) -> dict[str, Any]:
    by_power = [
        {
            "power": power,
            "values": {str(seed): value for seed, value in each.items()},
            "not_reached": [seed for seed, value in missed[power].items() if value is None and scale == "ratio"],
        }
        for power, each in values.items()
    ]
    direction = 1 if title == "recall" else -1
    return {"title": title, "direction": direction, "scale": scale, "by_power": by_power}


def write_summary(
    path: Path,
    models: Mapping[str, ByPower],
    *,
    overrides: Sequence[str] = (),
    metric: str = "recall",
    reach: float | None = 0.98,
    form: str = "mqar",
) -> Path:
    """A summary of steps; recall is 1 in a run that gets there, otherwise 0.1 + seed / 100 + p / 50.

    The loss is 1 + seed / 10 − p / 10, with seed 2 p / 1,000 less.
    """
    combinations = []
    for model, powers in models.items():
        steps = {p: {seed: value or BUDGET for seed, value in each.items()} for p, each in powers.items()}
        recall = {
            p: {seed: 1.0 if value else 0.1 + seed / 100 + p / 50 for seed, value in each.items()}
            for p, each in powers.items()
        }
        loss = {
            p: {seed: 1 + seed / 10 - p / 10 - (seed == 2) * p / 1000 for seed in each} for p, each in powers.items()
        }
        found = [
            quantity("recall", recall, powers, "difference"),
            quantity("steps until recall ≥ 0.98", steps, powers, "ratio"),
            quantity("loss, last token", loss, powers, "difference"),
            quantity("loss", loss, powers, "difference"),
        ]
        combinations.append({"values": {"model_type": model}, "quantities": found, "cells": []})
    content = {
        "version": 3,
        "title": path.stem,
        "metric": metric,
        "reach": reach,
        "combinations": combinations,
        "commands": [f"compare {path.stem}", ""],
        "settings": {
            "recipe": "finetune_causal_lm.py",
            "config": {"copying_form": form, "model_type": "llama", "output_dir": path.stem, "max_steps": 400},
            "accelerate_config": None,
            "overrides": ["--report_to", "none", *overrides],
            "vary": ["model_type"],
        },
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def rows(*paths: Path) -> dict[str, Row]:
    """The rows of the first task by model."""
    content = merged(paths)
    return {row.model: row for row in rows_of(content, content["tasks"][0])}


def p_value(t: float) -> float:
    """Two-sided, with two degrees of freedom: 1 − |t| / √(t² + 2)."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


# Ratios of 2^−2, 2^−3, 2^−2: t = −7, P-value 0.0198. Ratios of 2^−1, 2^−2, 2^−1: t = −4, P-value 0.0572.
USUAL, FASTER, FAST, SLOW = (
    by_seed(*each) for each in ((200, 160, 120), (50, 20, 30), (100, 40, 60), (400, 160, 240))
)


def test_ratio_interval_and_correction_by_hand(tmp_path: Path) -> None:
    row = rows(write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 1: FAST, 4: FASTER}}))["llama"]
    one, four = row.outcomes[1].found, row.outcomes[2].found
    assert four.ratio == pytest.approx(2 ** (-7 / 3))
    assert four.interval == pytest.approx((2 ** ((-7 - T_2) / 3), 2 ** ((-7 + T_2) / 3)))
    assert one.ratio == pytest.approx(2 ** (-4 / 3))
    assert (one.p_value, four.p_value) == pytest.approx((p_value(4), p_value(7)))
    assert (one.holm, four.holm) == pytest.approx((p_value(4), 2 * p_value(7)))
    assert (one.verdict, four.verdict) == ("not told apart", "better")


def test_holm_counts_the_columns_of_all_summaries(tmp_path: Path) -> None:
    """0.0198 is told apart beside one column more, and not beside two."""
    powers = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 1: FAST, 4: FASTER}})
    falling = write_summary(tmp_path / "falling.json", {"llama": {0: SLOW}}, overrides=FALLING)
    mixed = write_summary(tmp_path / "mixed.json", {"llama": {10: FASTER}}, overrides=MIXED)
    content = merged([mixed, falling, powers])
    assert content["columns"] == ["p = 0", "p = 1", "p = 4", "p = 10 → 0", "λ = 0.9, p = 10"]
    (row,) = rows_of(content, content["tasks"][0])
    assert row.outcomes[2].found.holm == pytest.approx(4 * p_value(7))
    assert row.outcomes[3].found.ratio == pytest.approx(2 ** (2 / 3))
    assert row.outcomes[4].found.ratio == pytest.approx(2 ** (-7 / 3))
    assert {outcome.found.verdict for outcome in row.outcomes.values()} == {"not told apart"}
    assert [task["title"] for task in content["tasks"]] == ["mqar"]


def test_the_p_0_of_a_mixture_is_left_out(tmp_path: Path) -> None:
    powers = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 4: FASTER}})
    mixed = write_summary(tmp_path / "mixed.json", {"llama": {0: SLOW, 10: FAST}}, overrides=MIXED)
    content = merged([powers, mixed])
    assert content["columns"] == ["p = 0", "p = 4", "λ = 0.9, p = 10"]
    (row,) = rows_of(content, content["tasks"][0])
    assert row.steps.values[0.0] == USUAL


def test_only_common_seeds_are_paired_and_their_number_is_shown(tmp_path: Path) -> None:
    powers = write_summary(tmp_path / "mqar.json", {"llama": {0: by_seed(200, 160, 120, 80, 40), 4: {7: 40, 8: 80}}})
    falling = write_summary(tmp_path / "falling.json", {"llama": {0: {1: 80, 3: 20, 9: 400}}}, overrides=FALLING)
    mixed = write_summary(tmp_path / "mixed.json", {"llama": {10: {4: 20}}}, overrides=MIXED)
    content = merged([powers, falling, mixed])
    (row,) = rows_of(content, content["tasks"][0])
    four, down, mixture = (row.outcomes[column].found for column in (1, 2, 3))
    assert (four.seeds, down.seeds, mixture.seeds) == ([], [1, 3], [4])
    assert down.ratio == pytest.approx(2**-1.5)
    assert down.holm == down.p_value
    assert mixture.verdict == four.verdict == "not compared"
    line = cells_of(memory_table.tables(content), "llama")
    assert line[1:4] == ["1", "104", "–"]  # the fifth root of 200 · 160 · 120 · 80 · 40 is 104
    assert line[4].startswith("0.35 [")
    assert line[4].endswith("(2 seeds)")
    assert line[5] == "0.50; loss −1 (1 seed)"
    assert cells_of(memory_table.tables(content), "told apart")[3:] == [
        "0 better, 0 worse of 0", "0 better, 0 worse of 1", "0 better, 0 worse of 0",
    ]  # fmt: skip


def cells_of(text: str, first: str) -> list[str]:
    """The cells of the first line of a table that begins with this cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return next(line for line in lines if line[0] == first)


def test_models_of_several_summaries_come_together_and_may_lack_columns(tmp_path: Path) -> None:
    llama = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 4: FASTER}})
    mamba = write_summary(tmp_path / "more.json", {"mamba2": {0: USUAL}, "rwkv": {}})
    falling = write_summary(tmp_path / "falling.json", {"mamba2": {0: FAST}, "bamba": {0: FAST}}, overrides=FALLING)
    content = merged([llama, mamba, falling])
    text = memory_table.tables(content)
    assert content["columns"] == ["p = 0", "p = 4", "p = 10 → 0"]
    assert [model["model"] for model in content["tasks"][0]["models"]] == ["llama", "mamba2", "bamba"]
    assert cells_of(text, "llama")[3].startswith("0.20 [")
    assert cells_of(text, "llama")[4] == "–"
    assert cells_of(text, "mamba2")[1:4] == ["1 (3 seeds)", "157 (3 seeds)", "–"]
    assert cells_of(text, "mamba2")[4].startswith("0.40 [")
    assert cells_of(text, "bamba")[1:] == ["–"] * 4
    assert cells_of(text, "told apart")[3:] == ["1 better, 0 worse of 1", "0 better, 0 worse of 1"]


def test_where_too_few_runs_get_there_the_metric_decides(tmp_path: Path) -> None:
    """One censored run of three counts with the last step; with two, here or at p = 0, recall decides."""
    mostly, rarely = by_seed(100, 40, None), by_seed(100, None, None)
    models: dict[str, ByPower] = {
        "a": {0: USUAL, 1: mostly, 4: rarely},
        "b": {0: rarely, 1: USUAL},
        "c": {0: rarely, 4: by_seed(*[None] * 3)},
    }
    content = merged([write_summary(tmp_path / "mqar.json", models)])
    a, b, c = rows_of(content, content["tasks"][0])
    assert a.outcomes[1].quantity.title == "steps until recall ≥ 0.98"
    assert a.outcomes[1].found.ratio == pytest.approx((100 / 200 * 40 / 160 * BUDGET / 120) ** (1 / 3))
    assert a.outcomes[2].quantity.title == b.outcomes[1].quantity.title == "recall"
    assert a.outcomes[2].found.difference == pytest.approx((0 + (0.11 + 0.08 - 1) + (0.12 + 0.08 - 1)) / 3)
    assert b.outcomes[1].found.difference == pytest.approx((0 + (1 - 0.11) + (1 - 0.12)) / 3)
    assert c.outcomes[2].found.difference == pytest.approx((0.1 + 0.08 - 1 + 0.08 + 0.08) / 3)
    text = memory_table.tables(content)
    assert ", 1 of 3 > 400; loss −" in cells_of(text, "a")[3]
    assert cells_of(text, "a")[4].startswith("recall −0.537 [")
    assert "], 2 of 3 > 400; loss −" in cells_of(text, "a")[4]
    assert cells_of(text, "b")[2] == "252, 2 of 3 > 400 (3 seeds)"
    counts = cells_of(text.split("told apart")[1], "p = 1")
    assert counts[5:] == ["2 of 2", "1", "0", "0"]  # The ratio is 0.75 for a; b has none.


def test_half_of_the_runs_are_enough(tmp_path: Path) -> None:
    half = by_seed(100, 100, None, None)
    row = rows(write_summary(tmp_path / "mqar.json", {"llama": {0: half, 4: half}}))["llama"]
    assert row.outcomes[1].quantity.is_ratio
    assert row.outcomes[1].found.ratio == 1


def test_counts_name_the_models_and_what_three_have_in_common(tmp_path: Path) -> None:
    gains: ByPower = {0: USUAL, 4: FASTER}
    models: dict[str, ByPower] = {"a": gains, "b": gains, "c": gains, "d": {0: FASTER, 4: USUAL}, "e": {0: USUAL}}
    text = memory_table.tables(merged([write_summary(tmp_path / "mqar.json", models)]))
    assert cells_of(text, "told apart")[3] == "3 better, 1 worse of 4"
    counts = cells_of(text.split("told apart")[1], "p = 4")
    assert counts == ["p = 4", "3: a, b, c", "1: d", "4: a, b, c, d", "0", "4 of 4", "3", "0", "1"]
    assert cells_of(text.split("told apart")[1], "any of them")[1:3] == ["3: a, b, c", "1: d"]
    assert "Told apart in 3 models or more: better at p = 4." in text
    assert "**better**; loss −0.401 **better** (3 seeds)" in cells_of(text, "a")[3]
    assert "**worse**; loss −0.401 **better** (3 seeds)" in cells_of(text, "d")[3]


def test_tasks_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    mqar = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 4: FASTER}})
    other = write_summary(tmp_path / "digits.json", {"llama": {0: FASTER, 4: USUAL}}, form="digits")
    content = merged([mqar, other])
    assert [task["title"] for task in content["tasks"]] == ["mqar", "digits"]
    ratios = [rows_of(content, task)[0].outcomes[1].found.ratio for task in content["tasks"]]
    assert ratios == pytest.approx([2 ** (-7 / 3), 2 ** (7 / 3)])


def test_file_and_picture_hold_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    powers = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 4: FASTER}, "rwkv": {0: by_seed(None, None)}})
    other = write_summary(tmp_path / "digits.json", {"rwkv": {0: USUAL, 4: by_seed(None, None, 40)}}, form="digits")
    table, picture = tmp_path / "table.json", tmp_path / "table.png"
    memory_table.main([str(powers), str(other), "--output", str(table), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(table.read_text("utf-8"))
    assert content["commands"] == ["compare mqar", "compare digits"]
    llama = content["tasks"][0]["models"][0]
    assert llama["quantities"][1]["by_column"]["p = 4"] == {"values": {"0": 50, "1": 20, "2": 30}, "not_reached": []}
    assert llama["compared"]["p = 4"]["decided_by"] == "steps until recall ≥ 0.98"
    assert llama["compared"]["p = 4"]["against_0"]["ratio"] == pytest.approx(2 ** (-7 / 3))
    assert content["tasks"][1]["models"][0]["quantities"][1]["by_column"]["p = 4"]["not_reached"] == [0, 1]
    memory_table.main(["--redraw", str(table), "--picture", str(tmp_path / "again.png")])
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_a_schedule_that_stays_where_it_is_is_a_constant_p(tmp_path: Path) -> None:
    flags = ("--temporal_power_schedule=linear", "--temporal_power_start=0")
    path = write_summary(tmp_path / "mqar.json", {"llama": {0: USUAL, 10: FAST}}, overrides=flags)
    assert merged([path])["columns"] == ["p = 0", "p = 0 → 10"]


@pytest.mark.parametrize("name", ["copying_llama_200", "copying_memory_powers"])
def test_what_the_repository_has_agrees_with_its_own_summary(name: str) -> None:
    """A ratio of steps in the table is that of the comparison; only the correction differs."""
    path = RESULTS / f"{name}.json"
    summary = read_summary(path)
    content = merged([path])
    ratios = {
        row.model: [each.found.ratio for each in row.outcomes.values() if each.found.ratio]
        for row in rows_of(content, content["tasks"][0])
    }
    own = [
        record["against_0"]["ratio"]
        for part in summary.get("combinations", [summary])
        for record in part["quantities"][1]["by_power"]
        if "against_0" in record
    ]
    found = [ratio for each in ratios.values() for ratio in each]
    assert found
    assert all(any(ratio == pytest.approx(each) for each in own) for ratio in found)


def test_an_older_summary_has_its_steps_compared_by_ratio_too() -> None:
    outcomes = rows(RESULTS / "copying_llama_100.json")["llama"].outcomes
    assert all(outcome.quantity.is_ratio and outcome.found.ratio for outcome in outcomes.values())
    assert outcomes[5].found.ratio == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "accuracy"}, r"b\.json' has metric='accuracy'; accepted: 'recall', as '.*a\.json' has it"),
        ({"reach": 0.9}, r"b\.json' has reach=0\.9; accepted: 0\.98, as '.*a\.json' has it"),
        ({"reach": None}, r"b\.json' has reach=None; accepted: .* with --reach"),
    ],
)
def test_another_metric_or_goal_is_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    first = write_summary(tmp_path / "a.json", {"llama": {0: USUAL}})
    second = write_summary(tmp_path / "b.json", {"mamba2": {0: USUAL}}, **given)
    with pytest.raises(ValueError, match=words):
        merged([first, second])


def test_runs_of_other_settings_are_not_paired(tmp_path: Path) -> None:
    powers = write_summary(tmp_path / "a.json", {"llama": {0: USUAL, 4: FAST}})
    falling = write_summary(
        tmp_path / "b.json", {"llama": {0: FAST}}, overrides=(*FALLING, "--max_steps=800", "--blank_length", "50")
    )
    words = r"b\.json' has no p = 0 to be compared with; .* differs in blank_length, max_steps"
    with pytest.raises(ValueError, match=words):
        merged([powers, falling])
    same = write_summary(tmp_path / "c.json", {"llama": {0: FAST}}, overrides=(*FALLING, "--max_steps=400"))
    assert len(merged([powers, same])["tasks"]) == 1


def test_a_run_with_two_outcomes_is_refused(tmp_path: Path) -> None:
    first = write_summary(tmp_path / "a.json", {"llama": {0: USUAL, 4: FAST}})
    assert len(merged([first, write_summary(tmp_path / "b.json", {"llama": {0: USUAL}})])["tasks"][0]["models"]) == 1
    second = write_summary(tmp_path / "b.json", {"llama": {0: by_seed(200, 180)}})
    words = r"b\.json' has steps until recall ≥ 0\.98 = 180 for llama at p = 0 with seed 1, and another file 160"
    with pytest.raises(ValueError, match=words):
        merged([first, second])


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text('{"tasks": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"none\.json' holds no merged comparisons .* accepted"):
        memory_table.main(["--redraw", str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match=r"none\.json' is no summary"):
        memory_table.main([str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        memory_table.main([])

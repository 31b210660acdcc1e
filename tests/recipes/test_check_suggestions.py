"""What `suggest_power` says, held against outcomes that are made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.compare.report import parts_of
from recipes.laboratory import check_suggestions
from recipes.laboratory.check_suggestions import DECIDES, main, outcomes_of, rules

CONFIG = {
    "task": "copying",
    "copying_form": "digits",
    "copy_length": 2,
    "blank_length": 5,
    "model_type": "memory_tcn",
    "config_overrides": "hidden_size=4",
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "steps",
    "max_steps": 10,
    "use_cpu": True,
}
NOISE = (1.0, 1.01, 0.99, 1.02, 0.98)
# The last two p are warned of: there the first quarter of the targets counts less than a tenth of the usual.
STEPS = {0.0: 100, 0.5: 200, 1.0: 100, 4.0: 200, 10.0: 50}


ROOT = Path(__file__).parents[2]


def quantity(
    title: str, means: Mapping[float, float], *, direction: int = -1, scale: str = "difference", missed: int = 0
) -> dict[str, Any]:
    """A quantity of five seeds whose noise differs between the p; without a mean, p is like p = 0 on average."""
    by_power = []
    for place, (power, mean) in enumerate(means.items()):
        noise = NOISE[place % 5 :] + NOISE[: place % 5]
        values = {str(seed): mean * factor for seed, factor in enumerate(noise)}
        by_power.append({"power": power, "values": values, "not_reached": [*range(missed)]})
    return {"title": title, "direction": direction, "scale": scale, "by_power": by_power}


def summary(quantities: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "recipe": "finetune_causal_lm.py",
        "config": CONFIG,
        "accelerate_config": None,
        "overrides": [],
    }
    return {
        "version": 3,
        "title": "made",
        "metric": "recall",
        "reach": 0.98,
        "powers": [row["power"] for row in quantities[0]["by_power"]],
        "seeds": [0, 1, 2, 3, 4],
        "quantities": quantities,
        "cells": [],
        "commands": ["", ""],
        "settings": settings | more.pop("settings", {}),
        "environment": {},
        **more,
    }


def measured(steps: Mapping[float, float] = STEPS, *, missed: int = 0) -> list[dict[str, Any]]:
    return [
        quantity("recall", dict.fromkeys(steps, 0.9), direction=1),
        quantity("steps until recall ≥ 0.98", steps, missed=missed),
        quantity("loss", {power: 1 + power for power in steps}),
        quantity("loss, first quarter", {power: 1 + power for power in steps}),
    ]


def checked(tmp_path: Path, *summaries: dict[str, Any]) -> dict[str, Any]:
    paths = []
    for number, each in enumerate(summaries):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(each), encoding="utf-8")
    main(["--summaries", *map(str, paths), "--output", str(tmp_path / "out" / "suggestions.json")])
    found: dict[str, Any] = json.loads((tmp_path / "out" / "suggestions.json").read_text("utf-8"))
    return found


def test_a_false_alarm_and_a_miss_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(tmp_path, summary(measured()))
    (comparison,) = found["comparisons"]
    assert {
        row["power"]: ("beginning" in row["warnings"], row["verdicts"][DECIDES]) for row in comparison["powers"]
    } == {
        0.5: (False, "worse"),  # a miss
        1.0: (False, "not told apart"),
        4.0: (True, "worse"),
        10.0: (True, "better"),  # a false alarm
    }
    assert "last token" in comparison["powers"][-1]["warnings"]  # but no digit ends a text
    assert not comparison["ends_text"]
    assert comparison["from_scratch"]
    (group,) = found["counts"].values()
    warnings = {(row["warning"], row["judged by"]): row for row in group["warnings"]}
    for name in ("any", "beginning"):
        row = warnings[name, DECIDES]
        assert (row["hits"], row["false alarms"], row["misses"], row["never"]) == ([2, 4], 1, 1, [2, 4])
    row = warnings["beginning", "loss, first quarter"]  # worse at every p
    assert (row["hits"], row["false alarms"], row["misses"], row["never"]) == ([2, 4], 0, 2, [0, 4])
    row = warnings["last token", DECIDES]
    assert (row["hits"], row["false alarms"], row["misses"]) == ([2, 4], 0, 2)
    assert warnings["last token", "empty texts"]["hits"] == [0, 0]  # not measured
    counts = {row.pop("p is better than 0"): [*row.values()] for row in group["rules"]}
    assert counts["never"] == [[3, 4], [1, 1], [0, 1]]
    assert counts["always"] == [[1, 4], [0, 1], [1, 1]]
    assert counts["no warning"] == [[1, 4], [0, 1], [1, 1]]
    assert group["outcomes"][-1] == {"p": 10.0, "better": 1, "not told apart": 0, "worse": 0}
    printed = capsys.readouterr().out
    assert "# 1 new comparisons" in printed
    assert "2 of 4" in printed


def test_each_combination_is_looked_at_and_the_same_runs_count_once(tmp_path: Path) -> None:
    whole = summary(measured())
    quantities, cells = whole.pop("quantities"), whole.pop("cells")
    part = {"cells": cells, "command": "", "quantities": quantities}
    models = ("memory_tcn", "memory_attention", "memory_linear_rnn", "llama")
    whole["combinations"] = [{**part, "folder": name, "values": {"model_type": name}} for name in models]
    whole["combinations"][1]["quantities"] = measured({0.0: 100, 4.0: 30})
    whole["combinations"][1]["quantities"][2] = quantity("loss", {0.0: 3.0, 4.0: 3.0})
    whole["combinations"][2]["quantities"] = []  # no run is finished
    whole["combinations"][3]["values"]["control"] = "late"
    found = checked(tmp_path, whole)
    assert [each["values"]["model_type"] for each in found["comparisons"]] == ["memory_tcn", "memory_attention"]
    assert found["comparisons"][0]["loss"] != found["comparisons"][1]["loss"]
    assert {name: reason.partition(";")[0] for name, reason in found["left_out"].items()} == {
        "made, model_type memory_linear_rnn": ("powers=[0.0, 0.5, 1.0, 4.0, 10.0]: no p > 0 is compared with p = 0"),
        "made, model_type llama, control late": "control='late' in the place of t^p",
    }
    again = checked(tmp_path, summary(measured(), title="first"), summary(measured(), title="second"))
    assert [each["summary"] for each in again["comparisons"]] == ["first"]
    assert again["left_out"]["second, p = 10"] == "the runs of first"


def test_rules_are_tested_on_comparisons_that_they_were_not_looked_for_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_suggestions, "KNOWN", {"first"})
    other = measured({0.0: 100, 1.0: 40})
    other[2] = quantity("loss", {0.0: 2.0, 1.0: 4.0})
    found = checked(tmp_path, summary(measured(), title="first"), summary(other, title="second"))
    assert [*found["counts"]] == ["known", "new"]
    (outcome,) = found["counts"]["new"]["outcomes"]
    assert outcome == {"p": 1.0, "better": 1, "not told apart": 0, "worse": 0}


def test_a_threshold_is_chosen_on_the_others() -> None:
    known = [
        {"late": late, "powers": [{"verdicts": {DECIDES: verdict}}]}
        for late, verdict in ((0.1, "worse"), (0.2, "not told apart"), (0.3, "better"), (0.4, "better"))
    ]
    rule = rules(known)["late share of the loss, best threshold"]
    assert [rule({"late": late}, {}) for late in (0.25, 0.35)] == [False, True]  # 0.3, of all
    assert [rule(each, {}) for each in known] == [False, False, False, True]  # 0.4 without the third


def test_what_decides() -> None:
    """Steps if half of the runs got there, else the metric; of summaries both ROUGE and the loss."""

    def deciding(made: dict[str, Any]) -> tuple[list[str], dict[float, str]]:
        (part,) = parts_of(made)
        outcomes = outcomes_of(part, made["metric"])
        (titles,) = {tuple(each["decided_by"]) for each in outcomes.values()}
        return [*titles], {power: each["verdicts"][DECIDES] for power, each in outcomes.items()}

    twice = {0.0: 100.0, 1.0: 200.0}
    assert deciding(summary(measured(twice, missed=2))) == (["steps until recall ≥ 0.98"], {1.0: "worse"})
    assert deciding(summary(measured(twice, missed=3))) == (["recall"], {1.0: "not told apart"})
    rouge = quantity("rouge1", twice, direction=1)
    for loss, verdict in ((twice, "worse"), ({0.0: 1.0, 1.0: 1.0}, "better")):
        made = summary([rouge, quantity("loss", loss)], metric="rouge1", reach=None)
        assert deciding(made) == (["rouge1", "loss"], {1.0: verdict})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"quantities": measured({1.0: 100, 4.0: 50})},
            r"powers=\[1.0, 4.0\]: no p > 0 is compared with p = 0; accep",
        ),
        ({"quantities": measured({0.0: 100})}, r"powers=\[0.0\]: no p > 0 is compared with p = 0; accepted: finished"),
        (
            {"settings": {"recipe": "train_functional.py"}},
            "recipe='train_functional.py', .*; accepted: finetune_causal",
        ),
        ({"settings": {"config": CONFIG | {"temporal_power_schedule": "linear"}}}, "accepted: without a schedule"),
        ({"settings": {"overrides": ["--temporal_power_schedule", "linear"]}}, "accepted: without a schedule"),
        ({"metric": "grad_norm"}, "metric='grad_norm', of which neither more nor less is better"),
        ({"version": 2}, "accepted: version 3"),
    ],
)
def test_what_cannot_be_checked_is_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, summary(more.pop("quantities", measured()), **more))


def test_the_page_has_the_counts_of_the_shipped_file() -> None:
    """The cells of both tables, row by row, and the number of comparisons."""
    found = json.loads((ROOT / "recipes" / "results" / "suggestions.json").read_text("utf-8"))
    page = (ROOT / "docs" / "choosing_p.md").read_text("utf-8")
    known = found["counts"]["known"]
    for row in known["warnings"]:
        cells = [row["hits"], row["false alarms"], row["misses"], row["never"]]
        shown = [f"{cell[0]} of {cell[1]}" if isinstance(cell, list) else str(cell) for cell in cells]
        assert f"| {row['judged by']} | {' | '.join(shown)} |" in page
    for row in known["rules"]:
        assert f"| {' | '.join(f'{of[0]} of {of[1]}' for of in [*row.values()][1:])} |" in page
    later = json.loads((ROOT / "recipes" / "results" / "suggestions_memory.json").read_text("utf-8"))["counts"]["new"]
    at_1 = [row for part in (known, later) for row in part["outcomes"] if row["p"] == 1]
    better, worse, rest = (sum(row[key] for row in at_1) for key in ("better", "worse", "not told apart"))
    assert f"better in {better}, worse in {worse}, and not told apart in {rest}." in page
    beginning = next(row for row in later["warnings"] if row["warning"] == "beginning")
    (hits, pairs), (never, _) = beginning["hits"], beginning["never"]
    assert f"right in {hits} of {pairs}, where never to warn is right in {never};" in page
    better, worse = (sum(row[key] for row in later["outcomes"]) for key in ("better", "worse"))
    assert f"better in {better} of {pairs} pairs and worse in {worse}," in page
    rules = {row["p is better than 0"]: row["any p of a comparison"] for row in later["rules"]}
    (right, number), (never, _) = rules["from scratch, decoder alone, digits after a blank"], rules["never"]
    assert f'right in {right} of {number}, and "never" in {never}:' in page
    gained, _ = rules["first token not warned of"]
    assert f"promised a gain in all {number}, and {gained} had one." in page
    comparisons = [each for each in found["comparisons"] if each["summary"] in check_suggestions.KNOWN]
    assert f"{len(comparisons)} comparisons" in page


def test_what_is_no_summary_of_a_comparison_is_passed_over() -> None:
    results = sorted(check_suggestions.RESULTS.glob("*.json"))
    summaries = [path for path in results if check_suggestions.is_summary(path)]
    for path in summaries:
        check_suggestions.read_summary(path)
    assert {"copying_t5_15", "copying_memory_powers"} <= {path.stem for path in summaries}
    assert not {"memory_tasks", "gradients_by_lag", "suggestions", "benchmarks_avx2"} & {
        path.stem for path in summaries
    }

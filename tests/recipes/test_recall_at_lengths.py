"""Trained models scored at other lengths: the same recall as an evaluation there gives, pairs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.finetuning.report import load_evaluations
from recipes import finetune_causal_lm
from recipes.laboratory.recall_at_lengths import column_of, main, tables

RUN = [
    *("--config", "copying/small_attention", "--copying_form", "selective", "--copy_length", "2", "--symbols", "3"),
    *("--model_type", "memory_attention", "--config_overrides", "hidden_size=16", "--max_steps", "80", "--use_cpu"),
    *("--blank_length", "4", "--max_eval_samples", "70", "--eval_steps", "40", "--report_to", "none"),
]


def test_a_model_has_the_recall_that_an_evaluation_at_that_length_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "runs" / "memory_attention" / "p1_seed0"
    finetune_causal_lm.main([*RUN, "--output_dir", str(trained)])
    finetune_causal_lm.main([*RUN, "--eval_length_factor", "4", "--output_dir", str(tmp_path / "longer")])
    recalls = [load_evaluations(each)[-1]["metrics"]["eval_recall"] for each in (trained, tmp_path / "longer")]
    assert recalls[0] != recalls[1]

    output = tmp_path / "lengths.json"
    capsys.readouterr()
    main([str(tmp_path / "runs"), "--factors", "1", "4", "--output", str(output)])
    (run,) = json.loads(output.read_text("utf-8"))["runs"]
    assert [run[name] for name in ("model", "column", "seed", "reached")] == ["memory_attention", "p = 1", 0, False]
    assert [*run["recall"].values()] == pytest.approx(recalls, abs=0.01)
    assert run["task"] == "selective copying, 2 of 3 symbols among 4 blanks"
    printed = capsys.readouterr().out
    main(["--redraw", str(output)])
    assert capsys.readouterr().out == printed

    path = trained / "evaluations.json"
    evaluations = json.loads(path.read_text("utf-8"))
    evaluations["evaluations"][-1]["metrics"]["eval_recall"] += 0.02
    path.write_text(json.dumps(evaluations), encoding="utf-8")
    with pytest.raises(ValueError, match=r"recalls .* in its last evaluation"):
        main([str(tmp_path / "runs"), "--factors", "1"])


def run_of(column: str, seed: int, recall: float, *, reached: bool = True) -> dict[str, Any]:
    about = {"task": "copying", "model": "llama", "column": column, "seed": seed, "reached": reached}
    return {**about, "recall": {"1": 1.0, "2": recall}}


def test_pairs_are_the_seeds_that_reached_the_goal_with_both() -> None:
    usual = [run_of("p = 0", seed, 0.5) for seed in range(3)] + [run_of("p = 0", 3, 0.1, reached=False)]
    late = [run_of("p = 10 → 0", seed, recall) for seed, recall in ((0, 0.6), (1, 0.8), (3, 0.9))]
    *_, first, second = tables([*usual, *late], [1, 2]).splitlines()
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["llama", "p = 0", "3 of 4", "1", "0.500", "", ""]
    # of the seeds 0 and 1: 0.2 ± t_{0.975, 1} · 0.1
    differences = ["0, 2 seeds", "0.200 [−1.071, 1.471], 2 seeds"]
    assert [cell.strip() for cell in second.split("|")[2:-1]] == ["p = 10 → 0", "3 of 3", "1", "0.767", *differences]


def test_the_columns_are_named_as_in_the_page() -> None:
    constant = {"temporal_power": 4.0, "temporal_power_schedule": "constant", "temporal_power_start": 0.0}
    falling = {"temporal_power": 0.0, "temporal_power_schedule": "linear", "temporal_power_start": 10.0}
    assert column_of({**constant, "temporal_mixture": 1.0}) == "p = 4"
    assert column_of({**constant, "temporal_mixture": 0.9}) == "p = 4, λ = 0.9"
    assert column_of({**falling, "temporal_mixture": 1.0}) == "p = 10 → 0"


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run; accepted: the output_dir of a comparison"):
        main([str(tmp_path)])
    (tmp_path / "all_results.json").write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"task": "copying", "copying_form": "needles"}))
    with pytest.raises(ValueError, match="no copying whose answers are read off the rows; accepted: such a run"):
        main([str(tmp_path)])

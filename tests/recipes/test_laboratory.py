"""The laboratory's comparisons: their files of flags, their controls, the gradient norms that they compare."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerState

from hf_temporal import TemporalTrainingArguments, target_positions
from hf_temporal.compare.main import main, read_arguments
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.controls import ControlArguments, controlled
from hf_temporal.finetuning.run import gradient_norms
from tests.recipes.test_configs import KINDS

ROOT = Path(__file__).parents[2]
COMPARISONS = {path.stem: path for path in sorted((ROOT / "recipes" / "laboratory" / "comparisons").glob("*.yaml"))}
COPYING = "--blank_length 4 --copy_length 2 --max_eval_samples 4"
TINY = {
    "linear_functional": ("--length 9 --eval_samples 4", "memory_linear_rnn"),
    "sensitivity": ("--length 9 --eval_samples 4", "memory_tanh_rnn"),
    "copying_memory": (COPYING, "memory_tcn"),
    "gradients_by_lag": (f"{COPYING} --measure_every 2", "memory_tcn"),
    "memory_tasks": (COPYING, "memory_state_space"),
}


def commands_in(text: str) -> list[list[str]]:
    """The flags of each command that reads a grid."""
    text = re.sub(r"\\\n#? *", "", text)
    return [shlex.split(found) for found in re.findall(r"python recipes/compare_powers\.py (--grid [^\n]*)", text)]


def test_every_comparison_is_tried() -> None:
    assert TINY.keys() == COMPARISONS.keys()


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_of_the_laboratory_from_one_command(name: str, tmp_path: Path) -> None:
    sizes, model_type = TINY[name]
    flags = [
        *sizes.split(),
        *("--config_overrides", "hidden_size=4", "--max_steps", "2", "--eval_steps", "1", "--logging_steps", "1"),
        *("--powers", "0", "2", "--seeds", "0", "--vary", f"model_type={model_type}", "--output_dir", str(tmp_path)),
    ]
    assert main(["--grid", str(COMPARISONS[name]), *flags]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary["metric"] == yaml.safe_load(COMPARISONS[name].read_text("utf-8"))["metric"]
    (combination,) = summary["combinations"]
    assert combination["values"] == {"model_type": model_type}
    assert "gradient norm" in [each["title"] for each in combination["quantities"]]
    assert (tmp_path / "metric_by_power.png").is_file()
    assert (tmp_path / model_type / "memory.png").is_file() == (not sizes.startswith(COPYING))


@pytest.mark.parametrize("name", COMPARISONS)
def test_flags_stand_unless_others_are_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    grid = ["--grid", str(COMPARISONS[name])]
    usual, other = (read_arguments([*grid, *argv]) for argv in ([], ["--seeds", "7", "--max_steps=3"]))
    assert usual.recipe.relative_to("recipes").as_posix() in KINDS
    assert usual.arguments.seeds == [*range(5 if name in ("gradients_by_lag", "memory_tasks") else 3)]
    assert other.arguments.seeds == [7]
    assert [flag for flag in other.overrides if "max_steps" in flag] == ["--max_steps=3"]
    assert usual.arguments.powers == other.arguments.powers
    assert usual.arguments.varied == other.arguments.varied != {}
    assert read_arguments([str(ROOT / "recipes" / "finetune_seq2seq.py"), *grid]).recipe.stem == "finetune_seq2seq"


def test_the_commands_of_the_laboratory_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination that they and docs/results.md ask for, with the sizes of the paper's author."""
    monkeypatch.chdir(ROOT)
    seen = []
    for path in (*COMPARISONS.values(), ROOT / "docs" / "results.md"):
        seen.append(0)
        for flags in commands_in(path.read_text("utf-8")):
            for each in read_arguments(flags).combinations():
                config, recipe = each.arguments.config, each.recipe.relative_to("recipes").as_posix()
                model_args, *_ = parse(KINDS[recipe], ["--config", str(config), *each.overrides])
                model_args.config_values()
                seen[-1] += 1
    assert dict(zip([*COMPARISONS, "results"], seen, strict=True)) == {
        "copying_memory": 5 + 2 + 4,
        "gradients_by_lag": 2,
        "linear_functional": 10 + 6 + 10,
        "memory_tasks": 6 * 10,
        "sensitivity": 4,
        "results": (5 + 4 + 2) + (10 + 3) + 3 + (2 + 2) + 4,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power: [0, 1]\n", "'power' is no flag of a comparison; accepted: 'powers', the nearest, or a flag of the"),
        ("- powers\n", "is no mapping"),
        ("flags: 3\n", "is no mapping, or its flags are none"),
    ],
)
def test_what_is_no_grid_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_arguments(["--grid", str(path)])
    with pytest.raises(ValueError, match=r"grid='nowhere.yaml' is no file"):
        read_arguments(["--grid", "nowhere.yaml"])


# ---- controls


def weights_of(control: str, power: float, labels: torch.Tensor, folder: Path) -> torch.Tensor:
    args = TemporalTrainingArguments(str(folder), temporal_power=power, use_cpu=True)
    weighting = controlled(ControlArguments(control), args)
    assert weighting is not None
    return weighting.weights(target_positions(labels))


def test_the_late_control_is_the_last_part_alone(tmp_path: Path) -> None:
    labels = torch.tensor([[-100, *range(8)], [-100] * 5 + [*range(4)]])
    weights = weights_of("late", 3.0, labels, tmp_path)
    assert weights.tolist() == [[0] * 7 + [4, 4], [0] * 8 + [4]]
    assert weights_of("late", 0.0, labels, tmp_path).tolist() == (labels >= 0).float().tolist()
    assert weights_of("late", float("inf"), labels, tmp_path).tolist() == [[0] * 8 + [8], [0] * 8 + [4]]


def test_the_shuffled_control_has_the_weights_of_the_power_in_another_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[-100, *range(8)], [-100] * 5 + [*range(4)]])
    args = TemporalTrainingArguments(str(tmp_path), temporal_power=3.0, use_cpu=True)
    expected = args.temporal_weighting().weights(target_positions(labels))
    drawn = [weights_of("shuffled", 3.0, labels, tmp_path) for _ in range(400)]
    for weights in drawn:
        torch.testing.assert_close(weights.sort(-1).values, expected.sort(-1).values)
    mean = torch.stack(drawn).mean(0)
    torch.testing.assert_close(mean, (labels >= 0).float(), atol=0.25, rtol=0)
    last = weights_of("shuffled", float("inf"), labels, tmp_path)
    assert sorted(last[0].tolist()) == [0] * 8 + [8]


def test_the_capped_control_cuts_the_largest_weights_off(tmp_path: Path) -> None:
    labels = torch.tensor([[-100, *range(4)], [-100, 5, -100, -100, -100]])
    raw = torch.tensor([1.0, 16, 81, 256]) * 4 / 354
    cut = raw.clamp(max=2)
    expected = torch.stack([cut * 4 / cut.sum(), torch.tensor([1.0, 0, 0, 0])])
    torch.testing.assert_close(weights_of("capped", 4.0, labels, tmp_path)[:, 1:], expected)


def test_the_last_exempt_control_leaves_the_last_token_its_usual_weight(tmp_path: Path) -> None:
    labels = torch.tensor([[-100, *range(4)], [-100, 5, -100, -100, -100]])
    expected = torch.tensor([[3 / 98, 48 / 98, 243 / 98, 1.0], [1.0, 0, 0, 0]])
    torch.testing.assert_close(weights_of("last_exempt", 4.0, labels, tmp_path)[:, 1:], expected)
    assert weights_of("last_exempt", float("inf"), labels, tmp_path)[0].tolist() == [0, 0, 0, 0, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temporal_power", -1.0),
        ("temporal_mixture", 0.5),
        ("temporal_power_schedule", "linear"),
        ("temporal_origin", "sequence"),
        ("temporal_normalization", "batch"),
    ],
)
def test_a_control_of_what_it_cannot_follow_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    args = TemporalTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match=f"control='late' with {name}={value!r}; accepted"):
        controlled(ControlArguments("late"), args)
    assert controlled(ControlArguments(), args) is None


# ---- gradient norms


def test_gradient_norms_are_those_since_the_evaluation_before() -> None:
    evaluation: Callable[[int], dict[str, float]] = lambda step: {"eval_runtime": 0.1, "step": step}  # noqa: E731
    state = TrainerState(log_history=[evaluation(0)])
    assert gradient_norms(state) == {}
    state.log_history += [{"grad_norm": 9.0, "step": 1}, evaluation(1)]
    state.global_step = 1
    assert gradient_norms(state) == {"grad_norm": 9.0}
    state.log_history += [{"grad_norm": 1.0, "step": 2}, {"grad_norm": 3.0, "step": 3}, evaluation(3)]
    state.global_step = 3
    for _ in range(2):  # the second time as with load_best_model_at_end, which evaluates once more
        assert gradient_norms(state) == {"grad_norm": 2.0, "grad_norm_spread": 0.5}
        state.log_history.append(evaluation(3))
    state.log_history += [{"grad_norm": float("nan"), "step": 4}, {"grad_norm": 3.0, "step": 5}, evaluation(5)]
    state.global_step = 5
    assert all(map(math.isnan, gradient_norms(state).values()))

"""The gradients by lag: of a linear model, whose own are known, and from a comparison to its table and picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_temporal.compare import main as compare
from recipes.laboratory.gradients_by_lag import KINDS, NAME, distant_share, gradients_by_lag, main

ROOT = Path(__file__).parents[2]
GRID = ROOT / "recipes" / "laboratory" / "comparisons" / f"{NAME}.yaml"
TINY = [
    *("--config", "copying/small_attention", "--blank_length", "4", "--copy_length", "2", "--max_eval_samples", "4"),
    *("--config_overrides", "hidden_size=4", "--max_steps", "2", "--logging_steps", "1", "--eval_steps", "1"),
    *("--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu"),
]


class Linear(nn.Module):
    """Logits U Σ_s ρ(s) h_{t−s}."""

    def __init__(self, memory: Tensor, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.memory = memory
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        states, time = self.embed(input_ids), input_ids.shape[1]
        lags = torch.arange(time)[:, None] - torch.arange(time)
        mixed = torch.where(lags >= 0, self.memory[lags.clamp(min=0)], 0) @ states
        return SimpleNamespace(logits=self.head(mixed))


def test_a_linear_model_has_the_gradients_of_its_memory_function() -> None:
    """‖∂ℓ_t/∂h_{t−s}‖ = |ρ(s)| ‖Uᵀ(softmax(z_t) − e)‖, with e the target's unit vector."""
    torch.manual_seed(0)
    batch, time, vocabulary = 3, 7, 5
    memory = torch.randn(time, dtype=torch.float64)
    model = Linear(memory, 4, vocabulary)
    rows = torch.randint(vocabulary, (batch, time))
    labels = rows.clone()
    labels[:, :3] = labels[1, 4] = labels[:, 5] = -100
    weights = torch.rand(2, batch, time)
    found = gradients_by_lag(model, {"input_ids": rows, "labels": labels}, weights)

    expected = torch.zeros(2, time - 1, dtype=torch.float64)
    logits = model(rows, use_cache=False).logits
    for n, j in (labels != -100).nonzero().tolist():
        error = logits[n, j - 1].softmax(-1) - F.one_hot(labels[n, j], vocabulary)
        size = (error @ model.head.weight).norm()
        for s in range(j):
            expected[:, s] += weights[:, n, j].double() * memory[s].abs() * size / batch
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_distant_lags_are_those_beyond_half() -> None:
    assert distant_share([1, 1, 1, 2, 3]) == 5 / 8  # T = 5: s = 3, 4
    assert distant_share([1, 1, 1, 2]) == 2 / 5  # T = 4: s = 3


def test_from_a_comparison_to_its_table_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, told, redrawn = tmp_path / "runs", tmp_path / "told", tmp_path / "redrawn"
    models = ("memory_attention", "memory_tcn")
    flags = [*TINY[2:], "--measure_every", "2", "--measured_examples", "3", "--vary", f"model_type={','.join(models)}"]
    assert compare.main(["--grid", str(GRID), *flags, "--seeds", "0", "1", "--output_dir", str(folder)]) == 0
    capsys.readouterr()
    main(["--sum_up", str(folder), "--output_dir", str(told)])
    printed = capsys.readouterr().out
    main(["--redraw", str(told / f"{NAME}.json"), "--output_dir", str(redrawn)])
    assert capsys.readouterr().out.replace("redrawn", "told") == printed
    assert (told / f"{NAME}.png").read_bytes() == (redrawn / f"{NAME}.png").read_bytes()

    written = json.loads((told / f"{NAME}.json").read_text("utf-8"))
    assert written["steps"].keys() == set(models)
    assert [(run["model"], run["power"], run["seed"]) for run in written["runs"][:4]] == [
        ("memory_attention", power, seed) for seed in (0, 1) for power in (0, 4)
    ]
    untrained = {(run["model"], run["power"], run["seed"]): run for run in written["runs"]}
    for model in models:
        usual, late = untrained[model, 0, 1], untrained[model, 4, 1]
        assert usual["recall"].keys() == {"0", "1", "2"}
        for kind in KINDS:
            assert {step: len(by_lag) for step, by_lag in usual[kind].items()} == {"0": 8, "2": 8}
        assert usual["weighted"] == usual["unweighted"]
        assert late["unweighted"]["0"] == usual["unweighted"]["0"]  # both begin as the same model
        assert distant_share(late["weighted"]["0"]) > distant_share(usual["weighted"]["0"])
        assert f"| {model} " in printed
        assert f"{model}, p = 4: 2 steps until recall is reached, 2 of 2 runs later." in printed


def test_it_is_measured_where_it_is_evaluated(tmp_path: Path) -> None:
    run = [*TINY, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"measure_every=3 and eval_steps=2: .* accepted: a multiple of eval_steps"):
        main([*run, "--eval_steps", "2", "--measure_every", "3"])
    with pytest.raises(ValueError, match="measured_examples=0; accepted: a whole number of at least 1"):
        main([*run, "--measured_examples", "0"])

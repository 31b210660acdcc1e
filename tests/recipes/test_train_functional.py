"""The laboratory's recipe from beginning to end, and the memory errors that it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_temporal.finetuning.functional import FunctionalArguments, MemoryScores
from hf_temporal.memory.models import FAMILIES
from recipes.laboratory.train_functional import FunctionalTrainer, main

CONFIG = "recipes/laboratory/configs/linear_functional.yaml"
ROOT = Path(__file__).parents[2]


def flags(output_dir: Path, *more: str) -> list[str]:
    return [
        *("--config", str(ROOT / CONFIG), "--output_dir", str(output_dir), "--use_cpu", "--report_to", "none"),
        *("--length", "12", "--eval_samples", "8", "--config_overrides", "hidden_size=8", "--max_steps", "4"),
        *(
            "--per_device_train_batch_size",
            "4",
            "--eval_steps",
            "2",
            "--save_steps",
            "2",
            "--logging_steps",
            "1",
            *more,
        ),
    ]


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output_dir / "evaluations.json").read_text("utf-8"))["evaluations"]
    return found


def test_a_model_is_trained_probed_saved_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(flags(run, "--max_steps", "30", "--learning_rate", "1e-2"))
    found = evaluations(run)
    assert [each["step"] for each in found] == [*range(0, 31, 2)]
    first, last = found[0], found[-1]
    for name in ("loss", "short_memory_error", "temporal_loss", "head_loss", "tail_loss"):
        assert last["metrics"][f"eval_{name}"] < 0.5 * first["metrics"][f"eval_{name}"], name
    assert last["target_memory"] == pytest.approx([(1 + 0.1 * lag) ** -1.1 for lag in range(12)])
    assert "| memory error, long lags" in capsys.readouterr().out
    for picture in ("memory.png", "loss_by_position.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    card = (run / "README.md").read_text("utf-8")
    assert "memory_linear_rnn with all its weights trained to follow a functional: the polynomial functional" in card
    assert "trust_remote_code=True" in card

    model = AutoModel.from_pretrained(run)
    with torch.no_grad():
        responses = model(input_values=torch.eye(12)[:1, :, None]).logits[0, :, 0]
    assert responses.tolist() == pytest.approx(last["memory"], abs=1e-5)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(flags(tmp_path / "undisturbed"))
    step = FunctionalTrainer.training_step

    def broken_off(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FunctionalTrainer, "training_step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        main(flags(tmp_path / "run"))
    monkeypatch.setattr(FunctionalTrainer, "training_step", step)
    main(flags(tmp_path / "run"))
    expected = load_file(tmp_path / "undisturbed" / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
    assert [each["step"] for each in evaluations(tmp_path / "run")] == [0, 2, 4]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "linear_rnn"])
def test_other_families_and_mixed_lengths(family: str, tmp_path: Path) -> None:
    model_type = FAMILIES[family].config.model_type
    main(flags(tmp_path, "--model_type", model_type, "--min_length", "5", "--after", "0.5"))
    last = evaluations(tmp_path)[-1]
    # φ(Σ_{s ≤ t} ρ(s)) at α = 1/2
    sums = torch.tensor([(1 + 0.1 * lag) ** -1.1 for lag in range(12)], dtype=torch.float64).cumsum(0)
    expected = (0.5 * sums + 0.5 * sums.tanh()).diff(prepend=torch.zeros(1))
    assert last["target_memory"] == pytest.approx(expected.tolist(), rel=1e-6)
    assert all(last["metrics"][f"eval_{name}_memory_error"] > 0 for name in ("short", "middle", "long"))


def test_a_model_that_is_not_linear_is_probed_by_a_constant_input() -> None:
    scores = MemoryScores(FunctionalArguments(target="shift", length=30))
    for family, target in (("linear_rnn", [0.0] * 10 + [1.0] + [0.0] * 19), ("tanh_rnn", None)):
        scores.of(FAMILIES[family].regression(FAMILIES[family].config(hidden_size=4)).eval())
        assert scores.record["target_memory"] == pytest.approx(target or [0.0] * 10 + [1.0] + [0.0] * 19)
        assert (min(scores.record["memory"]) < 0) == (family == "linear_rnn")


def test_the_error_is_that_of_thirds_of_the_lags() -> None:
    model = FAMILIES["linear_rnn"].regression(FAMILIES["linear_rnn"].config(hidden_size=4, use_bias=False)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    found = MemoryScores(FunctionalArguments(target="shift", length=30)).of(model)
    expected = {"short": 0.0, "middle": 0.1**0.5, "long": 0.0}
    names = [f"{name}_{kind}_error" for kind in ("memory", "gradient") for name in expected]
    assert found == pytest.approx(dict(zip(names, [*expected.values()] * 2, strict=True)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target", "gauss"], "--target"),
        (["--before", "2"], "before=2.0"),
        (["--length", "2"], "length=2; accepted: a whole number of at least 3"),
        (["--min_length", "13"], "min_length=13; accepted: 1 to length=12"),
        (
            ["--model_type", "llama", "--config_overrides", ""],
            "model_type='llama' is not of the laboratory; accepted: memory_linear_rnn, memory_tanh_rnn",
        ),
    ],
)
def test_bad_settings_are_named(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as raised:
        main(flags(tmp_path, *given))
    assert message in f"{raised.value}{capsys.readouterr().err}"

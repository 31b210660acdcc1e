"""The encoder–decoder recipe from beginning to end on a small T5 from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_temporal.finetuning import recipe
from recipes.finetune_seq2seq import Seq2SeqTrainer, main
from tests.tiny_run import Tiny

WEIGHTS = "model.safetensors"


def flags(tiny: Tiny, output_dir: Path, *more: str) -> list[str]:
    """The causal recipe's, less the model and its adapter."""
    given = tiny.flags(output_dir, "--predict_with_generate", "--learning_rate", "3e-3", *more)
    start = given.index("--use_peft")
    return [*given[2:start], *given[start + 5 :]]


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output_dir / "evaluations.json").read_text("utf-8"))["evaluations"]
    return found


@pytest.fixture(autouse=True)
def _small_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "VOCABULARY", 320)
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path / "cache"))


def test_small_t5_learns_and_is_reported(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main(flags(tiny, run, "--do_predict"))
    before, after = evaluations(run)
    assert (before["step"], after["step"]) == (0, 4)
    assert after["metrics"]["eval_loss"] < before["metrics"]["eval_loss"] - 0.1
    for name in ("rouge1", "rougeL", "temporal_loss", "head_loss", "tail_loss", "gen_len"):
        assert f"eval_{name}" in after["metrics"]
    assert len(after["generated"]) == len(after["references"]) == 7
    assert after["references"][0].startswith("Take x24 from file 24")
    assert len((run / "predictions.jsonl").read_text("utf-8").splitlines()) == 5
    assert (run / "loss_by_position.png").exists()
    card = (run / "README.md").read_text("utf-8")
    assert "A new model: a small T5." in card
    assert "AutoModelForSeq2SeqLM" in card
    assert "| ROUGE-1" in capsys.readouterr().out

    weights = load_file(run / WEIGHTS)
    (run / WEIGHTS).unlink()
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", lambda *_: pytest.fail("trained again"))
    main(flags(tiny, run))
    for name, weight in load_file(run / WEIGHTS).items():
        assert torch.equal(weight, weights[name]), name


def test_powers_are_told_and_nothing_is_trained(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags(tiny, tmp_path / "look", "--suggest_power"))
    assert "24 documents of " in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "look").iterdir())
    assert names == ["suggested_power.json", "suggested_power.png"]


def test_interrupted_run_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(flags(tiny, tmp_path / "undisturbed"))
    step = Seq2SeqTrainer.training_step

    def broken_off(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "training_step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        main(flags(tiny, tmp_path / "run"))
    monkeypatch.setattr(Seq2SeqTrainer, "training_step", step)
    main(flags(tiny, tmp_path / "run"))
    expected = load_file(tmp_path / "undisturbed" / WEIGHTS)
    for name, weight in load_file(tmp_path / "run" / WEIGHTS).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
    assert [each["step"] for each in evaluations(tmp_path / "run")] == [0, 4]


def test_a_model_that_is_there_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    main(flags(tiny, tmp_path / "first", "--do_eval", "false", "--max_steps", "1"))
    folder = tmp_path / "first"
    given = flags(tiny, tmp_path / "second", "--do_eval", "false", "--max_steps", "1")
    main(["--model_name_or_path", str(folder), *given])
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "second"),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.vocab_size == len(tokenizer)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert all((before[name] - after[name]).abs().max() < 0.01 for name in before)  # from where the first ended
    assert any(not torch.equal(before[name], after[name]) for name in before)

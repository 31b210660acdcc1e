"""The laboratory's fine-tuning with something else in the place of t^p."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_temporal.finetuning.trainers import CausalTrainer, Seq2SeqTrainer
from recipes import finetune_causal_lm
from recipes.laboratory import finetune_seq2seq_with_control
from recipes.laboratory.finetune_with_control import main
from tests.tiny_run import Tiny


def test_a_control_takes_the_place_of_the_power(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    train = CausalTrainer.train

    def kept(self: Any, **given: Any) -> Any:
        made.append(self)
        return train(self, **given)

    monkeypatch.setattr(CausalTrainer, "train", kept)
    flags = tiny.flags(tmp_path / "late", "--max_steps", "1", "--max_eval_samples", "2")
    main([*flags, "--control", "late"])
    (trainer,) = made
    assert trainer.weighting.weight_fn is not None
    assert json.loads((tmp_path / "late" / "run.json").read_text("utf-8"))["control"] == "late"
    card = (tmp_path / "late" / "README.md").read_text("utf-8")
    assert "accelerate launch recipes/laboratory/finetune_with_control.py" in card
    with pytest.raises(ValueError, match=r"control='power', but output_dir=.* holds a run with control='late'"):
        main(flags)


def test_the_power_is_no_control(tiny: Tiny, tmp_path: Path) -> None:
    """The plain recipe, whose settings have no control, goes on with a run that names the power as one."""
    flags = tiny.flags(tmp_path / "run", "--max_steps", "1", "--do_eval", "false")
    main(flags)
    weights = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    finetune_causal_lm.main(flags)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="--control is no argument of this recipe"):
        finetune_causal_lm.main([*flags, "--control", "late"])


@pytest.mark.parametrize("flag", [["--suggest_power"], ["--search_power", "1"]])
def test_a_power_is_not_sought_for_a_control(flag: list[str], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"control='late' has a weighting of its own, .*; accepted: control='power'"):
        main(tiny.flags(tmp_path, "--control", "late", *flag))


def test_an_encoder_decoder_with_a_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    train = Seq2SeqTrainer.train

    def kept(self: Any, **given: Any) -> Any:
        made.append(self)
        return train(self, **given)

    monkeypatch.setattr(Seq2SeqTrainer, "train", kept)
    flags = ["--config", "copying/small_t5", "--output_dir", str(tmp_path), "--max_steps", "1", "--report_to", "none"]
    flags += ["--max_eval_samples", "2", "--temporal_power", "7", "--control", "late"]
    finetune_seq2seq_with_control.main(flags)
    (trainer,) = made
    batch = next(iter(trainer.get_train_dataloader()))
    positions = batch["temporal_positions"]
    weights = trainer.weighting.weights(positions)
    assert positions.shape[1] == 40
    assert (weights > 0).sum(1).tolist() == [5] * len(positions)
    assert (weights[:, -5:] == 8).all()
    with pytest.raises(ValueError, match="control='late' has a weighting of its own"):
        finetune_seq2seq_with_control.main([*flags, "--suggest_power"])

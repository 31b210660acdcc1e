"""A run that dies and is resumed from its last checkpoint ends where one that never died ends, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_temporal import TemporalTrainingArguments, TemporalWeighting, TemporalWeightTrainer
from tests.tiny_models import PadCollator, examples, tiny_model

STEPS = 7
SAVE_EVERY = 2
DIES_AFTER = 5  # one step behind the second checkpoint, in the middle of an epoch


class Interruption(TrainerCallback):
    """Ends the run after a step that no checkpoint holds: by an exception, or by the signal that nothing can catch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, control, kwargs
        if state.global_step == DIES_AFTER:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def trainer_of(name: str, folder: Path, schedule: str, callbacks: list[TrainerCallback]) -> TemporalWeightTrainer:
    # Dropout, a shuffled order and Adam's moments: all of them have to be taken up again too.
    model = tiny_model(name.split("-")[0], "lora" if name.endswith("-lora") else "plain")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return TemporalWeightTrainer(
        model=model,
        args=TemporalTrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=SAVE_EVERY, logging_steps=1, learning_rate=0.01, use_cpu=True,
            report_to="none", disable_tqdm=True, temporal_power=3.0, temporal_power_start=-1.0,
            temporal_power_schedule=schedule, temporal_power_warmup_ratio=0.9,
        ),
        train_dataset=examples(name.split("-")[0], 12),
        data_collator=PadCollator(),
        callbacks=callbacks,
    )  # fmt: skip


def outcome(trainer: TemporalWeightTrainer) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    keep = ("step", "loss", "grad_norm", "learning_rate", "temporal_power", "effective_sample_size")
    logs = [{key: log[key] for key in keep} for log in trainer.state.log_history if "loss" in log]
    assert trainer.model is not None
    return {key: value.detach().clone() for key, value in trainer.model.named_parameters()}, logs


@pytest.mark.parametrize(
    ("name", "schedule", "how"),
    [
        ("gpt2", "linear", "interrupted"),
        ("gpt2", "cosine", "killed"),
        ("gpt2-lora", "linear", "interrupted"),
        ("t5", "cosine", "interrupted"),
    ],
)
def test_a_resumed_run_ends_in_the_weights_of_one_that_never_died(
    name: str, schedule: str, how: str, tmp_path: Path
) -> None:
    whole = trainer_of(name, tmp_path / "whole", schedule, [])
    whole.train()
    weights, logs = outcome(whole)

    broken = tmp_path / "broken"
    if how == "killed":
        root = Path(__file__).parents[1]
        child = subprocess.run(
            [sys.executable, __file__, name, str(broken), schedule], cwd=root, timeout=240,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert child.returncode == -signal.SIGKILL
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer_of(name, broken, schedule, [Interruption(how)]).train()
    assert sorted(folder.name for folder in broken.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    resumed = trainer_of(name, broken, schedule, [])
    resumed.train(resume_from_checkpoint=True)
    again, again_logs = outcome(resumed)
    assert again_logs == logs
    assert weights.keys() == again.keys()
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []


def test_the_schedule_runs_and_the_checkpoint_tells_the_weighting(tmp_path: Path) -> None:
    trainer = trainer_of("gpt2", tmp_path, "linear", [])
    trainer.train()
    powers = [log["temporal_power"] for log in trainer.state.log_history if "loss" in log]
    ramp = 0.9 * STEPS
    assert powers == pytest.approx([-1.0 + 4.0 * min(1.0, step / ramp) for step in range(STEPS)])
    assert TemporalWeighting.from_pretrained(tmp_path / "checkpoint-4") == TemporalWeighting(power=3.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer_of(sys.argv[1], Path(sys.argv[2]), sys.argv[3], [Interruption("killed")]).train()

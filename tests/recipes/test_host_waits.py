"""A step of our trainer makes the host wait for a device as often as the plain Trainer's, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from step_trainers import Job, build_trainer
from transformers import TrainerCallback

from tests.host_waits import Waits


class LastStep(TrainerCallback):
    """Counts in the last step, when what is done once is done."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step == state.max_steps:
            self.waits.__exit__(None, None, None)
        elif state.global_step == state.max_steps - 1:
            self.waits.__enter__()


def waits_of(trainer: str, model: str, folder: Path) -> Counter[str]:
    """Those of one step, without the collator's."""
    last = LastStep()
    built = build_trainer(Job(model, "lora", "float32", 2, 32, 0.25, trainer, repeats=1), str(folder), [last])
    samples = built.get_batch_samples
    built.get_batch_samples = lambda batches, *rest: samples(last.waits.outside(batches), *rest)
    built.train()
    return last.waits.at


@pytest.mark.parametrize("model", ["toy", "toy T5"])
def test_ours_waits_as_often_as_the_plain_trainer(model: str, tmp_path: Path) -> None:
    stock = waits_of("stock", model, tmp_path)
    assert stock.total() >= 2  # the trainer looks whether the loss is nan, or inf
    for trainer in ("by hand", "no head", "full logits", "fused head"):
        waits = waits_of(trainer, model, tmp_path)
        assert waits.total() == stock.total(), trainer
        assert any(place.startswith("transformers/trainer.py:") for place in waits)


GUARDED = """
def read(x):
    if x.device.type == "cpu" and x.any():
        x.max().item()
    if x.device.type != "cpu":
        return None
    return x.sum().item()


def wait(x):
    if x.any():
        return x.max().item()
"""


def test_waits(tmp_path: Path) -> None:
    values, mask = torch.arange(4.0, requires_grad=True), torch.tensor([True, False, True, True])
    path = tmp_path / "guarded.py"
    module: dict[str, Any] = {}
    path.write_text(GUARDED, encoding="utf-8")
    exec(compile(GUARDED, str(path), "exec"), module)
    optimizer = torch.optim.AdamW([values], foreach=False)

    def batches() -> Iterator[float]:
        yield values.sum().item()

    with Waits() as waits:
        values[mask].sum().backward()
        mask.nonzero()
        values.detach()[mask] = 0.0  # filled in where the mask is, without a list of places
        values.detach()[[0, 2]] = values.detach()[[1, 3]]
        assert list(waits.outside(batches())) == [2.0]
        module["read"](values)
        optimizer.step()
    assert [place.split()[-1] for place in waits.at] == ["index", "index_put", "nonzero"]  # forward, backward, nonzero
    assert all(place.startswith("tests/recipes/test_host_waits.py:") for place in waits.at)
    assert sum(waits.at.values()) == 3
    with Waits() as waits:
        module["wait"](values)
    assert sum(waits.at.values()) == 2

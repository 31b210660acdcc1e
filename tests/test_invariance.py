"""The same eight examples, however they are split, ordered, padded, packed or spread over processes: the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from tests.tiny_models import (
    CAUSAL,
    MODELS,
    SEQ2SEQ,
    Batch,
    Example,
    PackCollator,
    PadCollator,
    examples,
    tiny_model,
)
from tests.tiny_training import Steps, distance, reference, train

POWERS = (-1.0, 0.0, 0.5, 2.0, 10.0, math.inf)
NORMALIZATIONS = ("sequence", "batch", "tokens")
WEIGHTINGS = [(p, n) for p in POWERS for n in NORMALIZATIONS if (p, n) != (math.inf, "tokens")]


@dataclass(frozen=True)
class Layout:
    """`order` of the examples, `batch_size` of them per forward pass, and how a batch is made of them."""

    batch_size: int
    collator: Callable[[Sequence[Example]], Batch] = field(default_factory=PadCollator)
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    fused: str = "on"


RIGHT_PADDED = {
    "1x8": Layout(8),
    "8x1 in another order": Layout(1, order=(3, 6, 1, 7, 0, 5, 2, 4), fused="off"),
    "2x4 padded by 5 more, reversed": Layout(4, PadCollator(extra=5), order=(7, 6, 5, 4, 3, 2, 1, 0)),
    "3+3+2 padded by 17 more": Layout(3, PadCollator(extra=17), fused="off"),
}
DECODER_ONLY = {
    "2x4 left-padded": Layout(4, PadCollator("left")),
    "3+3+2 left-padded by 6 more, in another order": Layout(
        3, PadCollator("left", 6), order=(5, 0, 2, 7, 1, 3, 6, 4), fused="off"
    ),
    "packed into one row": Layout(8, PackCollator()),
    "packed into rows of three, in another order": Layout(8, PackCollator(3), (2, 7, 4, 0, 6, 1, 3, 5), "off"),
    "packed into two accumulated rows": Layout(4, PackCollator()),
}


def step(name: str, layout: Layout, power: float, normalization: str, folder: Path, **options: Any) -> Steps:
    rows = examples(name)
    return train(
        TemporalWeightTrainer, TemporalTrainingArguments, tiny_model(name, router_aux_loss_coef=0.0),
        [rows[i] for i in layout.order], folder, batch_size=layout.batch_size, collator=layout.collator,
        temporal_power=power, temporal_normalization=normalization, temporal_fused_head=layout.fused, **options,
    )  # fmt: skip


def check(name: str, power: float, normalization: str, folder: Path) -> None:
    layouts = RIGHT_PADDED | ({} if name in SEQ2SEQ else DECODER_ONLY)
    model = tiny_model(name, router_aux_loss_coef=0.0)
    expected = reference(model, examples(name), power=power, normalization=normalization)
    updates: dict[str, dict[str, torch.Tensor]] = {}
    for label, layout in layouts.items():
        # The parameters are compared after a clipped step, so that a loss of 10^10 moves them no further than others.
        steps = step(name, layout, power, normalization, folder, max_grad_norm=1.0)
        assert steps.loss == pytest.approx(expected.loss, rel=5e-6), label
        assert steps.grad_norm == pytest.approx(expected.grad_norm, rel=5e-5), label
        updates[label] = steps.update
        clip = min(1.0, 1.0 / expected.grad_norm)
        descent = {key: -0.1 * clip * gradient for key, gradient in expected.gradients.items()}
        assert distance(steps.update, descent) < 2e-4, label
    for label, update in updates.items():
        assert distance(update, updates["1x8"]) < 2e-4, label


@pytest.mark.parametrize(("power", "normalization"), WEIGHTINGS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_step_does_not_depend_on_the_layout(name: str, power: float, normalization: str, tmp_path: Path) -> None:
    check(name, power, normalization, tmp_path)


@pytest.mark.parametrize(("power", "normalization"), [(2.0, "sequence"), (-1.0, "batch"), (math.inf, "batch")])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gpt2", "llama", "t5")])
def test_a_step_of_any_model_does_not_depend_on_the_layout(
    name: str, power: float, normalization: str, tmp_path: Path
) -> None:
    check(name, power, normalization, tmp_path)


@pytest.mark.parametrize("origin", ["sequence", "turn"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_origin_is_read_alike_from_padded_and_packed_rows(name: str, origin: str, tmp_path: Path) -> None:
    expected = reference(tiny_model(name), examples(name), power=2.0, origin=origin)
    for label, layout in (RIGHT_PADDED | DECODER_ONLY).items():
        steps = step(name, layout, 2.0, "sequence", tmp_path, temporal_origin=origin)
        assert steps.loss == pytest.approx(expected.loss, rel=5e-6), label


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_mixture_is_the_mean_of_the_usual_and_the_weighted_step(name: str, tmp_path: Path) -> None:
    usual, weighted = (reference(tiny_model(name), examples(name), power=power) for power in (0.0, 4.0))
    gradients = {key: -0.1 * (0.7 * usual.gradients[key] + 0.3 * weighted.gradients[key]) for key in usual.gradients}
    for label, layout in (RIGHT_PADDED | ({} if name in SEQ2SEQ else DECODER_ONLY)).items():
        steps = step(name, layout, 4.0, "sequence", tmp_path, temporal_mixture=0.3)
        assert steps.loss == pytest.approx(0.7 * usual.loss + 0.3 * weighted.loss, rel=5e-6), label
        assert distance(steps.update, gradients) < 2e-4, label


@pytest.mark.parametrize("name", CAUSAL)
def test_the_layouts_would_tell_a_difference(name: str) -> None:
    """A loss that forgot p, the normalisation or the origin would be off by more than the tolerances above."""
    model, rows = tiny_model(name, router_aux_loss_coef=0.0), examples(name)
    losses = [
        reference(model, rows, power=power, normalization=normalization, origin=origin).loss
        for power, normalization, origin in [
            (0.0, "sequence", "target"),
            (2.0, "sequence", "target"),
            (2.0, "batch", "target"),
            (2.0, "sequence", "sequence"),
            (2.0, "sequence", "turn"),
        ]
    ]
    gaps = [abs(a - b) / b for i, a in enumerate(losses) for b in losses[:i]]
    assert min(gaps) > 1e-4

"""Targets are their formulas, by hand and by the direct sum; examples are the same every time and train."""

from __future__ import annotations

import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from hf_temporal.memory.functionals import (
    MEMORY_FUNCTIONS,
    Functional,
    FunctionalDataset,
    MemoryFunction,
    causal_convolution,
    memory_function,
    pad_series,
)

STRENGTHS = [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.3, 0.7)]


def series(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def direct_sum(inputs: Tensor, memory: Tensor) -> Tensor:
    """y_t = Σ_{s=0..t} ρ(s) x_{t−s}, time first, term by term."""
    return torch.stack(
        [sum((memory[s] * inputs[t - s] for s in range(t + 1)), torch.zeros(())) for t in range(len(inputs))]
    )


def bent(values: Tensor, strength: float) -> Tensor:
    return (1 - strength) * values + strength * torch.tanh(values)


def examples(functional: Functional | None = None, **changes: Any) -> FunctionalDataset:
    settings: dict[str, Any] = {"split": "train", "size": 6, "seed": 7, "length": 20}
    return FunctionalDataset(functional or Functional("two_part"), **settings | changes)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- memory functions


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("exponential", {0: 1.0, 1: 0.36787944117144233, 30: math.exp(-30)}),
        ("polynomial", {0: 1.0, 10: 0.46651649576840371, 90: 10**-1.1}),
        ("shift", {0: 0.0, 9: 0.0, 10: 1.0, 11: 0.0}),
        ("two_part", {0: 1 + math.exp(-81), 8: 0.36821490379934482, 9: 1 + math.exp(-9)}),
        ("airy", {0: -0.3291451736298, 6: 0.3550280538878172, 7: 0.1352924163128814}),
        ("sine", {0: 0.0, 1: 0.8414709848078965, 11: -0.9999902065507035}),
    ],
)
def test_memory_functions_by_hand(name: str, values: dict[int, float]) -> None:
    memory = memory_function(name, 100)
    assert (memory.dtype, memory.shape) == (torch.float64, (100,))
    for lag, value in values.items():
        assert memory[lag].item() == pytest.approx(value, rel=1e-12, abs=1e-15)


def test_the_names_are_those_of_the_paper() -> None:
    assert set(MEMORY_FUNCTIONS) == {"exponential", "polynomial", "shift", "two_part", "airy", "sine"}


def test_any_callable_of_the_lags() -> None:
    assert memory_function(lambda lag: lag**2, 4).tolist() == [0, 1, 4, 9]
    assert memory_function(lambda lag: lag.float(), 2).dtype == torch.float64
    assert Functional(torch.cos).memory(3).tolist() == [math.cos(lag) for lag in range(3)]


@pytest.mark.parametrize(
    ("target", "length", "message"),
    [
        ("linear", 5, "target='linear'; accepted: 'exponential', 'polynomial', 'shift', 'two_part'"),
        ("sine", 0, "length=0; accepted: a whole number of at least 1"),
        (lambda lag: 1 / lag, 5, r"target=.* is inf at lag 0; accepted: finite numbers"),
        (lambda lag: lag[1:], 5, r"returned \(4,\); accepted: a tensor of shape \(5,\)"),
        (lambda _: 1.0, 5, r"returned float; accepted: a tensor of shape \(5,\)"),
    ],
)
def test_memory_function_errors(target: str | MemoryFunction, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_function(target, length)


def test_airy_without_scipy_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hf-temporal[memory]'")):
        memory_function("airy", 3)
    assert memory_function("sine", 3).isfinite().all()


# ---- functionals


@pytest.mark.parametrize("name", [*MEMORY_FUNCTIONS])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 101, 200])
def test_fft_equals_the_direct_sum(name: str, length: int) -> None:
    inputs = series(length, 2)
    expected = direct_sum(inputs, memory_function(name, length))
    torch.testing.assert_close(Functional(name)(inputs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), STRENGTHS)
def test_nonlinear_functionals_equal_their_formula(before: float, after: float) -> None:
    inputs = series(30, 1)
    expected = bent(direct_sum(bent(inputs, before), memory_function("polynomial", 30)), after)
    actual = Functional("polynomial", before, after)(inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), STRENGTHS)
def test_linear_at_strength_zero_alone(before: float, after: float) -> None:
    functional = Functional("two_part", before, after)
    x, z = series(50, 3), series(50, 3, seed=1)
    gap = (functional(2 * x - 3 * z) - (2 * functional(x) - 3 * functional(z))).abs().max().item()
    assert gap < 1e-12 if before == after == 0 else gap > 0.1


def test_nonlinearity_is_graded() -> None:
    x = series(50, 1)

    def gap(functional: Functional) -> float:
        return (functional(2 * x) - 2 * functional(x)).square().mean().item()

    strengths = [0.0, 0.25, 0.5, 0.75, 1.0]
    for gaps in (
        [gap(Functional("shift", a)) for a in strengths],
        [gap(Functional("shift", 0, a)) for a in strengths],
    ):
        assert gaps == sorted(gaps)
        assert gaps[1] > 1e-3


@given(st.integers(0, 39), st.sampled_from([*MEMORY_FUNCTIONS]), st.sampled_from(STRENGTHS))
def test_the_future_changes_nothing(time: int, name: str, strengths: tuple[float, float]) -> None:
    functional, before = Functional(name, *strengths), series(40, 1)
    after = before.clone()
    after[time:] += 5
    change = (functional(after) - functional(before)).abs()
    assert not (change[:time] > 1e-12).any()


def test_leading_dimensions_and_dtype_are_kept() -> None:
    functional, inputs = Functional("sine", 0.2, 0.2), series(2, 3, 20, 2)
    outputs = functional(inputs)
    for i, j in [(0, 0), (1, 2)]:
        torch.testing.assert_close(outputs[i, j], functional(inputs[i, j]), rtol=0, atol=1e-12)
    torch.testing.assert_close(functional(inputs.float()), outputs.float())


def test_gradients_reach_inputs_and_memory() -> None:
    inputs, memory = series(2, 9, 2).requires_grad_(), series(9).requires_grad_()
    assert torch.autograd.gradcheck(causal_convolution, (inputs, memory))
    assert torch.autograd.gradgradcheck(causal_convolution, (inputs, memory))


def test_functional_errors() -> None:
    with pytest.raises(ValueError, match=r"before=1\.5; accepted: a number from 0 to 1"):
        Functional("sine", before=1.5)
    with pytest.raises(ValueError, match="after=nan; accepted"):
        Functional("sine", after=math.nan)
    with pytest.raises(ValueError, match="target='cosine'; accepted"):
        Functional("cosine")
    with pytest.raises(TypeError, match=r"target=3; accepted: 'exponential', .* or a function"):
        Functional(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs are torch.float64 of shape \(5,\); accepted: floats"):
        Functional("sine")(series(5))
    with pytest.raises(ValueError, match=r"inputs are torch.int64 of shape \(5, 1\)"):
        Functional("sine", before=1)(torch.ones(5, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"memory has shape \(4,\); accepted: \(5,\)"):
        causal_convolution(series(5, 1), series(4))


# ---- data sets


@pytest.mark.parametrize("min_length", [None, 1])
def test_labels_are_the_functional_of_the_inputs(min_length: int | None) -> None:
    functional = Functional("polynomial", 0.5, 0.5)
    for example in examples(functional, dimension=2, min_length=min_length):
        inputs, labels = example["input_values"], example["labels"]
        assert inputs.dtype == labels.dtype == torch.float32
        assert inputs.shape == labels.shape
        assert inputs.shape[1] == 2
        torch.testing.assert_close(labels, functional(inputs.double()).float())


def test_inputs_are_standard_normal() -> None:
    inputs = torch.stack([example["input_values"] for example in examples(size=500, length=100)])
    assert abs(inputs.mean().item()) < 0.02
    assert abs(inputs.std().item() - 1) < 0.02
    neighbours = (inputs[:, 1:] * inputs[:, :-1]).mean().item(), (inputs[1:] * inputs[:-1]).mean().item()
    assert max(map(abs, neighbours)) < 0.02


def test_the_seed_decides_and_nothing_else() -> None:
    all_at_once = list(examples())
    for index in (5, 0, -6, 5):
        assert equal(examples(size=6)[index], all_at_once[index])
    assert equal(examples(size=60)[3], all_at_once[3])
    assert not equal(examples(seed=8)[3], all_at_once[3])
    inputs = [example["input_values"] for example in all_at_once]
    assert len({tuple(x.flatten().tolist()) for x in inputs}) == 6
    assert equal(pickle.loads(pickle.dumps(examples()))[2], all_at_once[2])


def test_held_out_splits_are_the_same_for_every_seed() -> None:
    for split in ("validation", "test"):
        assert equal(examples(split=split, seed=1)[2], examples(split=split, seed=2)[2])
    firsts = [examples(split=split, seed=0)[0]["input_values"] for split in ("train", "validation", "test")]
    assert len({tuple(x.flatten().tolist()) for x in firsts}) == 3


@pytest.mark.parametrize("min_length", [None, 3])
@pytest.mark.parametrize("length", [20, 100, 1000])
def test_a_batch_is_its_examples_to_the_last_bit(length: int, min_length: int | None) -> None:
    data = examples(Functional("sine", 0.5, 0.5), size=33, length=length, min_length=min_length)
    for example, same in zip(data, data.__getitems__(range(33)), strict=True):
        assert equal(example, same)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_them(workers: int) -> None:
    data = examples()
    batches = list(DataLoader(data, batch_size=4, num_workers=workers))
    assert [tuple(batch["labels"].shape) for batch in batches] == [(4, 20, 1), (2, 20, 1)]
    assert torch.equal(batches[1]["input_values"][1], data[5]["input_values"])


def test_every_length_of_the_range_is_drawn() -> None:
    data = examples(size=200, length=6, min_length=3)
    assert {len(example["labels"]) for example in data} == {3, 4, 5, 6}


def test_padding_is_no_target() -> None:
    rows = [{key: torch.full((time, 1), float(time)) for key in ("input_values", "labels")} for time in (1, 3)]
    batch = pad_series(rows)
    assert batch["input_values"][..., 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert batch["labels"].isnan()[..., 0].tolist() == [[False, True, True], [False] * 3]
    assert batch["labels"].nan_to_num(0)[..., 0].tolist() == [[1, 0, 0], [3, 3, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split='dev'; accepted: 'train', 'validation', 'test'"),
        ({"size": 0}, "size=0; accepted"),
        ({"length": 0}, "length=0; accepted"),
        ({"dimension": 0}, "dimension=0; accepted"),
        ({"min_length": 0}, "min_length=0; accepted: 1 to length=20"),
        ({"min_length": 21}, "min_length=21; accepted: 1 to length=20"),
    ],
)
def test_dataset_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples(**change)


@pytest.mark.parametrize("index", [6, -7])
def test_an_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError):
        examples()[index]


class Scale(nn.Module):
    """ŷ_t = a·x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.a * input_values
        return (
            {"logits": logits} if labels is None else {"loss": (logits - labels).square().nanmean(), "logits": logits}
        )


def test_the_trainer_weighs_series_of_mixed_lengths(tmp_path: Path) -> None:
    data = examples(size=4, min_length=2)
    arguments = TemporalTrainingArguments(
        str(tmp_path),
        temporal_power=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = TemporalWeightTrainer(Scale(), arguments, train_dataset=data, data_collator=pad_series)
    trainer.train()
    total, times = 0.0, 0
    for example in data:
        error = (0.5 * example["input_values"] - example["labels"]).double().square()[:, 0]
        time = torch.arange(1, len(error) + 1)
        total += float((error * time / time.double().mean()).sum())
        times += len(error)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / times, rel=1e-4)

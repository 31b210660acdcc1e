"""Labels, masks, documents and weights as they come: the loss that is written out by hand, or an error of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_temporal import (
    TemporalWeighting,
    target_positions,
    weighted_cross_entropy,
    weighted_linear_cross_entropy,
    weighted_regression_loss,
)
from tests.tiny_models import IGNORE

SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORIGINS = ("target", "sequence", "turn")
NORMALIZATIONS = ("sequence", "batch", "tokens")
POWERS = st.sampled_from([0.0, 1.0, 2.0, -1.0, 100.0, -100.0, 1e308, math.inf]) | st.floats(-20, 20)
CASES = settings().max_examples  # of the profile in force: see conftest.py


@dataclass(frozen=True)
class Case:
    """What a user hands over, valid as it stands."""

    labels: Tensor
    document_ids: Tensor | None
    attention_mask: Tensor | None
    hidden: Tensor
    head: Tensor
    weighting: dict[str, Any]
    label_smoothing: float
    dtype: torch.dtype

    @property
    def logits(self) -> Tensor:
        return (self.hidden @ self.head.T).to(self.dtype)

    @property
    def at_a_target(self) -> tuple[int, ...] | None:
        """Where the first target is."""
        found = (self.labels != IGNORE).nonzero()
        return tuple(found[0].tolist()) if len(found) else None


@st.composite
def cases(draw: st.DrawFn, *, smallest: int = 0) -> Case:
    rows, columns = draw(st.integers(smallest, 3)), draw(st.integers(smallest, 7))
    shape = (columns,) if draw(st.booleans()) else (rows, columns)

    def tensor(values: st.SearchStrategy[int], dtypes: Sequence[torch.dtype]) -> Tensor:
        cells = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(cells, dtype=torch.long).reshape(shape).to(draw(st.sampled_from(dtypes)))

    vocabulary = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    normalization = draw(st.sampled_from(NORMALIZATIONS))
    return Case(
        labels=tensor(st.just(IGNORE) | st.integers(0, vocabulary - 1), SIGNED),
        document_ids=tensor(st.integers(-1, 2), SIGNED) if draw(st.booleans()) else None,
        attention_mask=tensor(st.integers(0, 1), (*SIGNED, torch.bool, *FLOATS)) if draw(st.booleans()) else None,
        hidden=torch.randn(*shape, 3, generator=generator) * draw(st.sampled_from([0.0, 1.0, 30.0])),
        head=torch.randn(vocabulary, 3, generator=generator),
        weighting={
            "power": draw(POWERS),
            "origin": draw(st.sampled_from(ORIGINS)),
            "normalization": normalization,
            "mixture": draw(st.sampled_from([1.0, 0.5, 0.0])) if normalization == "sequence" else 1.0,
        },
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.9])),
        dtype=draw(st.sampled_from(FLOATS)),
    )


# ---- by hand


def rows_of(tensor: Tensor | None, like: Tensor) -> list[list[int]] | None:
    if tensor is None:
        return None
    rows = tensor if like.dim() == 2 else tensor[None]
    return [[int(value) for value in row] for row in rows.tolist()]


def documents_of(case: Case) -> list[list[tuple[int, int, int]]]:
    """Each document's target tokens: row, column and t."""
    labels, ids, masks = (rows_of(each, case.labels) for each in (case.labels, case.document_ids, case.attention_mask))
    assert labels is not None
    documents: list[list[tuple[int, int, int]]] = []
    found: list[tuple[int, int, int]]
    for row, line in enumerate(labels):
        padding = 0
        while masks is not None and padding < len(line) and not masks[row][padding]:
            padding += 1
        start, count, found = 0, 0, []
        for column, label in enumerate(line):
            if column and ids is not None and ids[row][column] != ids[row][column - 1]:
                documents.append(found)
                start, count, found = column, 0, []
            if label == IGNORE:
                count = 0 if case.weighting["origin"] == "turn" else count
                continue
            count += 1
            t = column + 1 - max(start, padding) if case.weighting["origin"] == "sequence" else count
            if t > 0:
                found.append((row, column, t))
        documents.append(found)
    return documents


def weights_of(case: Case, documents: list[list[tuple[int, int, int]]]) -> dict[tuple[int, int], float]:
    """The weight of each target token."""
    power, mixture = case.weighting["power"], case.weighting["mixture"]
    everything = [t for document in documents for _, _, t in document]
    weights = {}
    for document in documents:
        times = [t for _, _, t in document]
        scope = times if case.weighting["normalization"] == "sequence" else everything
        largest = (max(scope) if power >= 0 else min(scope)) if scope else 1
        if case.weighting["normalization"] == "tokens":
            largest = 1
        raw = [float(t == largest) if math.isinf(power) else power_of(t / largest, power) for t in times]
        if case.weighting["normalization"] == "sequence":
            raw = [(1 - mixture) + mixture * w * len(raw) / sum(raw) for w in raw]
        weights.update({(row, column): w for (row, column, _), w in zip(document, raw, strict=True)})
    return weights


def power_of(ratio: float, power: float) -> float:
    return math.exp(power * math.log(ratio)) if ratio != 1 else 1.0


def leaves_float32(case: Case, documents: list[list[tuple[int, int, int]]]) -> bool:
    """Whether t^p is no float32, which `normalization="tokens"` is the only one to need."""
    if case.weighting["normalization"] != "tokens" or not case.labels.numel():
        return False
    latest = max([1, *(t for document in documents for _, _, t in document)])
    limits, power = torch.finfo(torch.float32), case.weighting["power"]
    return math.isinf(power) or not math.log(limits.tiny) <= power * math.log(latest) <= math.log(limits.max)


def sums_of(case: Case, weights: dict[tuple[int, int], float]) -> tuple[float, float]:
    """Σ wℓ and Σ w in float64."""
    logits = case.logits.double()
    log_p = (logits if case.labels.dim() == 2 else logits[None]).log_softmax(-1)
    labels = rows_of(case.labels, case.labels)
    assert labels is not None
    total = 0.0
    for (row, column), weight in weights.items():
        scores = log_p[row, column].tolist()
        smoothed = case.label_smoothing * sum(scores) / len(scores)
        total -= weight * ((1 - case.label_smoothing) * scores[labels[row][column]] + smoothed)
    return total, sum(weights.values())


# ---- the public way


def weigh(case: Case) -> Tensor:
    positions = target_positions(
        case.labels, origin=case.weighting["origin"], document_ids=case.document_ids,
        attention_mask=case.attention_mask,
    )  # fmt: skip
    return TemporalWeighting(**case.weighting).weights(positions, document_ids=case.document_ids)


@settings(max_examples=4 * CASES)
@given(cases())
def test_losses_are_those_by_hand(case: Case) -> None:
    documents = documents_of(case)
    if leaves_float32(case, documents):
        with pytest.raises(ValueError, match=r"power=.* leaves float32 .*; accepted: "):
            weigh(case)
        return
    weights, expected = weigh(case), weights_of(case, documents)
    rows = weights if case.labels.dim() == 2 else weights[None]
    for row, line in enumerate(rows.tolist()):
        for column, weight in enumerate(line):
            assert weight == pytest.approx(expected.get((row, column), 0.0), rel=1e-5, abs=1e-30)

    total, weight_sum = sums_of(case, expected)
    logits = case.logits.requires_grad_()
    scale = 1e-5 * (total + weight_sum * float(logits.detach().double().abs().amax() if logits.numel() else 0)) + 1e-30
    got, got_sum = weighted_cross_entropy(logits, case.labels, weights, label_smoothing=case.label_smoothing)
    assert abs(got.item() - total) <= scale
    assert got_sum.item() == pytest.approx(weight_sum, rel=1e-5, abs=1e-30)
    got.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all() or case.dtype is torch.float16  # whose range a weight under "tokens" leaves
    if case.dtype in (torch.float32, torch.float64):
        hidden = case.hidden.reshape(-1, 3).to(case.dtype).requires_grad_()
        fused = weighted_linear_cross_entropy(
            hidden, case.head.to(case.dtype), case.labels.flatten(), weights.flatten(),
            label_smoothing=case.label_smoothing, chunk_size=2,
        )  # fmt: skip
        assert abs(fused.item() - total) <= 3 * scale
        fused.backward()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()


def loss_of(case: Case, weights: Tensor | None = None) -> None:
    weights = weigh(case) if weights is None else weights
    weighted_cross_entropy(case.logits, case.labels, weights, label_smoothing=case.label_smoothing)


def with_value(tensor: Tensor, where: tuple[int, ...] | None, value: float) -> Tensor:
    changed = tensor.clone() if tensor.is_floating_point() else tensor.long()
    changed[where or (0,) * tensor.dim()] = value
    return changed


def bad_weight(value: float) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        case = replace(case, labels=with_value(case.labels, None, 0))
        loss_of(case, with_value(torch.ones(case.labels.shape), None, value))

    return run


def bad_field(**fields: Any) -> Callable[[Case], None]:
    return lambda case: loss_of(replace(case, weighting={**case.weighting, "mixture": 1.0, **fields}))


def bad_labels(change: Callable[[Tensor], Any]) -> Callable[[Case], None]:
    return lambda case: loss_of(replace(plain(case), labels=change(case.labels)))


def plain(case: Case) -> Case:
    """The case without what else might be refused."""
    weighting = {**case.weighting, "power": 1.0}
    return replace(case, document_ids=None, attention_mask=None, weighting=weighting)


def bad_documents(change: Callable[[Tensor], Any]) -> Callable[[Case], None]:
    return lambda case: loss_of(replace(plain(case), document_ids=change(torch.zeros_like(case.labels))))


BAD: dict[str, tuple[str, Callable[[Case], None]]] = {
    "labels in a list": ("labels", bad_labels(lambda labels: labels.tolist())),
    "labels without a sign": ("labels", bad_labels(lambda labels: labels.to(torch.uint8))),
    "labels true and false": ("labels", bad_labels(lambda labels: labels.bool())),
    "labels complex": ("labels", bad_labels(lambda labels: labels.to(torch.complex64))),
    "labels half": ("labels", bad_labels(lambda labels: labels.half())),
    "one label": ("labels", bad_labels(lambda labels: labels.flatten()[0])),
    "labels of three dimensions": ("labels", bad_labels(lambda labels: labels[None, None])),
    "a label too large": ("labels", bad_labels(lambda labels: with_value(labels, None, 5))),
    "a label of -1": ("labels", bad_labels(lambda labels: with_value(labels, None, -1))),
    "more labels than logits": ("labels", bad_labels(lambda labels: torch.cat([labels, labels], -1))),
    "ids in a list": ("document_ids", bad_documents(lambda ids: ids.tolist())),
    "ids of floats": ("document_ids", bad_documents(lambda ids: ids.float() / 0)),
    "ids of another shape": ("document_ids", bad_documents(lambda ids: ids[..., 1:])),
    "a mask of another shape": (
        "attention_mask",
        lambda case: loss_of(replace(plain(case), attention_mask=torch.ones(2, 9))),
    ),
    "no vocabulary": ("logits", lambda case: loss_of(replace(plain(case), head=torch.zeros(0, 3)))),
    "a weight of NaN": ("weights", bad_weight(math.nan)),
    "a weight of infinity": ("weights", bad_weight(math.inf)),
    "a negative weight": ("weights", bad_weight(-1e-3)),
    "weights of another shape": ("weights", lambda case: loss_of(plain(case), torch.ones(9))),
    "smoothing of 1": ("label_smoothing", lambda case: loss_of(replace(plain(case), label_smoothing=1.0))),
    "smoothing of NaN": ("label_smoothing", lambda case: loss_of(replace(plain(case), label_smoothing=math.nan))),
    "power of NaN": ("power", bad_field(power=math.nan)),
    "power of minus infinity": ("power", bad_field(power=-math.inf)),
    "power of text": ("power", bad_field(power="2")),
    "power of true": ("power", bad_field(power=True)),
    "power that is no float": ("power", bad_field(power=10**400)),
    "mixture of 2": ("mixture", bad_field(mixture=2)),
    "mixture under tokens": ("mixture", bad_field(mixture=0.5, normalization="tokens", power=1.0)),
    "unknown origin": ("origin", bad_field(origin="end", power=1.0)),
    "unknown normalization": ("normalization", bad_field(normalization=["batch"])),
}


@pytest.mark.parametrize("name", BAD)
@settings(max_examples=max(CASES // 20, 1))
@given(case=cases(smallest=1))
def test_what_is_wrong_is_named(name: str, case: Case) -> None:
    argument, run = BAD[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        run(case)
    assert argument in str(raised.value)
    assert "accepted: " in str(raised.value)


def test_a_weight_off_the_targets_is_ignored_whatever_it_is() -> None:
    labels, weights = torch.tensor([[IGNORE, 1]]), torch.tensor([[math.nan, 2.0]])
    total, weight_sum = weighted_cross_entropy(torch.zeros(1, 2, 3), labels, weights)
    assert total.item() == pytest.approx(2 * math.log(3))
    assert weight_sum.item() == 2


# ---- float labels


@settings(max_examples=CASES)
@given(
    st.sampled_from([(0, 3), (2, 0), (1, 1), (2, 3), (2, 3, 1), (2, 3, 2), (2, 3, 2, 2)]),
    st.sampled_from(FLOATS),
    st.sampled_from(["squared", "absolute"]),
    st.lists(st.floats(-65504, 65504, width=16), min_size=24, max_size=24),
    st.dictionaries(st.integers(0, 23), st.just(math.nan), max_size=6),
    st.dictionaries(st.integers(0, 23), st.sampled_from([math.inf, -math.inf]), max_size=1),
    st.integers(0, 99),
)
def test_errors_of_float_labels_are_those_by_hand(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    finite: list[float],
    nans: dict[int, float],
    infinite: dict[int, float],
    seed: int,
) -> None:
    values = [(nans | infinite).get(i, value) for i, value in enumerate(finite)]
    labels = torch.tensor(values[: math.prod(shape)]).reshape(shape).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    predictions, weights = torch.randn(shape, generator=generator), torch.rand(shape[:2], generator=generator)
    if labels.isinf().any():
        with pytest.raises(ValueError, match="labels hold inf; accepted: finite numbers, and NaN"):
            weighted_regression_loss(predictions, labels, weights, kind=kind)
        return
    total = scale = 0.0
    for row in range(shape[0]):
        for column in range(shape[1]):
            pairs = [
                (float(a), float(b))
                for a, b in zip(
                    predictions[row, column].reshape(-1).tolist(),
                    labels[row, column].reshape(-1).tolist(),
                    strict=True,
                )
            ]
            if not any(math.isnan(b) for _, b in pairs):
                errors = [(a - b) ** 2 if kind == "squared" else abs(a - b) for a, b in pairs]
                total += float(weights[row, column]) * sum(errors) / len(errors)
                scale += max(abs(a) + abs(b) for a, b in pairs) ** 2
    got, _ = weighted_regression_loss(predictions, labels, weights, kind=kind)
    assert abs(got.item() - total) <= 1e-5 * total + 1e-6 * scale

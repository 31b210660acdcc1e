from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_temporal import TemporalWeighting, target_positions

POWERS = [-100.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 10.0, 100.0]


def by_hand(times: list[int], power: float, normalization: str, latest: int, earliest: int) -> list[float]:
    """Weights of one document's target tokens with Python's exact integers and floats."""
    if normalization == "sequence":
        latest, earliest = max(times), min(times)
    reference = latest if power >= 0 else earliest
    raw = [float(t == reference) if math.isinf(power) else (t / reference) ** power for t in times]
    if normalization == "sequence":
        return [w * len(raw) / sum(raw) for w in raw]
    return raw


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=4),
    st.sampled_from([*POWERS, math.inf]),
    st.sampled_from(["sequence", "batch"]),
    st.booleans(),
)
def test_weights_equal_the_formula(documents: list[list[int]], power: float, normalization: str, packed: bool) -> None:
    everything = [t for times in documents for t in times]
    expected = [by_hand(times, power, normalization, max(everything), min(everything)) for times in documents]
    weighting = TemporalWeighting(power, normalization=normalization)
    if packed:
        positions = torch.tensor([everything])
        ids = torch.tensor([[index for index, times in enumerate(documents) for _ in times]])
        got = weighting.weights(positions, document_ids=ids)
        torch.testing.assert_close(
            got, torch.tensor([[weight for weights in expected for weight in weights]]), rtol=1e-5, atol=1e-30
        )
        return
    width = max(map(len, documents))
    positions = torch.tensor([times + [0] * (width - len(times)) for times in documents])
    padded = torch.tensor([weights + [0.0] * (width - len(weights)) for weights in expected])
    got = weighting.weights(positions)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, padded, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("power", [-100.0, -1.0, 0.5, 100.0, math.inf])
@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_a_million_tokens_neither_overflow_nor_vanish(power: float, normalization: str) -> None:
    positions = torch.arange(1, 1_000_001)[None]
    weights = TemporalWeighting(power, normalization=normalization).weights(positions)
    assert weights.isfinite().all()
    assert weights.sum() > 0
    if normalization == "sequence":
        assert weights.double().sum().item() == pytest.approx(1_000_000, rel=1e-5)


@pytest.mark.parametrize("power", [-1.0, 0.5, 4.0, 100.0, math.inf])
@pytest.mark.parametrize("mixture", [0.0, 0.3, 0.9, 1.0])
def test_a_mixture_of_usual_and_weighted_loss(power: float, mixture: float) -> None:
    documents = [[1, 2, 3, 4, 5], [1, 2, 3], [7]]
    expected = [
        (1 - mixture) + mixture * weight
        for times in documents
        for weight in by_hand(times, power, "sequence", max(times), min(times))
    ]
    ids = torch.tensor([[index for index, times in enumerate(documents) for _ in times]])
    positions = torch.tensor([[t for times in documents for t in times]])
    off = torch.zeros(1, 2, dtype=torch.long)
    weights = TemporalWeighting(power, mixture=mixture).weights(
        torch.cat([off, positions, off], dim=1), document_ids=torch.cat([off, ids, off + 2], dim=1)
    )
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, *expected, 0.0, 0.0]]), rtol=1e-6, atol=1e-30)


def test_every_document_keeps_its_share() -> None:
    positions = target_positions(torch.tensor([[1, 2, 3, -100], [4, 5, 6, 7]]))
    weights = TemporalWeighting(3.0).weights(positions)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([3.0, 4.0]))


def test_infinite_power_takes_the_last_token_or_every_token_of_maximal_t() -> None:
    turns = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    assert TemporalWeighting(math.inf, origin="turn").weights(turns).tolist() == [[0, 0, 2.5, 0, 0, 2.5, 0, 0]]
    rows = torch.tensor([[1, 2, 3], [1, 2, 0]])
    assert TemporalWeighting(math.inf).weights(rows).tolist() == [[0, 0, 3], [0, 2, 0]]
    assert TemporalWeighting(math.inf, normalization="batch").weights(rows).tolist() == [[0, 0, 1], [0, 0, 0]]


def test_a_turn_is_rescaled_over_its_document() -> None:
    weights = TemporalWeighting(1.0, origin="turn").weights(torch.tensor([[1, 2, 0, 1]]))
    torch.testing.assert_close(weights, torch.tensor([[0.75, 1.5, 0.0, 0.75]]))


def test_tokens_is_the_unscaled_power() -> None:
    positions = torch.tensor([[1, 2, 3, 0]])
    assert TemporalWeighting(2.0, normalization="tokens").weights(positions).tolist() == [[1, 4, 9, 0]]


@pytest.mark.parametrize(("power", "latest"), [(math.inf, 2), (10.0, 8192), (-100.0, 1_000_000)])
def test_tokens_raises_where_a_power_leaves_float32(power: float, latest: int) -> None:
    with pytest.raises(ValueError, match=f"leaves float32 at t = {latest}"):
        TemporalWeighting(power, normalization="tokens").weights(torch.tensor([[1, latest]]))


def test_rows_without_targets_weigh_nothing() -> None:
    for normalization in ("sequence", "batch", "tokens"):
        weights = TemporalWeighting(2.0, normalization=normalization).weights(torch.zeros(2, 3, dtype=torch.long))
        assert weights.tolist() == [[0, 0, 0]] * 2


def test_own_function() -> None:
    def early(t: Tensor, T: Tensor) -> Tensor:
        return (t <= T / 2).double()

    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]])
    weights = TemporalWeighting(weight_fn=early).weights(positions)
    assert weights.tolist() == [[0, 2, 2, 0, 0], [0, 0, 0, 0, 0]]
    raw = TemporalWeighting(weight_fn=early, normalization="tokens").weights(positions)
    assert raw.tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda t, _: t - 2, "weight_fn's result holds -1.0; accepted: finite numbers ≥ 0"),
        (lambda t, _: t / 0, "holds inf"),
        (lambda t, _: t[:1], r"weight_fn returned \(1,\); accepted: a tensor of shape \(3,\)"),
        (lambda *_: 1.0, "weight_fn returned float"),
    ],
)
def test_own_functions_that_go_wrong(returned: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalWeighting(weight_fn=returned).weights(torch.tensor([[1, 2, 3]]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"power": math.nan}, ValueError, "power=nan is out of range; accepted: any float but NaN and -inf"),
        ({"power": -math.inf}, ValueError, "power=-inf is out of range"),
        ({"power": "two"}, TypeError, "power='two' is not a number"),
        ({"origin": "end"}, ValueError, "origin='end' is not known; accepted: 'target'"),
        ({"normalization": "mean"}, ValueError, "normalization='mean' is not known; accepted: 'sequence'"),
        ({"regression_loss": "huber"}, ValueError, "regression_loss='huber' is not known; accepted: 'squared'"),
        ({"weight_fn": 3}, TypeError, "weight_fn=3 is not callable"),
        ({"mixture": 1.5}, ValueError, "mixture=1.5 is out of range; accepted: 0 to 1"),
        ({"mixture": math.nan}, ValueError, "mixture=nan is out of range"),
        ({"mixture": "half"}, TypeError, "mixture='half' is not a number"),
        (
            {"mixture": 0.5, "normalization": "tokens"},
            ValueError,
            "mixture=0.5 with normalization='tokens'.*accepted: normalization='sequence', or mixture=1",
        ),
    ],
)
def test_bad_fields(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TemporalWeighting(**fields)  # type: ignore[arg-type]


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        TemporalWeighting().power = 2.0  # type: ignore[misc]


def test_saved_and_read_back(tmp_path: Path) -> None:
    weighting = TemporalWeighting(math.inf, origin="turn", normalization="batch", regression_loss="absolute")
    weighting.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "temporal_weighting.json").read_text())["power"] == "inf"
    assert TemporalWeighting.from_pretrained(tmp_path) == weighting


def test_what_a_file_cannot_hold() -> None:
    fields = TemporalWeighting(weight_fn=torch.minimum).to_dict()
    with pytest.raises(ValueError, match=r"weight_fn='.*minimum' is only a name"):
        TemporalWeighting.from_dict(fields)
    with pytest.raises(ValueError, match="exponent: unknown; accepted: "):
        TemporalWeighting.from_dict({"exponent": 1})

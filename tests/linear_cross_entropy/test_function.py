from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from hf_temporal.linear_cross_entropy import block_head
from hf_temporal.linear_cross_entropy.function import (
    weighted_linear_cross_entropy,
    weighted_linear_cross_entropy_terms,
)
from tests.linear_cross_entropy.head_problems import TOLERANCE, Problem, largest_error, make_problem, relative_error

pytestmark = pytest.mark.usefixtures("sixteen_bits_are_native")

problems = st.builds(
    make_problem,
    N=st.integers(0, 23),
    V=st.integers(2, 70),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.3, 0.75, 1.0]),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1.0, 50.0]),
    logit_scale=st.sampled_from([1.0, 0.0625, 3.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    chunk_size=st.sampled_from([1, 2, 5, 7, 1000, None]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)


@given(
    problem=problems,
    smallest_block=st.sampled_from([1, 3, 16, 128]),
    span=st.integers(1, 3),
    piece=st.sampled_from([2, 30]),
)
def test_equals_the_float64_reference(problem: Problem, smallest_block: int, span: int, piece: int) -> None:
    with mock.patch.multiple(block_head, BLOCK_LOGITS=1, SMALLEST_BLOCK=smallest_block, SPAN=span, PIECE=piece):
        assert largest_error(problem, problem.exact()) < TOLERANCE[problem.tensors[0].dtype]


@given(problem=problems)
def test_16_bits_that_would_be_emulated_run_in_float32(problem: Problem) -> None:
    with mock.patch.object(torch.cpu, "get_capabilities", create=True, return_value={"avx2": True}):
        assert largest_error(problem, problem.exact()) < TOLERANCE[problem.tensors[0].dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_the_tolerance_would_show_a_wrong_weight_target_or_position(dtype: torch.dtype, seed: int) -> None:
    problem = make_problem(dtype=dtype, seed=seed, masked=0.2)
    right = problem.exact()
    first = right.weights[(right.targets != -100) & (right.weights != 0)][0]
    wrong = [
        replace(right, weights=first.expand(len(right.weights))),
        replace(right, weights=right.weights.roll(1)),
        replace(right, targets=right.targets.roll(1)),
        replace(right, targets=torch.where(right.targets > 0, right.targets - 1, right.targets)),
    ]
    tolerance = TOLERANCE[dtype]
    assert largest_error(problem, right) < tolerance
    assert all(largest_error(problem, other) > 4 * tolerance for other in wrong)


def test_label_smoothing_is_that_of_transformers() -> None:
    problem = make_problem(label_smoothing=0.1, masked=0.3)
    problem = replace(problem, weights=torch.ones(len(problem.targets)))
    logits = problem.tensors[0] @ problem.tensors[1].T
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, problem.targets, num_items_in_batch=1)
    torch.testing.assert_close(problem.loss(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_multiplied_by_whatever_follows(dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, bias=True)
    exact = problem.exact()
    ((problem.loss() * 3 + problem.tensors[0].float().square().sum()) / 7).backward()
    ((exact.reference() * 3 + exact.tensors[0].square().sum()) / 7).backward()
    for leaf, expected in zip(problem.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, expected.grad) < TOLERANCE[dtype]


def test_a_large_grad_output_does_not_overflow_float16() -> None:
    problem = make_problem(dtype=torch.float16)
    problem = replace(problem, weights=problem.weights * 1e6)
    exact = problem.exact()
    (problem.loss() * 2.0**17 / 2e11).backward()
    (exact.reference() * 2.0**17 / 2e11).backward()
    for leaf, expected in zip(problem.leaves, exact.leaves, strict=True):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert relative_error(leaf.grad, expected.grad) < 5e-3


def test_the_loss_of_the_weights_is_their_gradient() -> None:
    problem = make_problem()
    weights = problem.weights.requires_grad_()
    (2 * problem.loss()).backward()
    z = problem.tensors[0].detach() @ problem.tensors[1].detach().T
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, 2 * F.cross_entropy(z, problem.targets, reduction="none"))


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen: int) -> None:
    problem = make_problem(widths=(8, 2))
    expected = torch.autograd.grad(problem.loss(), problem.tensors)
    problem.tensors[frozen].requires_grad_(False)
    problem.loss().backward()
    for i, (tensor, gradient) in enumerate(zip(problem.tensors, expected, strict=True)):
        if i == frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)


def test_frozen_head_makes_nothing_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def record(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(tensor: Tensor, **options: Any) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return make(tensor, **options)

        return recorded

    monkeypatch.setattr(torch, "zeros_like", record(torch.zeros_like))
    monkeypatch.setattr(torch, "empty_like", record(torch.empty_like))
    problem = make_problem(N=5, V=31, widths=(8, 2))
    problem.tensors[1].requires_grad_(False)
    problem.loss().backward()
    assert sorted(shape for shape in shapes if len(shape) == 2) == [(5, 2), (5, 8), (31, 2)]


def test_only_target_positions_of_nonzero_weight_meet_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    losses = block_head.BlockHead.losses

    def recorded(head: Any, xs: Any, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert len(xs[0]) == len(y)
        rows.append(len(y))
        return losses(head, xs, y, *args, **kwargs)

    monkeypatch.setattr(block_head.BlockHead, "losses", recorded)
    problem = make_problem(N=29, masked=0.5, chunk_size=4)
    met = int(((problem.targets != -100) & (problem.weights != 0)).sum())
    problem.loss().backward()
    assert sum(rows) == met < 29
    assert max(rows) == 4


def test_no_grad_makes_no_gradients_and_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(bias=True)
    expected = problem.loss()
    monkeypatch.setattr(block_head.BlockHead, "_gradient", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        loss = problem.loss()
    assert not loss.requires_grad
    assert loss == expected


def test_given_positions_spare_looking_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of weight 0 may be among them, without a target too, whatever the head gives there."""
    problem = make_problem(N=29, masked=0.5, chunk_size=4, bias=True)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias[0] = -torch.inf
        problem.targets[problem.targets == 0] = 1
    expected = torch.autograd.grad(loss := problem.loss(), problem.leaves)
    positions = ((problem.targets != -100) & (problem.weights != 0)).nonzero().squeeze(1)
    nothing = ((problem.weights == 0) | (problem.targets == -100)).nonzero().squeeze(1)[:3]
    problem.weights[nothing] = 0
    monkeypatch.setattr(Tensor, "nonzero", lambda _: pytest.fail("waits for the device"))
    given = problem.loss(positions=torch.cat([positions, nothing]).flip(0))
    torch.testing.assert_close(given, loss)
    for got, right in zip(torch.autograd.grad(given, problem.leaves), expected, strict=True):
        torch.testing.assert_close(got, right)


def test_returns_a_scalar_of_float32() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loss = make_problem(dtype=dtype).loss()
        assert loss.shape == ()
        assert loss.dtype == torch.float32


def test_hidden_may_be_any_view() -> None:
    problem = make_problem(N=6)
    wide = torch.randn(8, 12)[:, ::2].T.requires_grad_()
    assert not wide.is_contiguous()
    view = replace(problem, tensors=[wide, problem.tensors[1]])
    assert largest_error(view, view.exact()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("N", "masked"), [(0, 0.0), (7, 1.0)])
def test_without_a_target_loss_and_gradients_are_zero(N: int, masked: float) -> None:
    problem = make_problem(N=N, masked=masked, bias=True)
    loss = problem.loss()
    loss.backward()
    assert loss == 0
    for leaf in problem.leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("trainable", [False, True])
def test_weights_that_are_all_zero_give_zero(trainable: bool) -> None:
    problem = make_problem()
    problem = replace(problem, weights=torch.zeros(len(problem.targets), requires_grad=trainable))
    loss = problem.loss()
    loss.backward()
    assert loss == 0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.leaves)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_products_in_bfloat16_and_keeps_float32_gradients(hidden_dtype: torch.dtype) -> None:
    problem = make_problem(N=40, V=50, chunk_size=7)
    hidden, weight = problem.tensors
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    problem = replace(problem, tensors=[hidden, weight])
    rounded = replace(problem, tensors=[t.detach().bfloat16().requires_grad_() for t in problem.tensors])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = problem.loss()
    loss.backward()
    same = rounded.loss()
    same.backward()
    assert loss.dtype == torch.float32
    assert loss == same
    assert hidden.grad is not None
    assert hidden.grad.dtype == hidden_dtype
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert rounded.tensors[1].grad is not None
    assert torch.equal(weight.grad.bfloat16(), rounded.tensors[1].grad)
    exact = problem.exact()
    assert largest_error(replace(problem, tensors=rounded.tensors), exact) < TOLERANCE[torch.bfloat16]


def test_autocast_does_not_round_the_gradient_of_the_bias() -> None:
    problem = make_problem(N=40, V=50, chunk_size=7, bias=True)
    assert problem.bias is not None
    rounded = replace(problem, tensors=[t.detach().bfloat16().requires_grad_() for t in problem.tensors])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(problem.loss(), [problem.bias])
    (expected,) = torch.autograd.grad(rounded.loss(), [problem.bias])
    assert torch.equal(gradient, expected)


def test_autocast_does_not_touch_float64() -> None:
    problem = make_problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = largest_error(problem, problem.exact())
    assert error < TOLERANCE[torch.float64]


def test_head_gradient_of_bfloat16_is_accumulated_in_float32() -> None:
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = weighted_linear_cross_entropy(
        hidden, weight, torch.zeros(4096, dtype=torch.long), torch.ones(4096), chunk_size=1
    )
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


def test_terms_of_different_dtypes() -> None:
    problem = make_problem(N=20, widths=(8, 2))
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    mixed = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(problem.tensors, dtypes, strict=True)]
    problem = replace(problem, tensors=mixed)
    assert largest_error(problem, problem.exact()) < TOLERANCE[torch.bfloat16]
    loss = problem.loss()
    assert [gradient.dtype for gradient in torch.autograd.grad(loss, mixed)] == dtypes


def test_two_terms_are_a_low_rank_adapter_on_the_head() -> None:
    hidden, base = make_problem(N=11, V=31, widths=(8,)).tensors
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(31, 2, requires_grad=True)
    problem = make_problem(N=11, V=31)
    base.requires_grad_(False)
    loss = weighted_linear_cross_entropy_terms(
        [(hidden, base), (hidden @ a.T, 0.5 * b)], problem.targets, problem.weights, chunk_size=3
    )
    merged = weighted_linear_cross_entropy(hidden, base + 0.5 * b @ a, problem.targets, problem.weights)
    torch.testing.assert_close(loss, merged)
    for got, expected in zip(
        torch.autograd.grad(loss, [hidden, a, b]), torch.autograd.grad(merged, [hidden, a, b]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_second_backward_is_refused() -> None:
    problem = make_problem()
    loss = problem.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass.*call it again instead of using retain_graph=True"):
        loss.backward()


def test_gradient_of_a_gradient_is_refused() -> None:
    problem = make_problem()
    with pytest.raises(RuntimeError, match="cannot be differentiated again, create_graph=True"):
        torch.autograd.grad(problem.loss(), problem.tensors, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, r"softcap=0.0 is out of range; accepted: 0 < softcap < ∞, or None"),
        ({"softcap": float("inf")}, r"softcap=inf is out of range"),
        ({"softcap": float("nan")}, r"softcap=nan is out of range"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is out of range; accepted: 0 ≤ label_smoothing < 1"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 is out of range"),
        ({"chunk_size": 0}, r"chunk_size=0 is out of range; accepted: an integer ≥ 1, or None"),
        ({"chunk_size": 2.5}, r"chunk_size=2.5 is out of range"),
        (
            {"hidden": torch.zeros(2, 3, 4)},
            r"hidden has shape \(2, 3, 4\) and head_weight \(5, 4\); accepted: \[N, H\]",
        ),
        ({"head_weight": torch.zeros(5, 3)}, r"hidden has shape \(6, 4\) and head_weight \(5, 3\); accepted"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"targets have shape \(5,\) and .*; accepted: .* \(6,\)"),
        ({"targets": torch.zeros(6)}, r"targets have shape \(6,\) and dtype torch.float32; accepted: integers"),
        ({"targets": torch.full((6,), 5)}, r"hold 5; accepted: token ids from 0 to 4"),
        ({"targets": torch.full((6,), -1)}, r"hold -1; accepted: token ids from 0 to 4"),
        ({"weights": torch.ones(6, 1)}, r"weights have shape \(6, 1\); accepted: \(6,\)"),
        ({"bias": torch.ones(1, 5)}, r"bias has shape \(1, 5\); accepted: \(5,\)"),
    ],
)
def test_errors_name_argument_value_and_what_is_accepted(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(6, 4),
        "head_weight": torch.zeros(5, 4),
        "targets": torch.zeros(6, dtype=torch.long),
        "weights": torch.ones(6),
    }
    weighted_linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=message):
        weighted_linear_cross_entropy(**{**arguments, **change})


def test_terms_that_do_not_fit_the_first_one() -> None:
    first = (torch.zeros(6, 4), torch.zeros(5, 4))
    targets, weights = torch.zeros(6, dtype=torch.long), torch.ones(6)
    for other in [(torch.zeros(7, 2), torch.zeros(5, 2)), (torch.zeros(6, 2), torch.zeros(9, 2))]:
        with pytest.raises(ValueError, match=r"terms hold .*; accepted: \[6, H_i\] and \[5, H_i\]"):
            weighted_linear_cross_entropy_terms([first, other], targets, weights)

"""A kernel is compared with PyTorch before it is used; one that is wrong is told of once, and not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal.linear_cross_entropy import kernel_trial, triton_kernel
from hf_temporal.linear_cross_entropy.head import Term
from tests.linear_cross_entropy.head_problems import TOLERANCE, Problem, largest_error, make_problem
from tests.linear_cross_entropy.kernel_problems import DEVICE, OPTIONS, logits, needs_kernel

Kernel = Callable[..., Tensor]
CALLS = 2 * -(-kernel_trial.ROWS // kernel_trial.CHUNK)  # of the kernel in a trial, with gradients and without
V = 300
interpreted = triton_kernel.losses_and_gradient_


def in_pytorch(z: Tensor, targets: Tensor, weights: Tensor, *, with_gradient: bool = True, **options: Any) -> Tensor:
    """What the kernel does."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        targets, weights, leaf = targets.clone(), weights.clone(), z.clone().float().requires_grad_()
        bias = options.pop("bias")
        options["bias"] = None if bias is None else bias.clone()
        smoothing = options.pop("label_smoothing")
        losses = F.cross_entropy(logits(leaf, options), targets, reduction="none", label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(losses @ weights, leaf)
    if with_gradient:
        z.copy_(gradient)
    return losses.detach()


def use(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Mock:
    counted = Mock(side_effect=kernel)
    monkeypatch.setattr(triton_kernel, "is_available", lambda _: True)
    monkeypatch.setattr(triton_kernel, "losses_and_gradient_", counted)
    return counted


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "FAULTS", {})
    monkeypatch.setattr(triton_kernel, "BLOCK", 64)
    monkeypatch.setattr(triton_kernel, "ADDS_16_BITS_TO_32", DEVICE == "cuda")
    monkeypatch.setattr(triton_kernel, "row_chunk_size", lambda *_, **__: 128)


def problem(**options: Any) -> Problem:
    given = {"bias": True, "softcap": 30.0, "label_smoothing": 0.1, "logit_scale": 0.5, **options}
    return make_problem(N=40, V=V, widths=(16,), **given)


def is_right(problem: Problem) -> bool:
    return largest_error(problem, problem.exact()) < TOLERANCE[torch.float32]


def lower_loss(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, *args, **options) * 0.99


def lower_loss_in_evaluation(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, *args, **options) * (1 if options["with_gradient"] else 0.99)


def one_row_twice(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    losses = in_pytorch(z, *args, **options)
    losses[1:2] = losses[:1]
    return losses


def too_large(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    losses = in_pytorch(z, *args, **options)
    z *= 1.05
    return losses


def a_block_left_out(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    losses = in_pytorch(z, *args, **options)
    z[:, 130:190] = 0
    return losses


def last_words_left_out(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    losses = in_pytorch(z, *args, **options)
    z[:, -3:] = 0
    return losses


def not_a_number(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    losses = in_pytorch(z, *args, **options)
    z[0, 17] = torch.nan
    return losses


def unweighted(z: Tensor, targets: Tensor, weights: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, targets, torch.ones_like(weights), **options)


def without_bias(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, *args, **{**options, "bias": None})


def without_cap(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, *args, **{**options, "softcap": None})


def without_smoothing(z: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return in_pytorch(z, *args, **{**options, "label_smoothing": 0.0})


def unbuilt(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no C compiler")


BROKEN = {
    lower_loss: "gives .* in the loss, where PyTorch gives",
    lower_loss_in_evaluation: "gives .* in the loss without gradients, where PyTorch gives",
    one_row_twice: "gives .* in the loss, where",
    too_large: "gives .* in the gradient of head weight 0, where PyTorch gives .*; accepted: a difference of up to",
    a_block_left_out: "gives 0 in the gradient of head weight 0, where",
    last_words_left_out: "gives 0 in the gradient of head weight 0, where",
    not_a_number: "gives nan in the gradient of",
    unweighted: "gives .* in the gradient of head weight 0, where",
    without_bias: "gives .* in the loss",
    without_cap: "gives .* in the loss",
    without_smoothing: "gives .* in the loss",
    unbuilt: "failed: no C compiler",
}


@pytest.mark.parametrize("kernel", BROKEN, ids=lambda kernel: kernel.__name__)
def test_a_broken_kernel_is_told_of_once_and_not_used(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(kernel, monkeypatch)
    with pytest.warns(UserWarning, match=f"runs without Triton, which is installed but {BROKEN[kernel]}") as caught:
        assert is_right(problem())
    assert len(caught) == 1
    calls = counted.call_count
    assert is_right(problem())
    assert is_right(problem(bias=False))
    assert counted.call_count == calls


@pytest.mark.parametrize("widths", [(16,), (5, 16, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_right_kernel_is_tried_once_and_used(
    options: dict[str, Any], widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = use(in_pytorch, monkeypatch)
    first = make_problem(N=40, V=V, widths=widths, **options)
    generated = torch.get_rng_state()
    first.loss()
    assert torch.equal(torch.get_rng_state(), generated)
    assert counted.call_count == CALLS + 1
    assert is_right(first)
    with torch.inference_mode():
        make_problem(N=4, V=V, widths=widths, seed=1, **options).loss()
    assert counted.call_count == CALLS + 3
    make_problem(N=40, V=V + 1, widths=widths, **options).loss()
    assert counted.call_count == 2 * CALLS + 4


def test_a_kind_that_fails_ends_the_use_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(without_smoothing, monkeypatch)
    plain = problem(label_smoothing=0.0)
    plain.loss()
    assert counted.call_count == CALLS + 1
    with pytest.warns(UserWarning, match="in the loss"):
        problem().loss()
    calls = counted.call_count
    assert is_right(plain)
    assert counted.call_count == calls


def test_within_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(in_pytorch, monkeypatch)
    with torch.inference_mode():
        problem().loss()
    assert counted.call_count == CALLS + 1


def test_want_of_memory_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Mock(side_effect=torch.OutOfMemoryError("of 2 GiB")), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="of 2 GiB"):
        problem().loss()
    assert not kernel_trial.FAULTS


def test_no_trial_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = use(in_pytorch, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert is_right(problem())
        assert not counted.called
    problem().loss()
    assert counted.call_count == CALLS + 1


def test_a_head_that_is_not_finite_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    use(in_pytorch, monkeypatch)
    broken = problem()
    with torch.no_grad():
        broken.tensors[1][3] = torch.nan
    broken.loss()


@pytest.mark.parametrize("kernel", [in_pytorch, pytest.param(interpreted, marks=needs_kernel)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("words", "block", "size"), [(50_257, 16_384, 0.02), (1100, 256, 0.02), (1100, 256, 0.0)])
def test_rounding_is_no_fault(
    words: int,
    block: int,
    size: float,
    options: dict[str, Any],
    stored: torch.dtype,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every dtype, of a vocabulary of several blocks and a remainder, and of a head that is all zeros."""
    use(kernel, monkeypatch)
    monkeypatch.setattr(triton_kernel, "BLOCK", block)
    torch.manual_seed(0)
    term = Term(torch.randn(words, 16).mul(size).to(DEVICE, stored), stored, needs_grad_x=True, grad_dtype=None)
    settings = {"logit_scale": 1 / 16, "softcap": None, "label_smoothing": 0.0, **options}
    bias = torch.randn(words).to(DEVICE, stored) if settings.pop("bias", False) else None
    assert kernel_trial.is_trusted([term], bias, exact=torch.float32, stored=stored, **settings)

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal.linear_cross_entropy import block_head
from hf_temporal.linear_cross_entropy import head as head_chunk
from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy
from tests.linear_cross_entropy.head_problems import TOLERANCE, largest_error, make_problem

pytestmark = pytest.mark.usefixtures("sixteen_bits_are_native")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, [torch.bfloat16, torch.float32]),
        ({"amx_bf16": True, "amx_fp16": True}, [torch.bfloat16, torch.float16]),
        ({"avx512_f": True, "avx512_bf16": False}, [torch.float32, torch.float32]),
    ],
)
def test_the_products_dtype_follows_the_processor(
    capabilities: dict[str, bool], expected: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert [head_chunk.product_dtype(dtype, "cpu") for dtype in (torch.bfloat16, torch.float16)] == expected
    assert head_chunk.product_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert head_chunk.product_dtype(torch.float64, "cpu") == torch.float64


@pytest.mark.parametrize(
    ("vocabulary", "itemsize", "width", "expected"),
    [(49_152, 4, 4096, 160), (49_152, 2, 2047, 384), (128_256, 2, 2048, 288), (1024, 2, 2048, 8192)],
)
def test_chunk_size_on_cpus(vocabulary: int, itemsize: int, width: int, expected: int) -> None:
    size = block_head.block_chunk_size(vocabulary, itemsize, "cpu", width=width, positions=50_000, summed=0)
    assert size == expected


@pytest.mark.parametrize(
    ("itemsize", "positions", "summed", "expected"),
    [
        (2, 768, 576, 384),
        (2, 769, 576, 385),
        (2, 2874, 576, 1437),
        (2, 2875, 576, 384),
        (4, 1420, 576, 710),
        (4, 1421, 576, 160),
        (2, 769, 0, 384),
    ],
)
def test_two_chunks_where_they_take_less_memory_than_sums(
    itemsize: int, positions: int, summed: int, expected: int
) -> None:
    size = block_head.block_chunk_size(49_152, itemsize, "cpu", width=576, positions=positions, summed=summed)
    assert size == expected


@pytest.mark.parametrize(
    ("dtype", "trained", "expected"),
    [
        (torch.bfloat16, [0, 1, 2, 3], [15, 14]),
        (torch.bfloat16, [1], [15, 14]),
        (torch.bfloat16, [0, 2], [4, 4, 4, 4, 4, 4, 4, 1]),
        (torch.float32, [0, 1, 2, 3], [4, 4, 4, 4, 4, 4, 4, 1]),
    ],
)
def test_only_16_bit_heads_that_train_take_larger_chunks(
    dtype: torch.dtype, trained: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_head, "SMALL_LOGITS", 0)
    monkeypatch.setattr(block_head, "LOGIT_BYTES", 16)
    monkeypatch.setattr(block_head, "LOGIT_BYTES_16_BITS", 8)
    chunks: list[int] = []
    losses = block_head.BlockHead.losses

    def recorded(head: Any, xs: Any, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        chunks.append(len(y))
        has_sums = [term.sums is not None for term in head.terms]
        assert has_sums == [False, False]
        return losses(head, xs, y, *args, **kwargs)

    monkeypatch.setattr(block_head.BlockHead, "losses", recorded)
    problem = make_problem(N=29, V=200, widths=(16, 2), dtype=dtype, masked=0.0)
    problem = replace(problem, weights=problem.weights + 1)
    for i, tensor in enumerate(problem.tensors):
        tensor.requires_grad_(i in trained)
    problem.loss()
    assert chunks == expected


@pytest.fixture
def blocks_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_head, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(block_head, "SMALLEST_BLOCK", 8)


@pytest.mark.usefixtures("blocks_of_8")
@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
@pytest.mark.parametrize("jump", [0, 1, 2])
def test_logits_of_any_size_in_any_block(shift: float, jump: int) -> None:
    """Sums of exp(l) that leave float32, blocks far above those before, and a target far below the largest logit."""
    problem = make_problem(N=6, V=24, bias=True, masked=0.0)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias.add_(shift)
        problem.bias[8 * jump : 8 * jump + 8].add_(150)
    problem.targets[:3] = torch.tensor([0, 9, 17])
    assert largest_error(problem, problem.exact()) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("blocks_of_8")
@pytest.mark.parametrize("jump", [6.0, 12.0, 25.0, 60.0])
def test_a_float16_head_with_a_float32_adapter_when_the_bound_rises(jump: float) -> None:
    """Gradients of float16 products are of the probabilities, not of exp(l − m) of an earlier block's m."""
    problem = make_problem(N=6, V=24, widths=(8, 2), bias=True, masked=0.0)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias[16:].add_(jump)
    problem.targets[:3] = torch.tensor([0, 9, 17])
    hidden, weight = (tensor.detach().half().requires_grad_() for tensor in problem.tensors[:2])
    problem = replace(problem, tensors=[hidden, weight, *problem.tensors[2:]])
    assert largest_error(problem, problem.exact()) < TOLERANCE[torch.float16]


@pytest.mark.usefixtures("blocks_of_8")
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_sums_out_of_range_are_noticed_in_the_first_block(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(N=6, V=80, bias=True, masked=0.0)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias.add_(shift)
    scaled = block_head.BlockHead._scaled
    made = mock.Mock(side_effect=scaled)
    monkeypatch.setattr(block_head.BlockHead, "_scaled", lambda *args: made(*args))
    assert largest_error(problem, problem.exact()) < TOLERANCE[torch.float32]
    assert made.call_count == 1 + 10


def test_a_sure_target_keeps_the_digits_of_1_minus_p_in_bfloat16() -> None:
    """Logits (l, 0, 0): 1 − p = 2 / (eˡ + 2), and the 2 is the difference of two numbers of the size of eˡ."""
    for logit in torch.arange(8, 13, 0.0625):
        weight = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
        hidden = logit.bfloat16().view(1, 1)
        weighted_linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1)).backward()
        assert weight.grad is not None
        exact = -logit.double() * 2 / (logit.double().exp() + 2)
        torch.testing.assert_close(weight.grad[0, 0].double(), exact, rtol=2**-8, atol=0)


def test_gradients_in_bfloat16_err_no_more_than_twice_those_of_full_logits() -> None:
    """With sure and unsure predictions: 1 − p has to keep its digits where p is nearly 1."""
    problem = make_problem(N=400, V=900, widths=(64,), dtype=torch.bfloat16, masked=0.2, size=3.0, chunk_size=64)
    with torch.no_grad():
        hidden, head = problem.tensors
        rows = (problem.targets != -100).nonzero().squeeze(1)[::2]
        hidden[rows] += 8 * head[problem.targets[rows]]
    exact = problem.exact()
    expected = torch.autograd.grad(exact.reference(), exact.tensors)
    z = (problem.tensors[0] @ problem.tensors[1].T).float()
    losses = F.cross_entropy(z, problem.targets, reduction="none")
    full = torch.autograd.grad((problem.weights * losses).sum(), problem.tensors)
    ours = torch.autograd.grad(problem.loss(), problem.tensors)
    for right, theirs, got in zip(expected, full, ours, strict=True):
        assert (got.double() - right).norm() < 2 * (theirs.double() - right).norm()

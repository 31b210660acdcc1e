"""What stands around the Triton kernel: its matrix products, the size of a chunk, and the whole function with it."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal import weighted_linear_cross_entropy
from hf_temporal.linear_cross_entropy import triton_kernel
from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms
from hf_temporal.linear_cross_entropy.triton_kernel import (
    add_product_,
    is_available,
    losses_and_gradient_,
    row_chunk_size,
)
from tests.linear_cross_entropy.kernel_problems import DEVICE, OPTIONS, logits, needs_gpu, needs_kernel


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "BLOCK", 64)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_add_product_of_one_dtype(beta: float) -> None:
    a, b, accumulator = torch.randn(7, 3), torch.randn(3, 5), torch.randn(7, 5)
    expected = beta * accumulator + a @ b
    if beta == 0:
        accumulator.fill_(torch.nan)
    add_product_(accumulator, a, b, beta=beta)
    torch.testing.assert_close(accumulator, expected)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "accumulated"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_add_product_to_yet_another_dtype(dtype: torch.dtype, accumulated: torch.dtype, beta: float) -> None:
    a, b, accumulator = torch.randn(7, 3).to(dtype), torch.randn(3, 5).to(dtype), torch.randn(7, 5).to(accumulated)
    expected = beta * accumulator.double() + a.double() @ b.double()
    if beta == 0:
        accumulator.fill_(torch.nan)
    add_product_(accumulator, a, b, beta=beta)
    assert accumulator.dtype == accumulated
    assert float((accumulator.double() - expected).abs().max() / expected.abs().max()) < 2**-7


def test_a_16_bit_product_is_added_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuBLAS would; there is no such product on the CPU."""

    def addmm(first: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, beta: float, out: Tensor) -> Tensor:
        assert out is first
        return out.copy_(beta * first + torch.mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(triton_kernel, "ADDS_16_BITS_TO_32", True)
    monkeypatch.setattr(torch, "addmm", addmm)
    a, b, accumulator = torch.randn(3, 7).bfloat16(), torch.randn(3, 5).bfloat16(), torch.randn(7, 5)
    expected = accumulator + a.float().T @ b.float()
    add_product_(accumulator, a.T, b)
    torch.testing.assert_close(accumulator, expected)


def test_a_16_bit_product_is_not_rounded_where_torch_cannot_add_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "ADDS_16_BITS_TO_32", False)
    a, b, accumulator = torch.randn(3, 7).bfloat16(), torch.randn(3, 5).bfloat16(), torch.randn(7, 5)
    expected = accumulator + a.float().T @ b.float()
    add_product_(accumulator, a.T, b)
    torch.testing.assert_close(accumulator, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_product_on_the_gpu(dtype: torch.dtype) -> None:
    V, n, H = 65_536, 512, 1024
    a, b = torch.randn(n, V, device=DEVICE).to(dtype), torch.randn(n, H, device=DEVICE).to(dtype)
    accumulator = torch.full((V, H), torch.nan, device=DEVICE)
    add_product_(accumulator, a.T, b, beta=0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    add_product_(accumulator, a.T, b)
    assert torch.cuda.max_memory_allocated() - before < accumulator.nbytes / 4
    expected = 2 * (a[:, :1000].double().T @ b.double())
    assert float((accumulator[:1000] - expected).abs().max() / expected.abs().max()) < 1e-5


GIB = 2**30


@pytest.mark.parametrize(
    ("vocabulary", "itemsize", "width", "free", "expected"),
    [
        (248_320, 2, 2048, 70 * GIB, 2048),
        (151_936, 2, 4096, 70 * GIB, 4096),
        (151_936, 2, 16_384, 70 * GIB, 4096),
        (151_936, 2, 3000, 70 * GIB, 2944),
        (49_152, 2, 576, 70 * GIB, 2048),
        (49_152, 2, None, 70 * GIB, 2048),
        (248_320, 2, 2048, 2 * GIB, 1024),
        (248_320, 4, 2048, 2 * GIB, 512),
        (248_320, 2, 2048, 0, 128),
    ],
)
def test_chunk_size(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, itemsize: int, width: int | None, free: int, expected: int
) -> None:
    for name, value in (
        ("mem_get_info", (free * 3 // 4, 80 * GIB)),
        ("memory_reserved", 5 * GIB + free // 4),
        ("memory_allocated", 5 * GIB),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert row_chunk_size(vocabulary, itemsize, torch.device("cuda", 0), width=width) == expected


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_whole_function(options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twice the error of full logits in the same dtype, or what float32 rounds."""
    if DEVICE == "cpu":
        N, H, V, chunk_size = 40, 8, 150, 16
        monkeypatch.setattr(triton_kernel, "is_available", lambda _: True)
    else:
        N, H, V, chunk_size = 700, 64, 33_001, 256
        assert is_available(torch.device(DEVICE))
    kernel = Mock(wraps=losses_and_gradient_)
    monkeypatch.setattr(triton_kernel, "losses_and_gradient_", kernel)
    torch.manual_seed(0)
    hidden, head = torch.randn(N, H, device=DEVICE, dtype=dtype), torch.randn(V, H, device=DEVICE, dtype=dtype) / 8
    weights = torch.rand(N, device=DEVICE) + 0.1
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[::7] = -100
    options = dict(options)
    leaves = [hidden, head]
    if options.pop("bias", False):
        leaves.append(torch.randn(V, device=DEVICE, dtype=dtype))

    def full(dtype: torch.dtype) -> list[Tensor]:
        x, W, *b = copies = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        z = logits((x @ W.T).to(torch.promote_types(dtype, torch.float32)), {**options, "bias": b[0] if b else None})
        losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
        loss = (losses * weights).sum()
        return [loss.detach(), *torch.autograd.grad(loss, copies)]

    x, W, *b = copies = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = weighted_linear_cross_entropy(
        x, W, targets, weights, bias=b[0] if b else None, chunk_size=chunk_size, **options
    )
    ours = [loss.detach(), *torch.autograd.grad(loss, copies)]
    assert kernel.called
    for got, usual, exact in zip(ours, full(dtype), full(torch.float64), strict=True):
        size = float(exact.abs().max())
        error, allowed = (float((value - exact).abs().max()) / size for value in (got, usual))
        assert error <= 2 * allowed + 3e-6


@needs_kernel
@pytest.mark.parametrize("chunk_size", [40, 20, 13])
def test_matrices_of_another_dtype_than_their_products(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 head met by float32 hidden states, and a second term: one, two and four chunks."""
    monkeypatch.setattr(triton_kernel, "is_available", lambda _: True)
    torch.manual_seed(0)
    leaves = [torch.randn(shape, device=DEVICE) / 4 for shape in ((40, 8), (150, 8), (40, 2), (150, 2))]
    leaves[1] = leaves[1].bfloat16()
    targets, weights = torch.randint(150, (40,), device=DEVICE), torch.rand(40, device=DEVICE) + 0.1
    x, W, y, U = ours = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = weighted_linear_cross_entropy_terms([(x, W), (y, U)], targets, weights, chunk_size=chunk_size)
    x64, W64, y64, U64 = exact = [leaf.double().requires_grad_() for leaf in leaves]
    expected = (F.cross_entropy(x64 @ W64.T + y64 @ U64.T, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    gradients = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact), strict=True)
    for leaf, (got, right) in zip(leaves, gradients, strict=True):
        tolerance = 2**-7 if leaf.dtype == torch.bfloat16 else 3e-6
        assert got.dtype == leaf.dtype
        assert float((got.double() - right).abs().max() / right.abs().max()) < tolerance

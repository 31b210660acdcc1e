"""The parts of the fused head that run on CUDA, against float64 autograd.

The kernel runs on a GPU or, where there is none, in Triton's interpreter. The suite does the latter by itself, in a
process of its own, wherever Triton can be imported; by hand, after `pip install triton`:

    TRITON_INTERPRET=1 python -m pytest tests/linear_cross_entropy/test_triton_kernel.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from packaging.version import Version
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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="the kernel needs Triton, and a GPU or its interpreter",
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

ALL: dict[str, Any] = {"bias": True, "logit_scale": 0.7, "softcap": 3.0, "label_smoothing": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, **{name: {name: value} for name, value in ALL.items()}, "all": ALL}


@dataclass(frozen=True)
class Problem:
    """z [n, V] with the other arguments of `losses_and_gradient_`."""

    z: Tensor
    targets: Tensor
    weights: Tensor
    options: dict[str, Any]

    def reference(self) -> tuple[Tensor, Tensor]:
        """Losses, and the gradient of their weighted sum, in float64."""
        z = self.z.double().requires_grad_()
        losses = F.cross_entropy(
            logits(z, self.options),
            self.targets,
            reduction="none",
            label_smoothing=self.options.get("label_smoothing", 0.0),
        )
        (gradient,) = torch.autograd.grad((self.weights.double() * losses).sum(), z)
        return losses.detach(), gradient


def logits(z: Tensor, options: dict[str, Any]) -> Tensor:
    bias, cap = options.get("bias"), options.get("softcap")
    z = options.get("logit_scale", 1.0) * (z if bias is None else z + bias.to(z.dtype))
    return z if cap is None else cap * torch.tanh(z / cap)


def make_problem(
    V: int = 130, n: int = 5, dtype: torch.dtype = torch.float32, *, spread: float = 3.0, **options: Any
) -> Problem:
    generator = torch.Generator().manual_seed(V)
    z = (torch.randn(n, V, generator=generator) * spread).to(DEVICE, dtype)
    targets = torch.randint(V, (n,), generator=generator).to(DEVICE)
    weights = torch.tensor([0.5, -2.0, 0.0, 1e3, 1.0] * n)[:n].to(DEVICE)
    if options.pop("bias", False):
        options["bias"] = torch.randn(V, generator=generator).to(DEVICE, dtype)
    return Problem(z, targets, weights, options)


def assert_right(problem: Problem) -> None:
    losses, gradient = problem.reference()
    z = problem.z.clone()
    got = losses_and_gradient_(z, problem.targets, problem.weights, **problem.options)
    assert got.dtype == torch.float32
    assert z.dtype == problem.z.dtype
    exact = logits(problem.z.double(), problem.options)
    size = float(torch.cat([exact[exact.isfinite()], losses]).abs().max().clamp(min=1))
    assert float((got - losses).abs().max()) <= 3e-7 * size
    # Triton's interpreter cuts the digits of bfloat16 off instead of rounding them: twice the error
    rounding = torch.finfo(z.dtype).eps * gradient.abs()
    scale = problem.options.get("logit_scale", 1.0) * problem.weights.abs().unsqueeze(1)
    assert bool(((z.double() - gradient).abs() <= rounding + 3e-7 * size * scale).all())


@pytest.fixture(autouse=True)
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole_blocks" not in request.fixturenames:
        monkeypatch.setattr(triton_kernel, "BLOCK", 64)


@pytest.fixture
def whole_blocks() -> None:
    """The blocks that are used."""


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_right(make_problem(dtype=dtype, **options))


@needs_kernel
@pytest.mark.parametrize("V", [1, 2, 7, 63, 64, 65, 128, 193])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_any_vocabulary(V: int, options: dict[str, Any]) -> None:
    assert_right(make_problem(V, **options))


@needs_kernel
@pytest.mark.usefixtures("whole_blocks")
@pytest.mark.parametrize("V", [40_000, 16_384])
def test_blocks_as_they_are_used(V: int) -> None:
    assert_right(make_problem(V, n=2, dtype=torch.bfloat16, **ALL))


@needs_kernel
@pytest.mark.parametrize("column", [0, 63, 64, 129])
@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"label_smoothing": 0.1}], ids=str)
def test_extreme_logits(options: dict[str, Any], value: float, column: int) -> None:
    problem = make_problem(n=4, **options)
    problem.z[:, column] = value
    problem.targets[:2] = column
    assert_right(problem)


@needs_kernel
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_certain_target_costs_exactly_nothing(softcap: float | None) -> None:
    z = torch.full((1, 130), -1e4, device=DEVICE)
    z[0, 70] = 1e4 / 3
    losses = losses_and_gradient_(
        z, torch.tensor([70], device=DEVICE), torch.ones(1, device=DEVICE), logit_scale=0.3, softcap=softcap
    )
    assert losses.tolist() == [0.0]
    assert float(z.abs().max()) <= 1e-20


@needs_kernel
@pytest.mark.parametrize("softcap", [30.0, 1e3, 1e5])
def test_tanh_keeps_its_digits_near_zero(softcap: float) -> None:
    assert_right(make_problem(softcap=softcap, spread=0.3))


@needs_kernel
def test_a_logit_of_minus_infinity_has_no_probability() -> None:
    problem = make_problem()
    problem.z[:, 3:90] = -torch.inf
    problem.targets.fill_(100)
    assert_right(problem)


@needs_kernel
def test_without_gradient_nothing_is_written() -> None:
    problem = make_problem(**ALL)
    z = problem.z.clone()
    losses = losses_and_gradient_(z, problem.targets, problem.weights, with_gradient=False, **problem.options)
    assert torch.equal(z, problem.z)
    torch.testing.assert_close(losses, problem.reference()[0].float())


@needs_kernel
def test_rows_may_lie_apart() -> None:
    problem = make_problem(V=130)
    buffer = torch.full((5, 144), 7.0, device=DEVICE)
    z = buffer[:, :130].copy_(problem.z)
    losses_and_gradient_(z, problem.targets, problem.weights)
    torch.testing.assert_close(z, problem.reference()[1].float())
    assert bool((buffer[:, 130:] == 7).all())


def test_no_row() -> None:
    z, none = torch.empty(0, 10, device=DEVICE), torch.empty(0, device=DEVICE)
    assert losses_and_gradient_(z, none.long(), none).shape == (0,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "z",
            torch.zeros(2, 8, dtype=torch.float64),
            "z has shape .* torch.float64; accepted: .* in float32, bfloat16 or float16",
        ),
        ("z", torch.zeros(8, 2).T, "z has .* strides"),
        ("z", torch.zeros(8), "z has shape"),
        ("targets", torch.zeros(2, dtype=torch.int32), "targets have dtype torch.int32; accepted: int64"),
        ("targets", torch.zeros(3, dtype=torch.int64), r"targets has shape \(3,\)"),
        ("weights", torch.zeros(4)[::2], r"weights has .* strides \(2,\); accepted: \(2,\), contiguous"),
        ("bias", torch.zeros(7), r"bias has shape \(7,\)"),
    ],
)
def test_errors_name_the_argument(name: str, value: Tensor, message: str) -> None:
    arguments: dict[str, Any] = {"z": torch.zeros(2, 8), "targets": torch.zeros(2).long(), "weights": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        losses_and_gradient_(**{**arguments, name: value})


def test_availability(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_available(torch.device("cpu"))
    monkeypatch.setattr(triton_kernel, "triton", None)
    assert not is_available.__wrapped__(torch.device("cuda", 0))


def test_where_the_kernel_cannot_be_built_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        TritonError = ValueError

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no C compiler")

    for module, name, value in (
        (triton_kernel, "triton", Stub),
        (triton_kernel, "losses_and_gradient_", fail),
        (torch.cuda, "get_device_capability", lambda _: (9, 0)),
        (torch, "zeros", lambda *_, **__: None),
        (torch, "ones", lambda *_, **__: None),
    ):
        monkeypatch.setattr(module, name, value)
    with pytest.warns(UserWarning, match="runs without Triton, which is installed but failed: no C compiler"):
        assert not is_available.__wrapped__(torch.device("cuda", 0))


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


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.skipif(
    HAS_TRITON and Version(version("triton")) < Version("3.3"), reason="older releases take other attributes"
)
@pytest.mark.usefixtures("whole_blocks")
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_it_compiles_for_an_h100_with_loads_of_16_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler, target = import_module("triton.compiler"), import_module("triton.backends.compiler").GPUTarget
    kernel: Any = triton_kernel._row_kernel
    fixed: dict[str, Any] = {
        "BIASED": "bias" in options,
        "CAPPED": "softcap" in options,
        "SMOOTHED": "label_smoothing" in options,
        "WITH_GRADIENT": True,
        "BLOCK": triton_kernel.BLOCK,
    }
    if "bias" not in options:
        fixed["bias"] = None
    types = {"z": "*bf16", "targets": "*i64", "weights": "*fp32", "bias": "*bf16", "losses": "*fp32"}
    types |= {"stride": "i32", "vocabulary": "i32", **dict.fromkeys(("scale", "cap", "smoothing", "share"), "fp32")}
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    compiled = compiler.compile(
        compiler.ASTSource(kernel, signature, fixed, aligned),
        target=target("cuda", 90, 32),
        options={"num_warps": triton_kernel.WARPS, "enable_fp_fusion": False},
    )
    accesses = re.findall(r"\b((?:ld|st)\.global\S*)", compiled.asm["ptx"])
    assert {"evict_last", "evict_first"} <= {hint for access in accesses for hint in re.findall(r"evict_\w+", access)}
    assert all("v4.b32" in access for access in accesses if "evict" in access)
    assert re.search(r"muli %\w+, %\w+ : i64", compiled.asm["ttir"])  # the offset of a row


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="Triton is not installed, or this is that process")
def test_in_the_interpreter() -> None:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 60

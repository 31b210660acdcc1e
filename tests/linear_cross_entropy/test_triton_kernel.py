"""The parts of the fused head that run on CUDA, against float64 autograd.

The kernel runs on a GPU or, where there is none, in Triton's interpreter. The suite does the latter by itself, in a
process of its own, wherever Triton can be imported; by hand, after `pip install triton`:

    TRITON_INTERPRET=1 python -m pytest tests/linear_cross_entropy/test_{triton_kernel,row_head,kernel_trial}.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from hf_temporal.linear_cross_entropy import triton_kernel
from hf_temporal.linear_cross_entropy.triton_kernel import is_available, losses_and_gradient_
from tests.linear_cross_entropy.kernel_problems import (
    ALL,
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    OPTIONS,
    assert_right,
    make_problem,
    needs_kernel,
)

FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("triton_kernel", "row_head", "kernel_trial")]


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
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "-p", "no:cacheprovider"]
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

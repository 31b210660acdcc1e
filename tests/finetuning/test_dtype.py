"""`--dtype auto` takes what the device multiplies natively and training bears; what is emulated is warned of."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_temporal.finetuning import dtype
from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.dtype import settle_dtype, slowdown
from hf_temporal.finetuning.models import ModelArguments
from hf_temporal.finetuning.recipe import CAUSAL_ARGUMENTS, prepare_causal_lm
from tests.tiny_run import Tiny

NATIVE, EMULATED = 0.5, 6.0


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(dtype.logger, "propagate", True)
    caplog.set_level(logging.INFO, dtype.logger.name)
    return caplog


def settled(folder: Path, given: str, *, use_peft: bool = False, **settings: Any) -> str:
    arguments = ModelArguments(dtype=given, use_peft=use_peft)
    settle_dtype(arguments, TrainingArguments(str(folder), use_cpu=True, report_to="none", **settings))
    return arguments.dtype


@pytest.mark.parametrize(
    ("times", "use_peft", "chosen", "why"),
    [
        (NATIVE, True, "bfloat16", "takes 0.50 × the time of float32 here, and those of the adapter float32"),
        (NATIVE, False, "float32", "bfloat16 would lose small updates; --bf16 computes in bfloat16"),
        (1.4, True, "float32", "takes 1.40 × the time of float32 here"),
        (EMULATED, True, "float32", "takes 6.00 × the time of float32 here"),
        (EMULATED, False, "float32", "takes 6.00 × the time of float32 here"),
    ],
)
def test_auto_is_what_the_processor_and_the_training_bear(
    times: float, use_peft: bool, chosen: str, why: str,
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dtype, "slowdown", lambda _: times)
    assert settled(tmp_path, "auto", use_peft=use_peft) == chosen
    (line,) = log.messages
    assert line.startswith(f"dtype='auto': the weights are {chosen}, as ")
    assert why in line


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_asks_the_gpu(native: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16_supported(*, including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    gpu = torch.device("cuda", 0)
    assert dtype._choice(gpu, use_peft=True)[0] == chosen
    assert dtype._choice(gpu, use_peft=False)[0] == "float32"
    assert bool(dtype._emulated(gpu, "bfloat16")) is not native
    assert not dtype._emulated(gpu, "float16")
    assert dtype._choice(torch.device("mps"), use_peft=True)[0] == "float32"


@pytest.mark.parametrize(
    ("given", "settings", "warned"),
    [
        ("float32", {}, []),
        ("bfloat16", {}, ["dtype='bfloat16'"]),
        ("float16", {}, ["dtype='float16'"]),
        ("float32", {"bf16": True}, ["bf16=True"]),
        ("auto", {"bf16": True}, ["bf16=True"]),
    ],
)
@pytest.mark.parametrize("times", [NATIVE, EMULATED])
def test_what_is_emulated_is_warned_of_with_the_figure(
    given: str, settings: dict[str, Any], warned: list[str], times: float,
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dtype, "slowdown", lambda _: times)
    assert settled(tmp_path, given, **settings) == ("float32" if given == "auto" else given)
    warnings = [line for line in log.messages if "only emulates" in line]
    assert [line.partition(":")[0] for line in warnings] == (warned if times == EMULATED else [])
    assert all("a matrix product takes 6.0 × the time of float32" in line for line in warnings)


def test_nothing_is_tried_out_where_nothing_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "slowdown", lambda _: pytest.fail("something was timed"))
    assert settled(tmp_path, "float32") == ModelArguments().dtype == "float32"


CODE = """
import torch
from hf_temporal.finetuning.dtype import slowdown
print(slowdown(torch.bfloat16))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="oneDNN's names of x86 processors")
def test_a_processor_without_bfloat16_is_found_out() -> None:
    """oneDNN's and PyTorch's own switches keep both from the instructions that this processor may have."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) > dtype.SLOW
    assert 0 < slowdown(torch.bfloat16) < 100


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_run_is_made_and_recorded_with_the_dtype_that_was_chosen(
    use_peft: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtype, "slowdown", lambda _: NATIVE)
    flags = tiny.flags(tmp_path / "run", "--dtype", "auto", "--use_peft", str(use_peft))
    run = prepare_causal_lm(parse(CAUSAL_ARGUMENTS, flags))
    dtypes = {name: parameter.dtype for name, parameter in run.model.named_parameters()}
    assert {kind for name, kind in dtypes.items() if "lora_" not in name} == {
        torch.bfloat16 if use_peft else torch.float32
    }
    assert all(kind == torch.float32 for name, kind in dtypes.items() if "lora_" in name)
    assert any("lora_" in name for name in dtypes) is use_peft
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["dtype"]
    assert recorded == ("bfloat16" if use_peft else "float32")

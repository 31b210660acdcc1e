"""The dtype that the weights are loaded in: chosen by what the device multiplies natively, and a warning elsewhere."""

import time

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.utils import logging

from .models import ModelArguments

logger = logging.get_logger(__name__)

SLOW = (
    2.0  # times the time of float32: a processor that emulates a dtype takes 2.5 to 9 times, a native one half of it
)
REPEATS = 8


def settle_dtype(arguments: ModelArguments, training_args: TrainingArguments) -> None:
    """Set a `dtype` of `auto` to what suits the device and the training, and warn of one that the device emulates.

    `auto` is bfloat16 under an adapter, whose own weights stay float32, where the device multiplies bfloat16 natively;
    float32 elsewhere, and where all weights are trained, as bfloat16 would round small updates away. What the first
    process finds holds for all. One line of the log says what was chosen and why.
    """
    device = training_args.device
    if arguments.dtype == "auto":
        # processors take different times: every process gets the same dtype
        found = broadcast_object_list([_choice(device, arguments.use_peft)])
        arguments.dtype, why = found[0]
        if training_args.should_log:
            logger.warning(f"dtype='auto': the weights are {arguments.dtype}, {why}.")
    given = {f"dtype={arguments.dtype!r}": arguments.dtype}
    if training_args.bf16:
        given["bf16=True"] = "bfloat16"
    for argument, dtype in given.items():
        if dtype != "float32" and training_args.should_log and (problem := _emulated(device, dtype)):
            logger.warning(f"{argument}: {problem}; accepted here without this cost: float32.")


def slowdown(dtype: torch.dtype) -> float:
    """How many times the time of float32 this processor takes for a small matrix product in `dtype`."""
    best = dict.fromkeys((torch.float32, dtype), float("inf"))
    for _ in range(REPEATS):
        for each in best:
            rows, matrix = torch.ones(64, 512, dtype=each), torch.ones(512, 512, dtype=each)
            start = time.perf_counter()
            torch.mm(rows, matrix)
            best[each] = min(best[each], time.perf_counter() - start)
    return best[dtype] / best[torch.float32]


def _choice(device: torch.device, use_peft: bool) -> tuple[str, str]:
    """The dtype for a device, and why."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"as this GPU {'has' if native else 'only emulates'} bfloat16"
    elif device.type == "cpu":
        times = slowdown(torch.bfloat16)
        native, why = times < 1, f"as a matrix product in bfloat16 takes {times:.2f} × the time of float32 here"
    else:
        native, why = False, f"as what a device of type {device.type!r} does with bfloat16 is not known"
    if not native:
        return "float32", why
    if use_peft:
        return "bfloat16", f"{why}, and those of the adapter float32"
    return "float32", f"as all are trained, and bfloat16 would lose small updates; --bf16 computes in bfloat16, {why}"


def _emulated(device: torch.device, dtype: str) -> str:
    """That a device emulates a dtype of 16 bits, and what it costs; empty where it does not, or nobody knows."""
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU only emulates bfloat16"
    if device.type == "cpu" and (times := slowdown(getattr(torch, dtype))) > SLOW:
        return f"this processor only emulates {dtype}, and a matrix product takes {times:.1f} × the time of float32"
    return ""

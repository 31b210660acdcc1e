"""How often an optimizer step would wait for an accelerator, counted on the CPU."""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = Path(torch.__file__).parents[1]
TORCH, OPTIMIZERS = f"{PACKAGES / 'torch'}{os.sep}", f"{PACKAGES / 'torch' / 'optim'}{os.sep}"
REPOSITORY = Path(__file__).resolve().parents[1]

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # item(), bool(), float(), int()
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """While it is entered, counts the operations after which the host knows a value, or a shape that follows from one.

    On an accelerator the host waits there until the device has done all that was asked of it. Left out is what does
    not meet the device: what runs inside `outside()`, the optimizer, whose counters of steps stay on the host, and
    lines that run on the CPU alone, behind `if ….device.type == "cpu"` or after a return `if ….device.type != "cpu"`.
    A copy to the host cannot be told from any other on the CPU.

    Attributes:
        at: how often, by the place (file and line, outside torch) and the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at: Counter[str] = Counter()
        self._paused = False

    def outside(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, made uncounted: collators run on the host."""
        while True:
            self._paused = True
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._paused = False
            yield batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it if the host would wait for it."""
        del types
        kwargs = kwargs or {}
        if not self._paused and _makes_host_wait(func, args, kwargs):
            place = _place(sys._getframe(1))
            if place is not None:
                self.at[f"{place} {func.overloadpacket.__name__}"] += 1
        return func(*args, **kwargs)


def _makes_host_wait(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if packet in READS:
        return True
    if packet is aten.repeat_interleave:
        return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if packet not in INDEXING or not any(_is_mask(each) for each in args[1]):
        return False
    return packet is aten.index or args[2].numel() > 1  # one value is filled in without looking for the places


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _place(frame: FrameType | None) -> str | None:
    """The innermost line outside torch, from where its package or the repository begins; None if not on the device."""
    place = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OPTIMIZERS):
            return None
        if not name.startswith(TORCH) and Path(name).is_file():
            if frame.f_lineno in lines_for_the_host(name):
                return None
            place = place or f"{_short(Path(name))}:{frame.f_lineno}"
        frame = frame.f_back
    return place


def _short(path: Path) -> str:
    for root in (PACKAGES, REPOSITORY):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return "/".join(path.parts[-3:])


@functools.lru_cache
def lines_for_the_host(file: str) -> frozenset[int]:
    """The lines of a Python file that run for tensors on the CPU alone."""
    lines: set[int] = set()
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _asks(node, "=="):
            lines.update(range(node.lineno, _last_line(node.body[-1]) + 1))
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.If) and _asks(statement, "!=") and _leaves(statement):
                    lines.update(range(_last_line(statement) + 1, _last_line(node) + 1))
    return frozenset(lines)


def _asks(node: ast.If, operator: str) -> bool:
    """Whether the condition begins with the question whether the device is, or is not, the CPU."""
    first = node.test.values[0] if isinstance(node.test, ast.BoolOp) else node.test
    whole = not isinstance(node.test, ast.BoolOp) or (isinstance(node.test.op, ast.And) and operator == "==")
    return whole and ast.unparse(first).endswith(f"device.type {operator} 'cpu'")


def _leaves(node: ast.If) -> bool:
    return not node.orelse and isinstance(node.body[-1], (ast.Return, ast.Raise))


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno

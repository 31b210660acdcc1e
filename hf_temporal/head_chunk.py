"""The LM head as the chunks of positions meet it: its matrices, gradients, dtypes and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import triton_pass

BLOCK_LOGITS, SMALLEST_BLOCK = 2**20, 128  # 4 MiB of float32
PIECE = 2**19  # entries of a product that is converted before it is added
LOGIT_BYTES, LOGIT_BYTES_16_BITS, LOGIT_BYTES_WIDE_16_BITS = 640, 768, 576  # of a chunk's logits for one word
WIDE = 2048
NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


@dataclass
class Term:
    """A summand x Wᵀ of the logits, with the gradients that are wanted of it.

    Attributes:
        matrix: W, [V, H].
        dtype: that of the products.
        needs_grad_x: whether ∂/∂x is wanted.
        grad_matrix: holds ∂/∂W after the last chunk; None where it is not wanted.
        sums: holds ∂/∂W between the chunks, where `grad_matrix` has too few digits for that.
    """

    matrix: Tensor
    dtype: torch.dtype
    needs_grad_x: bool
    grad_matrix: Tensor | None = None
    sums: Tensor | None = None


@dataclass
class Head:
    """z = c tanh(s (Σ x Wᵀ + b) / c), and the gradients of b and the W, to which each chunk adds."""

    terms: Sequence[Term]
    bias: Tensor | None
    grad_bias: Tensor | None
    logit_scale: float
    softcap: float | None
    label_smoothing: float
    exact: torch.dtype
    positions: int = 0
    is_shifted: bool = False
    _rooms: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.terms[0].matrix)

    @property
    def stored(self) -> torch.dtype:
        """The dtype in which the logits of a chunk are held: that of the products where they have one in common."""
        dtypes = {term.dtype for term in self.terms}
        return dtypes.pop() if len(dtypes) == 1 else self.exact

    @property
    def smoothed(self) -> float:
        """ε / V, what label smoothing gives to every word."""
        return self.label_smoothing / self.vocabulary

    @property
    def needs_gradient(self) -> bool:
        """Whether anything but the losses is wanted."""
        return self.grad_bias is not None or any(t.needs_grad_x or t.grad_matrix is not None for t in self.terms)

    @property
    def goes_by_rows(self) -> bool:
        """Whether there is a kernel for these logits on this device."""
        return self.stored in triton_pass.DTYPES and triton_pass.is_available(self.terms[0].matrix.device)

    @property
    def row_length(self) -> int:
        """V and what fills it up to a multiple of 16, for loads of 16 bytes."""
        return -(-self.vocabulary // 16) * 16

    def chunk_size(self) -> int:
        """Positions at a time, at most."""
        matrix = self.terms[0].matrix
        size, width = self.stored.itemsize, matrix.shape[1]
        if self.goes_by_rows:
            return triton_pass.default_chunk_size(self.vocabulary, size, matrix.device, width=width)
        return default_chunk_size(self.vocabulary, size, matrix.device.type, width=width)

    @property
    def block(self) -> int:
        """Rows of W at a time: on CPUs as many as keep their logits of a chunk in the cache, a power of two."""
        logits = BLOCK_LOGITS if self.terms[0].matrix.device.type == "cpu" else 64 * BLOCK_LOGITS
        rows = 2 ** (logits // max(self.positions, 1)).bit_length() // 2
        return min(self.vocabulary, max(SMALLEST_BLOCK, rows))

    def buffer(self, positions: int) -> Tensor:
        """Room for the logits of a chunk; for those of a block, where they are not needed again."""
        self.positions = positions
        words = self.vocabulary if self.needs_gradient else self.block
        if self.goes_by_rows:
            words = self.row_length
        return self.terms[0].matrix.new_empty(positions * words, dtype=self.stored)

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to write into, the same memory each time: fresh pages cost more than what is written there."""
        size = math.prod(shape)
        room = self._rooms.get((name, dtype))
        if room is None or len(room) < size:
            room = self._rooms[name, dtype] = self.terms[0].matrix.new_empty(size, dtype=dtype)
        return room[:size].view(*shape)

    def rows_of(self, term: Term, rows: slice) -> Tensor:
        """W[rows] in the dtype of the products, until the next ones."""
        part = term.matrix[rows]
        return part if part.dtype == term.dtype else self.room("rows", part.shape, term.dtype).copy_(part)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b, until the next one."""
        return torch.mm(a, b, out=self.room("product", (len(a), b.shape[1]), a.dtype))

    def add_product_(self, into: Tensor, a: Tensor, b: Tensor, *, onto: Tensor | None) -> None:
        """into ← onto + a b, in the exact dtype; None stands for zeros."""
        if into.dtype == a.dtype and (onto is None or onto.dtype == into.dtype == self.exact):
            torch.addmm(into if onto is None else onto, a, b, beta=float(onto is not None), out=into)
            return
        size = max(1, PIECE // b.shape[1])
        for start in range(0, len(into), size):
            piece = slice(start, start + size)
            product = self.product(a[piece], b)
            if onto is None:
                into[piece].copy_(product)
                continue
            total = product if product.dtype == onto.dtype else self.converted(product)
            if into.dtype == onto.dtype:
                torch.add(onto[piece], total, out=into[piece])
            else:
                into[piece].copy_(total.add_(onto[piece]))

    def converted(self, product: Tensor) -> Tensor:
        """The product in the exact dtype, until the next one."""
        return product if product.dtype == self.exact else self.room("total", product.shape, self.exact).copy_(product)


def default_chunk_size(vocabulary: int, itemsize: int, device_type: str, *, width: int) -> int:
    """Positions at a time, at most, of logits of so many bytes, from a head [V, width].

    On CPUs 160, in 16 bits 384 (288 of wide heads, whose other rooms are larger and whose products run as fast with
    fewer), where the products run nearly as fast as with more: less than a tenth of what 2,048 float32 logits take.
    Small vocabularies take what 16 MiB hold, other devices more.
    """
    usual = LOGIT_BYTES
    if itemsize == 2:
        usual = LOGIT_BYTES_WIDE_16_BITS if width >= WIDE else LOGIT_BYTES_16_BITS
    if device_type != "cpu":
        usual *= 8
    return max(usual, 2**24 // vocabulary) // itemsize


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype for products of operands of `dtype`: float32 for 16 bits that the processor would have to emulate."""
    if device_type != "cpu" or dtype not in NATIVE:
        return dtype
    capabilities = torch.cpu.get_capabilities()
    return dtype if any(capabilities.get(name) for name in NATIVE[dtype]) else torch.float32

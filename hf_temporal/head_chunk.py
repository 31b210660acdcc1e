"""A chunk of positions through the LM head: its losses and gradients, by blocks of the vocabulary or row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import triton_pass

BLOCK_LOGITS, SMALLEST_BLOCK = 2**20, 128  # 4 MiB of float32
SPAN = 16  # blocks whose share of ∂/∂x is one product, where none of its factors has to be converted
PIECE = 2**19  # entries of a product that is converted before it is added
LOGIT_BYTES, LOGIT_BYTES_16_BITS, LOGIT_BYTES_WIDE_16_BITS = 640, 768, 576  # of a chunk's logits for one word
WIDE = 2048
STEP = 8.0  # between bounds of the logits
LARGEST_UNIT = 2.0**60  # of sums of exponentials
LOG2_E = 1 / math.log(2)
NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}

Gradients = list[Tensor | None]


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
    """z = c tanh(s (Σ x Wᵀ + b) / c), the loss on it, and the gradients of b and the W, to which each chunk adds."""

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

    def losses(
        self, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, *, is_first: bool, is_last: bool
    ) -> tuple[Tensor, Gradients]:
        """The losses [n] of a chunk, unweighted, and ∂ Σ w ℓ / ∂x of each of its x, [n, H]."""
        if self.goes_by_rows:
            return _by_rows(self, xs, y, w, buffer, is_first, is_last)
        return _by_blocks(self, xs, y, w, buffer, is_first, is_last)

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


def _by_blocks(
    head: Head, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, is_first: bool, is_last: bool
) -> tuple[Tensor, Gradients]:
    """Logits stand as [V, n], whose product with W is the faster one on CPUs, and are met block by block, in cache.

    The first sweep makes exp(l − m) of them; what is left to multiply a row by, in the second sweep, goes into its few
    x and ∂/∂x instead. Capped logits are made again there, for their slope.
    """
    targets = _Targets(y)
    swept = None if head.is_shifted else _first_sweep(head, xs, targets, buffer)
    if swept is None:
        head.is_shifted = True
        swept = _first_sweep(head, xs, targets, buffer)
        assert swept is not None
    expected = (1 - head.label_smoothing) * swept.chosen + head.smoothed * swept.plain
    losses = swept.bound + swept.total.log() - expected
    if not head.needs_gradient:
        return losses, [None] * len(xs)
    grads_x: Gradients = [
        x.new_zeros(x.shape, dtype=head.exact) if t.needs_grad_x else None for x, t in zip(xs, head.terms, strict=True)
    ]
    span = SPAN if all(term.matrix.dtype == term.dtype == head.stored for term in head.terms) else 1
    if head.softcap is not None:
        swept.groups = [(swept.bound, _blocks(head))]
    for bound, blocks in swept.groups:
        units = _units(head, swept, bound, w)
        factors = [(x * units.factor.unsqueeze(1)).to(term.dtype) for x, term in zip(xs, head.terms, strict=True)]
        for start in range(0, len(blocks), span):
            neighbours = blocks[start : start + span]
            for rows in neighbours:
                z = _gradient(head, rows, targets, units, buffer)
                for term, x in zip(head.terms, factors, strict=True):
                    if term.grad_matrix is not None:
                        source = term.grad_matrix if term.sums is None else term.sums
                        target = term.grad_matrix if is_last else source
                        onto = None if is_first else source[rows]
                        head.add_product_(target[rows], z.to(term.dtype), x, onto=onto)
            rows = slice(neighbours[0].start, neighbours[-1].stop)
            z = _part(head, rows, len(y), buffer)
            for term, grad_x in zip(head.terms, grads_x, strict=True):
                if grad_x is not None:
                    product = head.product(z.to(term.dtype).t(), head.rows_of(term, rows))
                    grad_x.addcmul_(head.converted(product), units.factor.unsqueeze(1))
    return losses, grads_x


class _Targets:
    """Of y [n]: which lie in a block, and where."""

    def __init__(self, y: Tensor) -> None:
        self.y, self.columns = y, torch.arange(len(y), device=y.device)
        self.places = y * len(y) + self.columns

    def among(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which are in these rows, [n], and their places there, flat; of the others, the first of their column."""
        inside = (self.y >= rows.start) & (self.y < rows.stop)
        return inside, torch.where(inside, self.places - rows.start * len(self.y), self.columns)


@dataclass
class _Swept:
    """Of each position: m, Σ_v exp(l_v − m), the target's logit, Σ_v l_v where needed; the blocks that have an m."""

    bound: Tensor
    total: Tensor
    chosen: Tensor
    plain: Tensor
    groups: list[tuple[Tensor, list[slice]]]


def _first_sweep(head: Head, xs: Sequence[Tensor], targets: _Targets, buffer: Tensor) -> _Swept | None:
    """Make the logits, and exp(l − m) of them.

    m = 0 as long as the sums are far from the ends of float32's range; None where they are not. Once `is_shifted`, m
    bounds the logits so far.
    """
    n = len(xs[0])
    bound = xs[0].new_full((n,), torch.finfo(head.exact).min if head.is_shifted else 0, dtype=head.exact)
    total, chosen, plain = bound.new_zeros(3, n)
    groups: list[tuple[Tensor, list[slice]]] = []
    for rows in _blocks(head):
        z = _part(head, rows, n, buffer)
        for i, (term, x) in enumerate(zip(head.terms, xs, strict=True)):
            head.add_product_(z, head.rows_of(term, rows), x.t(), onto=z if i else None)
        logits, slope = _scaled(head, rows, z)
        inside, at = targets.among(rows)
        chosen += torch.where(inside, logits.view(-1).index_select(0, at), 0)
        if head.label_smoothing:
            plain += logits.sum(0)
        if head.is_shifted:
            higher = torch.maximum(bound, _bound(logits, z.dtype))
            total *= (bound - higher).exp_()
            logits -= higher
            if not groups or not _is_same(bound, higher):
                groups.append((higher, []))
            groups[-1][1].append(rows)
            bound = higher
        total += _exp_(head, logits).sum(0)
        if slope is None and logits is not z:
            z.copy_(logits)
    if head.is_shifted:
        return _Swept(bound, total, chosen, plain, groups)
    if _may_exceed(total, LARGEST_UNIT) or _may_exceed(total.reciprocal(), LARGEST_UNIT):
        return None
    return _Swept(bound, total, chosen, plain, [(bound, _blocks(head))])


@dataclass(frozen=True)
class _Units:
    """Of blocks with a common m, in what units their gradient is made.

    Attributes:
        bound: m.
        scale: to multiply exp(l − m) by; None for 1.
        one: what a probability of 1 is then.
        own: ∂ℓ/∂l of the targets.
        factor: w s / one.
    """

    bound: Tensor
    scale: Tensor | None
    one: Tensor
    own: Tensor
    factor: Tensor


def _units(head: Head, swept: _Swept, bound: Tensor, w: Tensor) -> _Units:
    """The targets' own are made of their logits again, just as the sums were, so that 1 − p keeps its digits."""
    one, own = swept.total * (swept.bound - bound).exp(), _exp_(head, swept.chosen - bound)
    scale = None
    if head.stored == torch.float16 or _may_exceed(one, LARGEST_UNIT):
        own /= one
        scale, one = one.reciprocal(), torch.ones_like(one)
    own -= one * (1 - head.label_smoothing + head.smoothed)
    return _Units(bound, scale, one, own, w * head.logit_scale / one)


def _gradient(head: Head, rows: slice, targets: _Targets, units: _Units, buffer: Tensor) -> Tensor:
    """∂ℓ/∂(Σ x Wᵀ + b) over the scale and in these units, where exp(l − m) of the block stood; adds to that of b."""
    part = _part(head, rows, len(targets.y), buffer)
    z, slope = part, None
    if head.softcap is not None:
        z, slope = _scaled(head, rows, part)
        _exp_(head, z.sub_(units.bound))
    if units.scale is not None:
        z.mul_(units.scale)
    if head.label_smoothing:
        z.sub_(units.one * head.smoothed)
    flat = z.view(-1)
    inside, at = targets.among(rows)
    own = torch.where(inside, units.own.to(z.dtype), flat.index_select(0, at))
    flat.index_copy_(0, at, own)  # scatter_ copies bfloat16
    if slope is not None:
        z.mul_(slope)
    if head.grad_bias is not None:
        head.grad_bias[rows] += z.to(head.exact) @ units.factor
    return part if z is part else part.copy_(z)


def _blocks(head: Head) -> list[slice]:
    """The vocabulary, cut."""
    return [slice(start, min(start + head.block, head.vocabulary)) for start in range(0, head.vocabulary, head.block)]


def _exp_(head: Head, exponents: Tensor) -> Tensor:
    """exp, in place; for logits of 16 bits by the faster exp2, whose error of |l| 2⁻²³ is none beside theirs."""
    return exponents.exp_() if head.stored == head.exact else exponents.mul_(LOG2_E).exp2_()


def _part(head: Head, rows: slice, n: int, buffer: Tensor) -> Tensor:
    """A block's part of the buffer, [block, n]; the same for all where the buffer does not hold them all."""
    start = rows.start if len(buffer) >= head.vocabulary * n else 0
    return buffer[start * n : (start + rows.stop - rows.start) * n].view(-1, n)


def _scaled(head: Head, rows: slice, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits of the raw products z, in z where it need not be kept; 1 − tanh² where they are capped."""
    logits = z
    if z.dtype != head.exact or head.softcap is not None:
        logits = head.room("logits", z.shape, head.exact).copy_(z)
    if head.bias is not None:
        logits.add_(head.bias[rows].unsqueeze(1))
    if head.logit_scale != 1:
        logits.mul_(head.logit_scale)
    if head.softcap is None:
        return logits, None
    logits.div_(head.softcap).tanh_()
    slope = 1 - logits.square()
    return logits.mul_(head.softcap), slope


def _bound(logits: Tensor, stored: torch.dtype) -> Tensor:
    """At least the largest logit of each column; in steps, so that it is seldom another one in the next block.

    Not so in float16, where exp(l − bound) would have fewer digits.
    """
    largest = logits.amax(0)
    return largest if stored == torch.float16 else largest.div_(STEP).ceil_().mul_(STEP)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two bounds are known to be equal; only on the CPU does asking cost nothing."""
    if a.device.type != "cpu":
        return False
    return torch.equal(a, b)


def _may_exceed(values: Tensor, largest: float) -> bool:
    """Whether one of the values is not known to be at most `largest`; only on the CPU does asking cost nothing."""
    if values.device.type != "cpu":
        return True
    return not bool((values <= largest).all())


def _by_rows(
    head: Head, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, is_first: bool, is_last: bool
) -> tuple[Tensor, Gradients]:
    """Logits stand as [n, V], rows apart by a multiple of 16, and one kernel makes losses and gradients of them."""
    z = buffer.view(-1, head.row_length)[: len(y), : head.vocabulary]
    for i, (term, x) in enumerate(zip(head.terms, xs, strict=True)):
        matrix = term.matrix.to(term.dtype).t()
        if z.dtype == term.dtype:
            torch.addmm(z, x, matrix, beta=float(i > 0), out=z)
        else:
            z.copy_(x @ matrix) if i == 0 else z.add_(x @ matrix)
    losses = triton_pass.losses_and_gradient_(
        z,
        y,
        w,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        label_smoothing=head.label_smoothing,
        with_gradient=head.needs_gradient,
    )
    grads_x: Gradients = [None] * len(xs)
    if head.grad_bias is not None:
        head.grad_bias.add_(z.sum(0, dtype=head.exact))
    for i, (term, x) in enumerate(zip(head.terms, xs, strict=True)):
        gradient = z.to(term.dtype)
        if term.needs_grad_x:
            grads_x[i] = gradient @ term.matrix.to(term.dtype)
        if term.grad_matrix is not None:
            sums = term.grad_matrix if term.sums is None else term.sums
            triton_pass.add_product_(sums, gradient.t(), x, beta=float(not is_first))
            if is_last and term.sums is not None:
                term.grad_matrix.copy_(term.sums)
    return losses, grads_x

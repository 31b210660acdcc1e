"""A chunk of positions through the LM head, block of the vocabulary by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .head import Head, Term

BLOCK_LOGITS, SMALLEST_BLOCK = 2**20, 128  # 4 MiB of float32
SPAN = 16  # blocks whose share of ∂/∂x is one product, where none of its factors has to be converted
PIECE = 2**19  # entries of a product that is converted, or copied, where it goes
LOGIT_BYTES, LOGIT_BYTES_16_BITS, LOGIT_BYTES_WIDE_16_BITS = 640, 768, 576  # of a chunk's logits for one word
WIDE = 2048
SMALL_LOGITS = 2**24  # bytes of a chunk's logits that are never too many
ROOM_BYTES = 16  # of what a position's hidden states and their gradient take, for each of their entries
STEP = 8.0  # between bounds of the logits
LARGEST_UNIT = 2.0**60  # of sums of exponentials
LOG2_E = 1 / math.log(2)


@dataclass
class BlockHead(Head):
    """In PyTorch alone.

    Logits stand as [V, n], whose product with W is the faster one on CPUs, and are met block by block, in cache. The
    first sweep makes exp(l − m) of them; what is left to multiply a column by, in the second sweep, goes into its few
    x and ∂/∂x instead. Capped logits are made again there, for their slope.

    Attributes:
        is_shifted: whether m has to bound the logits.
        positions: those that the buffer has room for.
    """

    is_shifted: bool = field(init=False)
    positions: int = field(init=False)
    _rooms: dict[Any, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.is_shifted = self.is_narrow or self.terms[0].matrix.device.type != "cpu"

    @property
    def is_narrow(self) -> bool:
        """Whether float16 bounds what a product may meet."""
        return any(term.dtype == torch.float16 for term in self.terms)

    @property
    def smoothed(self) -> float:
        """ε / V, what label smoothing gives to every word."""
        return self.label_smoothing / self.vocabulary

    @property
    def block(self) -> int:
        """Rows of W at a time: on CPUs as many as keep their logits of a chunk in the cache, a power of two."""
        logits = BLOCK_LOGITS if self.terms[0].matrix.device.type == "cpu" else 64 * BLOCK_LOGITS
        rows = 2 ** (logits // max(self.positions, 1)).bit_length() // 2
        return min(self.vocabulary, max(SMALLEST_BLOCK, rows))

    def chunk_size(self, positions: int) -> int:
        """See `default_chunk_size`."""
        matrix = self.terms[0].matrix
        return default_chunk_size(
            *(len(matrix), self.stored.itemsize, matrix.device.type),
            width=matrix.shape[1],
            positions=positions,
            summed=sum(term.matrix.shape[1] for term in self.narrow_terms),
        )

    def buffer(self, positions: int) -> Tensor:
        """[V · positions]; of a block, where the logits are not needed again."""
        self.positions = positions
        words = self.vocabulary if self.needs_gradient else self.block
        return self.terms[0].matrix.new_empty(positions * words, dtype=self.stored)

    def losses(
        self, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, *, is_first: bool, is_last: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """See `Head.losses`."""
        targets = _Targets(y)
        swept = None if self.is_shifted else _first_sweep(self, xs, targets, buffer)
        if swept is None:
            self.is_shifted = True
            swept = _first_sweep(self, xs, targets, buffer)
            assert swept is not None
        expected = (1 - self.label_smoothing) * swept.chosen + self.smoothed * swept.plain
        losses = swept.bound + swept.total.log() - expected
        if not self.needs_gradient:
            return losses, [None] * len(xs)
        return losses, _second_sweep(self, xs, targets, w, swept, buffer, is_first=is_first, is_last=is_last)

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
        size = max(1, PIECE // max(1, b.shape[1]))
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


def default_chunk_size(
    vocabulary: int, itemsize: int, device_type: str, *, width: int, positions: int, summed: int
) -> int:
    """Of so many positions, how many at a time, at most, with logits of so many bytes, from a head [V, width].

    On CPUs 160 in 32 bits and 384 in 16, where the products run nearly as fast as with more: less than a tenth of
    what 2,048 float32 logits take. Of wide heads in 16 bits 288, since their other rooms are larger. Small
    vocabularies take what 16 MiB hold, other devices more. Half of the positions, where what they need beyond the
    usual is no more than the float32 sums [V, summed] that two chunks do without.
    """
    usual = LOGIT_BYTES
    if itemsize == 2:
        usual = LOGIT_BYTES_WIDE_16_BITS if width >= WIDE else LOGIT_BYTES_16_BITS
    if device_type != "cpu":
        usual *= 8
    size = max(usual, SMALL_LOGITS // vocabulary) // itemsize
    half = -(-positions // 2)
    beyond = (half - size) * (itemsize * vocabulary + ROOM_BYTES * width)
    return half if 0 < beyond <= 4 * vocabulary * summed else size


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


def _first_sweep(head: BlockHead, xs: Sequence[Tensor], targets: _Targets, buffer: Tensor) -> _Swept | None:
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
        if not head.is_shifted and rows.start == 0 and _may_leave_range(total):
            return None
        if slope is None and logits is not z:
            z.copy_(logits)
    if head.is_shifted:
        return _Swept(bound, total, chosen, plain, groups)
    return None if _may_leave_range(total) else _Swept(bound, total, chosen, plain, [(bound, _blocks(head))])


def _second_sweep(
    head: BlockHead,
    xs: Sequence[Tensor],
    targets: _Targets,
    w: Tensor,
    swept: _Swept,
    buffer: Tensor,
    *,
    is_first: bool,
    is_last: bool,
) -> list[Tensor | None]:
    """Make the gradients of what the first sweep has left: add to those of b and the W, return those of the x."""
    grads_x: list[Tensor | None] = [
        x.new_zeros(x.shape, dtype=head.exact) if t.needs_grad_x else None for x, t in zip(xs, head.terms, strict=True)
    ]
    span = SPAN if all(term.matrix.dtype == term.dtype == head.stored for term in head.terms) else 1
    groups = swept.groups if head.softcap is None else [(swept.bound, _blocks(head))]
    for bound, blocks in groups:
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
            z = _part(head, rows, len(targets.y), buffer)
            for term, grad_x in zip(head.terms, grads_x, strict=True):
                if grad_x is not None:
                    product = head.product(z.to(term.dtype).t(), head.rows_of(term, rows))
                    grad_x.addcmul_(head.converted(product), units.factor.unsqueeze(1))
    return grads_x


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


def _units(head: BlockHead, swept: _Swept, bound: Tensor, w: Tensor) -> _Units:
    """The targets' own are made of their logits again, just as the sums were, so that 1 − p keeps its digits."""
    one, own = swept.total * (swept.bound - bound).exp(), _exp_(head, swept.chosen - bound)
    scale = None
    if head.is_narrow or _may_exceed(one, LARGEST_UNIT):
        own /= one
        scale, one = one.reciprocal(), torch.ones_like(one)
    own -= one * (1 - head.label_smoothing + head.smoothed)
    return _Units(bound, scale, one, own, w * head.logit_scale / one)


def _gradient(head: BlockHead, rows: slice, targets: _Targets, units: _Units, buffer: Tensor) -> Tensor:
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


def _blocks(head: BlockHead) -> list[slice]:
    """The vocabulary, cut."""
    return [slice(start, min(start + head.block, head.vocabulary)) for start in range(0, head.vocabulary, head.block)]


def _exp_(head: BlockHead, exponents: Tensor) -> Tensor:
    """exp, in place; for logits of 16 bits by the faster exp2, whose error of |l| 2⁻²³ is none beside theirs."""
    return exponents.exp_() if head.stored == head.exact else exponents.mul_(LOG2_E).exp2_()


def _part(head: BlockHead, rows: slice, n: int, buffer: Tensor) -> Tensor:
    """A block's part of the buffer, [block, n]; the same for all where the buffer does not hold them all."""
    start = rows.start if len(buffer) >= head.vocabulary * n else 0
    return buffer[start * n : (start + rows.stop - rows.start) * n].view(-1, n)


def _scaled(head: BlockHead, rows: slice, z: Tensor) -> tuple[Tensor, Tensor | None]:
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


def _may_leave_range(total: Tensor) -> bool:
    """Whether m = 0 does not do: sums of exponentials that are huge, or so small that they may be short of digits."""
    return _may_exceed(total, LARGEST_UNIT) or _may_exceed(total.reciprocal(), LARGEST_UNIT)


def _may_exceed(values: Tensor, largest: float) -> bool:
    """Whether one of the values is not known to be at most `largest`; only on the CPU does asking cost nothing."""
    if values.device.type != "cpu":
        return True
    return not bool((values <= largest).all())

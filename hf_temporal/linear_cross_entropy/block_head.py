"""The LM head and its loss in PyTorch alone, one block of the vocabulary after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .head import Head, Term, TokenStatistics

BLOCK_LOGITS, SMALLEST_BLOCK = 2**20, 128  # 4 MiB of float32
SPAN = 16  # blocks whose share of ∂/∂x is one product, where none of its factors has to be converted
PIECE = 2**19  # entries of a product that is converted, or copied, where it goes
LOGIT_BYTES, LOGIT_BYTES_16_BITS, LOGIT_BYTES_WIDE_16_BITS = 640, 768, 576  # of a chunk's logits for one word
WIDE = 2048
SMALL_LOGITS = 2**24  # bytes of a chunk's logits that are never too many
STATE_BYTES = 16  # of what a position's hidden states and their gradient take, for each of their entries
STEP = 8.0  # between bounds of the logits
LARGEST_UNIT = 2.0**60  # of sums of exponentials
LOG2_E = 1 / math.log(2)


@dataclass(eq=False, repr=False)
class BlockHead(Head):
    """The head in PyTorch alone, for CPUs and for GPUs without Triton.

    The logits of a chunk are held as [V, n], since the product W xᵀ is the faster one on CPUs, and are computed one
    block of the vocabulary at a time, so that a block stays in the cache. The first sweep over the blocks replaces
    them by exp(l − m). The second sweep makes the gradients; a factor that is common to a column is applied to its
    few x and ∂/∂x instead. Logits with a soft cap are computed again there, for the slope of the tanh.
    """

    is_shifted: bool = field(init=False)  # whether m has to bound the logits
    positions: int = field(init=False)  # that the logits' memory holds
    logits: Tensor = field(init=False)  # that memory, flat
    _scratch: dict[Any, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.is_shifted = self.is_narrow or self.terms[0].matrix.device.type != "cpu"

    @property
    def is_narrow(self) -> bool:
        """Whether a product is computed in float16, whose range its factors must not leave."""
        return any(term.dtype == torch.float16 for term in self.terms)

    @property
    def has_entropy_of_gradients(self) -> bool:
        """Whether the entropy is ℓ − Σ_v z_v ∂ℓ/∂z_v without a sweep for it: z is linear in what has a gradient."""
        return self.softcap is None and all(term.needs_grad_x for term in self.terms)

    @property
    def smoothed(self) -> float:
        return self.label_smoothing / self.vocabulary

    @property
    def block(self) -> int:
        """Rows of W at a time: on CPUs as many as keep their logits of a chunk in the cache, a power of two."""
        logits = BLOCK_LOGITS if self.terms[0].matrix.device.type == "cpu" else 64 * BLOCK_LOGITS
        rows = 2 ** (logits // max(self.positions, 1)).bit_length() // 2
        return min(self.vocabulary, max(SMALLEST_BLOCK, rows))

    def chunk_size(self, positions: int) -> int:
        matrix = self.terms[0].matrix
        return block_chunk_size(
            *(len(matrix), self.stored.itemsize, matrix.device.type),
            width=matrix.shape[1],
            positions=positions,
            summed=sum(term.matrix.shape[1] for term in self.narrow_terms),
        )

    def reserve(self, positions: int) -> None:
        """Memory for [V · positions] logits, or for those of one block where no gradient is wanted."""
        self.positions = positions
        words = self.vocabulary if self.needs_gradient else self.block
        self.logits = self.terms[0].matrix.new_empty(positions * words, dtype=self.stored)

    def losses(
        self, xs: Sequence[Tensor], y: Tensor, w: Tensor, *, is_first: bool, is_last: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        targets = _Targets(y)
        swept = self._first_sweep(xs, targets)
        if swept is None:
            self.is_shifted = True
            swept = self._first_sweep(xs, targets)
            assert swept is not None
        expected = (1 - self.label_smoothing) * swept.chosen + self.smoothed * swept.plain
        losses = swept.bound + swept.total.log() - expected
        if self.measured is not None and self.has_entropy_of_gradients:
            self.measured.entropy = losses.clone()
        if not self.needs_gradient:
            return losses, [None] * len(xs)
        return losses, self._second_sweep(xs, targets, w, swept, is_first=is_first, is_last=is_last)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A scratch buffer, the same memory each time: fresh pages cost more than what is written there."""
        size = math.prod(shape)
        memory = self._scratch.get((name, dtype))
        if memory is None or len(memory) < size:
            memory = self._scratch[name, dtype] = self.terms[0].matrix.new_empty(size, dtype=dtype)
        return memory[:size].view(*shape)

    def rows_of(self, term: Term, rows: slice) -> Tensor:
        """W[rows] in the dtype of the products; a converted copy lasts until the next call."""
        part = term.matrix[rows]
        return part if part.dtype == term.dtype else self.scratch("rows", part.shape, term.dtype).copy_(part)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The matrix product a b, in a scratch buffer that lasts until the next call."""
        return torch.mm(a, b, out=self.scratch("product", (len(a), b.shape[1]), a.dtype))

    def accumulate_product_(self, into: Tensor, a: Tensor, b: Tensor, *, onto: Tensor | None) -> None:
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
        """The product in the exact dtype; a converted copy lasts until the next call."""
        exact = product.dtype == self.exact
        return product if exact else self.scratch("total", product.shape, self.exact).copy_(product)

    def _first_sweep(self, xs: Sequence[Tensor], targets: _Targets) -> _Swept | None:
        """Make the logits, and exp(l − m) of them.

        m = 0 as long as the sums are far from the ends of float32's range; the result is None where they are not.
        Once `is_shifted`, m bounds the logits so far.
        """
        n = len(xs[0])
        bound = xs[0].new_full((n,), torch.finfo(self.exact).min if self.is_shifted else 0, dtype=self.exact)
        total, chosen, plain, expected = bound.new_zeros(4, n)
        highest = bound.new_full((n,), -math.inf)
        sums_entropy = self.measures and not self.has_entropy_of_gradients
        groups: list[tuple[Tensor, list[slice]]] = []
        for rows in self._blocks():
            z = self._part(rows, n)
            for i, (term, x) in enumerate(zip(self.terms, xs, strict=True)):
                self.accumulate_product_(z, self.rows_of(term, rows), x.t(), onto=z if i else None)
            logits, slope = self._scaled(rows, z)
            inside, at = targets.among(rows)
            chosen += torch.where(inside, logits.view(-1).index_select(0, at), 0)
            if self.label_smoothing:
                plain += logits.sum(0)
            if self.measures:
                highest = torch.maximum(highest, logits.amax(0))
            kept = self.scratch("kept", logits.shape, self.exact).copy_(logits) if sums_entropy else None
            if self.is_shifted:
                higher = torch.maximum(bound, _bound(logits, z.dtype))
                factor = (bound - higher).exp_()
                total *= factor
                expected *= factor
                logits -= higher
                if not groups or not _is_same(bound, higher):
                    groups.append((higher, []))
                groups[-1][1].append(rows)
                bound = higher
            total += self._exp_(logits).sum(0)
            if kept is not None:
                expected += kept.mul_(logits).sum(0)
            if not self.is_shifted and rows.start == 0 and _may_leave_range(total):
                return None
            if slope is None and logits is not z:
                z.copy_(logits)
        if self.measures:
            self.measured = TokenStatistics(bound + total.log() - expected / total, chosen >= highest)
        if self.is_shifted:
            return _Swept(bound, total, chosen, plain, groups)
        return None if _may_leave_range(total) else _Swept(bound, total, chosen, plain, [(bound, self._blocks())])

    def _second_sweep(
        self, xs: Sequence[Tensor], targets: _Targets, w: Tensor, swept: _Swept, *, is_first: bool, is_last: bool
    ) -> list[Tensor | None]:
        """Make the gradients of what the first sweep has left: add to those of b and the W, return those of the x."""
        grads_x: list[Tensor | None] = [
            x.new_zeros(x.shape, dtype=self.exact) if t.needs_grad_x else None
            for x, t in zip(xs, self.terms, strict=True)
        ]
        span = SPAN if all(term.matrix.dtype == term.dtype == self.stored for term in self.terms) else 1
        entropy = self.measured.entropy if self.measured is not None and self.has_entropy_of_gradients else None
        groups = swept.groups if self.softcap is None else [(swept.bound, self._blocks())]
        for bound, blocks in groups:
            units = self._units(swept, bound, w)
            share = self.logit_scale / units.one
            factors = [(x * units.factor.unsqueeze(1)).to(term.dtype) for x, term in zip(xs, self.terms, strict=True)]
            for start in range(0, len(blocks), span):
                neighbours = blocks[start : start + span]
                for rows in neighbours:
                    z = self._gradient(rows, targets, units)
                    for term, x in zip(self.terms, factors, strict=True):
                        if term.grad_matrix is not None:
                            source = term.grad_matrix if term.sums is None else term.sums
                            target = term.grad_matrix if is_last else source
                            onto = None if is_first else source[rows]
                            self.accumulate_product_(target[rows], z.to(term.dtype), x, onto=onto)
                rows = slice(neighbours[0].start, neighbours[-1].stop)
                z = self._part(rows, len(targets.y))
                for term, x, grad_x in zip(self.terms, xs, grads_x, strict=True):
                    if grad_x is not None:
                        product = self.converted(self.product(z.to(term.dtype).t(), self.rows_of(term, rows)))
                        grad_x.addcmul_(product, units.factor.unsqueeze(1))
                        if entropy is not None:
                            entropy -= product.mul_(x).sum(1) * share
                if entropy is not None and self.bias is not None:
                    entropy -= (self.bias[rows].to(z.dtype) @ z).to(entropy.dtype) * share
        return grads_x

    def _units(self, swept: _Swept, bound: Tensor, w: Tensor) -> _Units:
        """The targets' gradients come from their logits, computed as the sums were, so that 1 − p keeps its digits."""
        one, own = swept.total * (swept.bound - bound).exp(), self._exp_(swept.chosen - bound)
        scale = None
        if self.is_narrow or _may_exceed(one, LARGEST_UNIT):
            own /= one
            scale, one = one.reciprocal(), torch.ones_like(one)
        own -= one * (1 - self.label_smoothing + self.smoothed)
        return _Units(bound, scale, one, own, w * self.logit_scale / one)

    def _gradient(self, rows: slice, targets: _Targets, units: _Units) -> Tensor:
        """Replace exp(l − m) of a block by ∂ℓ/∂(Σ x Wᵀ + b), divided by the scale and in these units; add to ∂/∂b."""
        part = self._part(rows, len(targets.y))
        z, slope = part, None
        if self.softcap is not None:
            z, slope = self._scaled(rows, part)
            self._exp_(z.sub_(units.bound))
        if units.scale is not None:
            z.mul_(units.scale)
        if self.label_smoothing:
            z.sub_(units.one * self.smoothed)
        flat = z.view(-1)
        inside, at = targets.among(rows)
        own = torch.where(inside, units.own.to(z.dtype), flat.index_select(0, at))
        flat.index_copy_(0, at, own)  # scatter_ copies bfloat16
        if slope is not None:
            z.mul_(slope)
        if self.grad_bias is not None:
            self.grad_bias[rows] += z.to(self.exact) @ units.factor
        return part if z is part else part.copy_(z)

    def _blocks(self) -> list[slice]:
        size, end = self.block, self.vocabulary
        return [slice(start, min(start + size, end)) for start in range(0, end, size)]

    def _exp_(self, exponents: Tensor) -> Tensor:
        """exp, in place; for logits of 16 bits by the faster exp2, whose error of |l| 2⁻²³ is none beside theirs."""
        return exponents.exp_() if self.stored == self.exact else exponents.mul_(LOG2_E).exp2_()

    def _part(self, rows: slice, n: int) -> Tensor:
        """A block's part of the logits' memory, [block, n]; the same for all where it does not hold them all."""
        start = rows.start if len(self.logits) >= self.vocabulary * n else 0
        return self.logits[start * n : (start + rows.stop - rows.start) * n].view(-1, n)

    def _scaled(self, rows: slice, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of the raw products z, in z itself where it may be lost, and 1 − tanh² where they are capped."""
        logits = z
        if z.dtype != self.exact or self.softcap is not None:
            logits = self.scratch("logits", z.shape, self.exact).copy_(z)
        if self.bias is not None:
            logits.add_(self.bias[rows].unsqueeze(1))
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        if self.softcap is None:
            return logits, None
        logits.div_(self.softcap).tanh_()
        slope = 1 - logits.square()
        return logits.mul_(self.softcap), slope


def block_chunk_size(
    vocabulary: int, itemsize: int, device_type: str, *, width: int, positions: int, summed: int
) -> int:
    """The largest number of positions in a chunk, where a logit takes `itemsize` bytes and the head is [V, width].

    On CPUs these are 160 positions in 32 bits and 384 in 16 bits: the products run nearly as fast as with more, and
    the logits take less than a tenth of what 2,048 positions take in float32. Wide heads in 16 bits get 288, since
    their other buffers are larger. Small vocabularies get what fits into 16 MiB, other devices eight times as much.
    Half of all positions make a chunk where this takes no more memory than the float32 sums [V, summed] that it saves.
    """
    of_16_bits = LOGIT_BYTES_WIDE_16_BITS if width >= WIDE else LOGIT_BYTES_16_BITS
    usual = (of_16_bits if itemsize == 2 else LOGIT_BYTES) * (1 if device_type == "cpu" else 8)
    size = max(usual, SMALL_LOGITS // vocabulary) // itemsize
    half = -(-positions // 2)
    beyond = (half - size) * (itemsize * vocabulary + STATE_BYTES * width)
    return half if 0 < beyond <= 4 * vocabulary * summed else size


class _Targets:
    """The targets y [n] of a chunk: which of them lie in a block of the vocabulary, and where."""

    def __init__(self, y: Tensor) -> None:
        self.y, self.columns = y, torch.arange(len(y), device=y.device)
        self.places = y * len(y) + self.columns

    def among(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which targets lie in these rows, [n], and their flat places there; others get a place in their column."""
        inside = (self.y >= rows.start) & (self.y < rows.stop)
        return inside, torch.where(inside, self.places - rows.start * len(self.y), self.columns)


class _Swept(NamedTuple):
    """What the first sweep finds for each position."""

    bound: Tensor  # m
    total: Tensor  # Σ_v exp(l_v − m)
    chosen: Tensor  # the target's logit
    plain: Tensor  # Σ_v l_v, where label smoothing needs it
    groups: list[tuple[Tensor, list[slice]]]  # each m with the blocks whose exponentials were computed with it


class _Units(NamedTuple):
    """The units in which the gradient of blocks with a common m is computed."""

    bound: Tensor  # m
    scale: Tensor | None  # exp(l − m) is multiplied by it; None stands for 1
    one: Tensor  # what a probability of 1 is then
    own: Tensor  # ∂ℓ/∂l of the targets
    factor: Tensor  # w s / one


def _bound(logits: Tensor, stored: torch.dtype) -> Tensor:
    """A bound of each column's logits, rounded up to a multiple of `STEP` so that the next block seldom changes it.

    It is not rounded in float16, where exp(l − bound) would have fewer digits.
    """
    largest = logits.amax(0)
    return largest if stored == torch.float16 else largest.div_(STEP).ceil_().mul_(STEP)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two bounds are known to be equal; looked at on the CPU alone, to avoid a device sync."""
    if a.device.type != "cpu":
        return False
    return torch.equal(a, b)


def _may_leave_range(total: Tensor) -> bool:
    """Whether m = 0 is not enough: sums of exponentials are huge, or so small that they may be short of digits."""
    return _may_exceed(total, LARGEST_UNIT) or _may_exceed(total.reciprocal(), LARGEST_UNIT)


def _may_exceed(values: Tensor, largest: float) -> bool:
    """Whether a value may exceed `largest`; looked at on the CPU alone, to avoid a device sync."""
    if values.device.type != "cpu":
        return True
    return not bool((values <= largest).all())

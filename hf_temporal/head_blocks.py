"""A chunk of positions through the LM head, block of the vocabulary by block: losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .head_chunk import Head

SPAN = 16  # blocks whose share of ∂/∂x is one product, where none of its factors has to be converted
STEP = 8.0  # between bounds of the logits
LARGEST_UNIT = 2.0**60  # of sums of exponentials
LOG2_E = 1 / math.log(2)


def losses_by_blocks(
    head: Head, xs: Sequence[Tensor], y: Tensor, w: Tensor, buffer: Tensor, *, is_first: bool, is_last: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses [n] of a chunk, unweighted, and ∂ Σ w ℓ / ∂x of each of its x, [n, H].

    Logits stand as [V, n], whose product with W is the faster one on CPUs, and are met block by block, in cache.

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
    grads_x: list[Tensor | None] = [
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

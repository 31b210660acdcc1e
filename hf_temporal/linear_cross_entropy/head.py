"""What the backends share: the matrices of the LM head, and the gradients to which each chunk adds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


@dataclass(eq=False, repr=False)
class Term:
    """One product x Wᵀ in the sum of the logits, and the gradients that it needs."""

    matrix: Tensor  # W, [V, H]
    dtype: torch.dtype  # of the products
    needs_grad_x: bool
    grad_dtype: torch.dtype | None  # of ∂/∂W; None where it is not needed
    grad_matrix: Tensor | None = None  # ∂/∂W after the last chunk
    sums: Tensor | None = None  # ∂/∂W between the chunks, where `grad_matrix` has too few digits to accumulate it


@dataclass(eq=False, repr=False)
class TokenStatistics:
    """What is measured of each target token's logits while they are there; nothing of it is differentiated."""

    entropy: Tensor  # −Σ_v p_v log p_v, [N]
    is_top1: Tensor  # whether no logit is larger than the target's, [N]


@dataclass(eq=False, repr=False)
class Head(ABC):
    """The logits z = c tanh(s (Σ x Wᵀ + b) / c), their loss, and the gradients of b and the W, chunk after chunk."""

    terms: Sequence[Term]  # the x Wᵀ
    bias: Tensor | None  # b, [V]
    grad_bias: Tensor | None  # ∂/∂b so far; None where it is not needed
    logit_scale: float  # s
    softcap: float | None  # c; None for no tanh
    label_smoothing: float  # ε
    exact: torch.dtype  # of what is neither a matrix nor a logit
    stored: torch.dtype  # of the logits of a chunk
    measures: bool = False  # whether `measured` is wanted
    measured: TokenStatistics | None = None  # of the last chunk, [n]

    @property
    def vocabulary(self) -> int:
        return len(self.terms[0].matrix)

    @property
    def needs_gradient(self) -> bool:
        return self.grad_bias is not None or any(t.needs_grad_x or t.grad_dtype for t in self.terms)

    @property
    def narrow_terms(self) -> list[Term]:
        """Terms whose ∂/∂W has fewer digits than `exact`, so that more than two chunks need `sums`."""
        return [term for term in self.terms if term.grad_dtype not in (None, self.exact)]

    def make_gradients(self, chunks: int) -> None:
        """Allocate the gradients of the W that this many chunks will write; zeros if there is no chunk."""
        make = torch.empty_like if chunks else torch.zeros_like
        for term in self.terms:
            if term.grad_dtype is not None:
                term.grad_matrix = make(term.matrix, dtype=term.grad_dtype)
        if chunks > 2:
            for term in self.narrow_terms:
                term.sums = torch.empty_like(term.matrix, dtype=self.exact)

    @abstractmethod
    def chunk_size(self, positions: int) -> int:
        """The largest number of positions in a chunk, where there are so many in all."""

    @abstractmethod
    def reserve(self, positions: int) -> None:
        """Allocate memory for the logits of the largest chunk, which has this many positions."""

    @abstractmethod
    def losses(
        self, xs: Sequence[Tensor], y: Tensor, w: Tensor, *, is_first: bool, is_last: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The unweighted losses ℓ [n] of a chunk, and ∂ Σ w ℓ / ∂x of each term, [n, H], None where it is not wanted.

        Args:
            xs: x of each term, [n, H] in the dtype of its products; n is at most what was reserved.
            y: targets, int64 [n].
            w: weights, [n].
            is_first: whether the gradients so far are to be taken for zeros.
            is_last: whether `grad_matrix` has to hold the gradient of W afterwards.
        """


@torch.no_grad()
def statistics_of(logits: Tensor, y: Tensor) -> TokenStatistics:
    """The statistics of logits [n, V] with targets y [n]."""
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    chosen = logits.gather(-1, y[:, None])[:, 0]
    return TokenStatistics(-(log_p.exp() * log_p).sum(-1), chosen >= logits.amax(-1))


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype for products of operands of `dtype`: float32 for 16 bits that the processor would have to emulate."""
    if device_type != "cpu" or dtype not in NATIVE:
        return dtype
    # torch 2.6 is too old to tell
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dtype if any(capabilities.get(name) for name in NATIVE[dtype]) else torch.float32

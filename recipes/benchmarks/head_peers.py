"""The peers of `loss_head.py` and `loss_head_gpu.py`: losses of a head on one set of inputs, ours and those of others.

Packages of others are imported when a peer is asked for. What each of them is stands in those files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal import weighted_linear_cross_entropy

PRODUCTS, OURS, FALLBACK = "three products", "ours", "ours, PyTorch pass"
CPU = torch.device("cpu")
STOCK, BY_HAND = "stock mean", "weights by hand"


@dataclass(frozen=True)
class Inputs:
    """Leaves hidden [N, H], head [V, H] and, where there is one, bias [V]; targets [N]; weights [N], not uniform.

    Where a position is masked its target is −100 and its weight 0.
    """

    hidden: Tensor
    head: Tensor
    targets: Tensor
    weights: Tensor
    bias: Tensor | None = None

    @classmethod
    def make(
        cls,
        N: int,
        H: int,
        V: int,
        *,
        dtype: torch.dtype,
        device: torch.device = CPU,
        seed: int,
        bias: bool = False,
        masked: float = 0.0,
    ) -> Inputs:
        """Random inputs; exactly the share `masked` of the positions, at random places, has no target."""
        torch.manual_seed(seed)
        hidden = torch.randn(N, H, dtype=dtype, device=device)
        head = torch.randn(V, H, dtype=dtype, device=device).mul_(H**-0.5)
        targets, weights = torch.randint(V, (N,), device=device), torch.rand(N, device=device) + 0.5
        if masked:
            targets[torch.randperm(N, device=device)[: round(masked * N)]] = -100
            weights *= targets != -100
        last = torch.randn(V, dtype=dtype, device=device).requires_grad_() if bias else None
        return cls(hidden.requires_grad_(), head.requires_grad_(), targets, weights, last)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        leaves = {"hidden": self.hidden, "head": self.head}
        return leaves if self.bias is None else {**leaves, "bias": self.bias}

    def clear(self) -> None:
        """Forget the gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def double(self) -> Inputs:
        """The same in float64, as new leaves."""
        hidden, head, *bias = (leaf.detach().double().requires_grad_() for leaf in self.leaves.values())
        return Inputs(hidden, head, self.targets, self.weights.double(), *bias)


def weighted_mean(losses: Tensor, inputs: Inputs) -> Tensor:
    """Σ w ℓ / Σ w."""
    return (losses * inputs.weights).sum() / inputs.weights.sum()


def three_products(inputs: Inputs, of_targets: bool = False) -> None:
    """The floor, over all positions or over those that have a target."""
    hidden, head = inputs.hidden.detach(), inputs.head.detach()
    if of_targets:
        hidden = hidden[inputs.targets != -100]
    logits = hidden @ head.T
    _ = logits @ head, logits.T @ hidden


def ours(inputs: Inputs, chunk_size: int | None = None, **options: Any) -> Tensor:
    """Gradients in the forward pass, by chunks of positions."""
    tensors = (inputs.hidden, inputs.head, inputs.targets, inputs.weights / inputs.weights.sum())
    return weighted_linear_cross_entropy(*tensors, **{"bias": inputs.bias, "chunk_size": chunk_size} | options)


def ours_without_triton(inputs: Inputs, **options: Any) -> Tensor:
    """As where Triton is not installed."""
    from hf_temporal.linear_cross_entropy import triton_kernel  # not a public name

    with mock.patch.object(triton_kernel, "is_available", return_value=False):
        return ours(inputs, **options)


def stock_mean(inputs: Inputs) -> Tensor:
    """What a model of transformers does with labels."""
    return F.cross_entropy((inputs.hidden @ inputs.head.T).float(), inputs.targets)


def weights_by_hand(
    inputs: Inputs, logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """What users write."""
    logits = F.linear(inputs.hidden, inputs.head, inputs.bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, inputs.targets, reduction="none", label_smoothing=label_smoothing)
    return weighted_mean(losses, inputs)


def torch_chunked(inputs: Inputs, **policy: Any) -> Tensor:
    """The chunked loss of torch, per token."""
    options = torch.nn.LinearCrossEntropyOptions(**policy)
    losses = F.linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, reduction="none", options=options)
    return weighted_mean(losses, inputs)


class HeadOnly:
    """As much of a causal language model as TRL's fused head touches: its backbone returns the hidden states."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self.hidden, self.head = hidden, head
        self.config: Any = SimpleNamespace(get_text_config=lambda: self.config)

    def base_model(self, **_: Any) -> SimpleNamespace:
        """The hidden states, as one row."""
        return SimpleNamespace(last_hidden_state=self.hidden.unsqueeze(0))

    def get_output_embeddings(self) -> SimpleNamespace:
        """The head."""
        return SimpleNamespace(weight=self.head, bias=None)

    def forward(self, **_: Any) -> Any:
        """Replaced by trl."""


def log_probabilities_of_trl(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets [N], by TRL's fused head."""
    model: Any = HeadOnly(hidden, head)
    import_module("trl.trainer").add_fused_lm_head(model)
    return model.forward(shift_labels=targets.unsqueeze(0), fused_lm_head=True).log_probs.squeeze(0)


def trl_fused_head(inputs: Inputs) -> Tensor:
    """TRL's log-probabilities, times the weights."""
    return weighted_mean(-log_probabilities_of_trl(inputs.hidden, inputs.head, inputs.targets), inputs)


def liger(inputs: Inputs, reduction: str, accum_dtype: torch.dtype | None = None) -> Tensor:
    """Liger's fused linear cross-entropy."""
    function = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    loss = function(inputs.hidden, inputs.head, inputs.targets, reduction=reduction, accum_dtype=accum_dtype)
    return weighted_mean(loss, inputs) if reduction == "none" else loss


def cut_cross_entropy(inputs: Inputs, filter_eps: str | None) -> Tensor:
    """Apple's cut cross-entropy."""
    function = import_module("cut_cross_entropy").linear_cross_entropy
    losses = function(inputs.hidden, inputs.head, inputs.targets, reduction="none", filter_eps=filter_eps)
    return weighted_mean(losses, inputs)


@dataclass(frozen=True)
class Peer:
    """How to compute a loss; what has to be there for it; whether it has weights and the options of `CHECKS`."""

    loss: Callable[..., Tensor | None]
    module: str | None = None
    gpu_only: bool = False
    weighted: bool = True
    has_options: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be run here."""
        if self.gpu_only and device.type == "cpu":
            return "needs a GPU"
        if self.loss is torch_chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has none"
        try:
            import_module(self.module or "torch")
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            return f"cannot be imported: {first_line(error)}"
        return None

    def run(self, inputs: Inputs, **options: Any) -> Tensor | None:
        """Loss, and gradients in the leaves."""
        loss = self.loss(inputs, **options)
        if loss is not None:
            loss.backward()
        return loss


LIGER, CCE = "liger_kernel.transformers.functional", "cut_cross_entropy"
PEERS: dict[str, Peer] = {
    PRODUCTS: Peer(three_products, weighted=False),
    OURS: Peer(ours, has_options=True),
    FALLBACK: Peer(ours_without_triton, has_options=True),
    STOCK: Peer(stock_mean, weighted=False),
    BY_HAND: Peer(weights_by_hand, has_options=True),
    "torch chunked": Peer(torch_chunked),
    "TRL fused head": Peer(trl_fused_head, "trl.trainer"),
    "Liger mean": Peer(partial(liger, reduction="mean"), LIGER, gpu_only=True, weighted=False),
    "Liger mean, float32 sums": Peer(
        partial(liger, reduction="mean", accum_dtype=torch.float32), LIGER, gpu_only=True, weighted=False
    ),
    "Liger × weights": Peer(partial(liger, reduction="none", accum_dtype=torch.float32), LIGER, gpu_only=True),
    "CCE exact": Peer(partial(cut_cross_entropy, filter_eps=None), CCE, gpu_only=True),
    "CCE filtered": Peer(partial(cut_cross_entropy, filter_eps="high"), CCE, gpu_only=True),
}


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]

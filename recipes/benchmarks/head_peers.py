"""The peers of `loss_head.py`: losses of a head on one set of inputs, ours and those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_temporal import weighted_linear_cross_entropy
from hf_temporal.linear_cross_entropy import triton_kernel
from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy_terms

PRODUCTS, TARGET_PRODUCTS = "three products", "… of the targets"
STOCK, BY_HAND, OURS, TRITONLESS = "stock mean", "weights by hand", "ours", "ours, PyTorch pass"
POLICIES = ("auto", "accurate", "balanced", "compact")


@dataclass(frozen=True)
class Inputs:
    """Leaves hidden [N, H], head [V, H] and bias [V], which most peers leave out; targets [N]; weights [N].

    Where a position is masked its target is −100 and its weight 0. The other weights are not uniform.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def make(
        cls, N: int, H: int, V: int, *, dtype: torch.dtype, seed: int, masked: float = 0.0, device: str = "cpu"
    ) -> Inputs:
        """Random inputs; exactly the share `masked` of the positions, at random places, has no target."""
        torch.manual_seed(seed)
        hidden = torch.randn(N, H, dtype=dtype, device=device)
        head = torch.randn(V, H, dtype=dtype, device=device).mul_(H**-0.5)
        bias = torch.randn(V, dtype=dtype, device=device)
        targets, weights = torch.randint(V, (N,), device=device), torch.rand(N, device=device) + 0.5
        if masked:
            targets[torch.randperm(N, device=device)[: round(masked * N)]] = -100
            weights *= targets != -100
        return cls(hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), targets, weights)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "head": self.head, "bias": self.bias}

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def double(self) -> Inputs:
        """The same in float64, as new leaves."""
        hidden, head, bias = (leaf.detach().double().requires_grad_() for leaf in self.leaves.values())
        return Inputs(hidden, head, bias, self.targets, self.weights.double())


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


def ours(inputs: Inputs, with_bias: bool = False, frozen: bool = False, **options: Any) -> Tensor:
    """Gradients in the forward pass, by chunks of positions."""
    head = inputs.head.detach() if frozen else inputs.head
    weights = inputs.weights / inputs.weights.sum()
    bias = inputs.bias if with_bias else None
    return weighted_linear_cross_entropy(inputs.hidden, head, inputs.targets, weights, bias=bias, **options)


def ours_with_adapter(inputs: Inputs) -> Tensor:
    """With an adapter of rank 8 on a frozen head: no gradient of the head's size."""
    down = torch.full_like(inputs.hidden[:1], 0.1).repeat(8, 1).detach().requires_grad_()
    up = torch.full_like(inputs.head[:, :1], 0.1).repeat(1, 8).detach().requires_grad_()
    terms = [(inputs.hidden, inputs.head.detach()), (inputs.hidden @ down.T, up)]
    return weighted_linear_cross_entropy_terms(terms, inputs.targets, inputs.weights / inputs.weights.sum())


def ours_where(inputs: Inputs, owner: Any, name: str, found: Any) -> Tensor:
    """As on a machine where a function of `owner` finds something else."""
    with mock.patch.object(owner, name, return_value=found):
        return ours(inputs)


def stock_mean(inputs: Inputs) -> Tensor:
    """What a model of transformers does with labels."""
    return F.cross_entropy((inputs.hidden @ inputs.head.T).float(), inputs.targets)


def weights_by_hand(
    inputs: Inputs,
    with_bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What users write."""
    logits = F.linear(inputs.hidden, inputs.head, inputs.bias if with_bias else None)
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


class HeadOnly(SimpleNamespace):
    """As much of a causal language model as TRL's fused head touches: its backbone returns the hidden states."""

    def forward(self, **_: Any) -> Any:
        """Replaced by trl."""


def trl_fused_head(inputs: Inputs) -> Tensor:
    """The log-probabilities of TRL's fused head, times the weights."""
    model: Any = HeadOnly(
        config=SimpleNamespace(get_text_config=lambda: model.config),
        base_model=lambda **_: SimpleNamespace(last_hidden_state=inputs.hidden.unsqueeze(0)),
        get_output_embeddings=lambda: SimpleNamespace(weight=inputs.head, bias=None),
    )
    import_module("trl.trainer").add_fused_lm_head(model)
    found = model.forward(shift_labels=inputs.targets.unsqueeze(0), fused_lm_head=True)
    return weighted_mean(-found.log_probs.squeeze(0), inputs)


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
    """How a loss is computed; `weights_by_hand` with the same options is what it is checked against."""

    loss: Callable[..., Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    device: str | None = None  # where alone it runs
    weighted: bool = True  # whether it computes what `weights_by_hand` does

    def run(self, inputs: Inputs) -> Tensor | None:
        """Loss, and gradients in the leaves."""
        loss = self.loss(inputs, **self.options)
        if loss is not None:
            loss.backward()
        return loss


PEERS: dict[str, Peer] = {
    PRODUCTS: Peer(three_products, weighted=False),
    TARGET_PRODUCTS: Peer(partial(three_products, of_targets=True), weighted=False),
    STOCK: Peer(stock_mean, weighted=False),
    BY_HAND: Peer(weights_by_hand),
    **{f"torch {policy}": Peer(partial(torch_chunked, acc_policy=policy)) for policy in POLICIES},
    "TRL": Peer(trl_fused_head),
    "Liger mean": Peer(partial(liger, reduction="mean"), device="cuda", weighted=False),
    "Liger × weights": Peer(partial(liger, reduction="none", accum_dtype=torch.float32), device="cuda"),
    "CCE exact": Peer(partial(cut_cross_entropy, filter_eps=None), device="cuda"),
    "CCE filtered": Peer(partial(cut_cross_entropy, filter_eps="high"), device="cuda"),
    OURS: Peer(ours),
    TRITONLESS: Peer(partial(ours_where, owner=triton_kernel, name="is_available", found=False), device="cuda"),
    "ours, soft cap": Peer(ours, {"softcap": 30.0}),
    "ours, scale and bias": Peer(ours, {"with_bias": True, "logit_scale": 0.5}),
    "ours, label smoothing": Peer(ours, {"label_smoothing": 0.1}),
    "ours, adapter": Peer(ours_with_adapter, weighted=False),
    "ours, frozen head": Peer(partial(ours, frozen=True)),
    "ours, 16 bits emulated": Peer(
        partial(ours_where, owner=torch.cpu, name="get_capabilities", found={}), device="cpu"
    ),
}

"""Weighted losses on aligned tensors: they return (Σ wℓ, Σ w), and the caller divides."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .positions import IGNORE_INDEX, check_choice, check_integers, is_target
from .weighting import REGRESSION_LOSSES, check_weights


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Σ_i w_i ℓ_i and Σ_i w_i over the target tokens, with ℓ_i = −log softmax(logits_i)[labels_i].

    With smoothing ε: ℓ_i = −(1 − ε) log p_i[labels_i] − (ε/V) Σ_v log p_i[v].
    Computed in float32 (float64 for float64 logits), whatever the dtype of the logits.

    Args:
        logits: `[..., V]`, aligned with the labels (already shifted).
        labels: `[...]` integers, −100 where there is no target.
        weights: `[...]`, one weight per label; ignored where there is no target.

    Returns:
        Two 0-dim tensors; the first carries the gradient. Both are 0 where there is no target.

    Raises:
        ValueError, TypeError: shapes that do not fit, labels that are no integers, `label_smoothing` out of [0, 1);
            on the CPU also a label outside the vocabulary, or a target's weight that is negative or not finite.
    """
    losses = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return _weighted_sum(losses, weights, labels)


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy ℓ of each token, 0 where there is no target; arguments of `weighted_cross_entropy`."""
    check_integers("labels", labels)
    if logits.shape[:-1] != labels.shape or not logits.shape[-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(logits.shape)}; accepted: labels of shape "
            f"{tuple(logits.shape[:-1])}, one per position of the logits."
        )
    check_label_smoothing(label_smoothing)
    check_vocabulary(labels, logits.shape[-1])
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)),
        labels.reshape(-1).to(logits.device, torch.long),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape)


def check_label_smoothing(value: float) -> None:
    """Raise a `ValueError` where ε is out of range."""
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing={value!r} is out of range; accepted: 0 ≤ label_smoothing < 1.")


def check_vocabulary(labels: Tensor, size: int) -> None:
    """Raise a `ValueError` where a label on the CPU is neither −100 nor in [0, size)."""
    if labels.device.type != "cpu":
        return
    outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= size))
    if outside.any():
        raise ValueError(
            f"labels hold {labels[outside][0].item()}; accepted: token ids from 0 to {size - 1}, the model's "
            f"vocabulary, and {IGNORE_INDEX} where there is no target."
        )


def weighted_regression_loss(
    predictions: Tensor, targets: Tensor, weights: Tensor, *, kind: str = "squared"
) -> tuple[Tensor, Tensor]:
    """Σ_i w_i ℓ_i and Σ_i w_i, with ℓ_i = mean over trailing dimensions of (ŷ_i − y_i)², or of |ŷ_i − y_i|.

    Args:
        predictions: `[batch, time, ...]`; a trailing dimension of 1 that the targets lack is dropped.
        targets: `[batch, time, ...]`, NaN where there is no target.
        weights: `[batch, time]`.
        kind: `"squared"` or `"absolute"`. The weight multiplies the error after the square.

    Raises:
        ValueError: shapes that do not fit, an unknown `kind`; on the CPU also an infinite target, or a target's weight
            that is negative or not finite.
    """
    return _weighted_sum(token_regression_loss(predictions, targets, kind=kind), weights, targets)


def token_regression_loss(predictions: Tensor, targets: Tensor, *, kind: str = "squared") -> Tensor:
    """The error ℓ of each time, 0 where there is no target; arguments of `weighted_regression_loss`."""
    check_choice("kind", kind, REGRESSION_LOSSES)
    if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"labels have shape {tuple(targets.shape)} and predictions {tuple(predictions.shape)}; accepted: equal "
            "shapes."
        )
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    targets = targets.to(predictions)
    if targets.device.type == "cpu" and targets.isinf().any():
        raise ValueError("labels hold inf; accepted: finite numbers, and NaN where there is no target.")
    error = predictions - targets.where(~targets.isnan(), 0.0)
    error = error.square() if kind == "squared" else error.abs()
    return (error.flatten(2).mean(-1) if error.dim() > 2 else error) * is_target(targets)


def _weighted_sum(losses: Tensor, weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if weights.shape != losses.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; accepted: {tuple(losses.shape)}, one per label.")
    weights = weights.to(losses).where(is_target(labels).to(losses.device), 0.0)
    if weights.device.type == "cpu":  # elsewhere it would cost a device sync
        check_weights("weights", weights)
    return (weights * losses).sum(), weights.sum()

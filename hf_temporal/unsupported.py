"""What a position-weighted loss cannot be combined with, told before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer


def check_arguments(given: Mapping[str, Any]) -> None:
    """Look at the arguments that a trainer is made with.

    Raises:
        ValueError: `compute_loss_func`, or a cross-entropy of Liger's.
    """
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func cannot be combined with a position-weighted loss: it never sees the positions. "
            "Accepted instead: TemporalWeighting(weight_fn=...) for a shape of your own, or a loss_weights column."
        )
    args = given.get("args")
    if not getattr(args, "use_liger_kernel", False):
        return
    config = getattr(args, "liger_kernel_config", None) or {}
    if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
        raise ValueError(
            f"use_liger_kernel=True with liger_kernel_config={config or None}: Liger's cross-entropy knows no "
            "weights. Accepted: liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}; "
            "the fused head here takes its place."
        )


def check_engine(trainer: Trainer) -> None:
    """Look at how a trainer shares its batches among devices.

    Raises:
        ValueError: `nn.DataParallel`, or DeepSpeed's sequence parallelism.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={trainer.args.n_gpu}: nn.DataParallel splits the batch after its weights are summed. Accepted "
            "instead: one process per GPU, `accelerate launch` or `torchrun`."
        )
    if trainer.get_sp_size() > 1:
        raise ValueError(
            f"parallelism_config.sp_size={trainer.get_sp_size()}: under DeepSpeed's sequence parallelism the trainer "
            "takes the model's own loss. Accepted: sp_size=1; cp_size > 1 splits sequences, too, and is weighted."
        )

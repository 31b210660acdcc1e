"""What a position-weighted loss cannot be combined with, told before training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainer, Trainer, TrainerCallback


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` where a trainer's arguments ask for a cross-entropy of Liger's."""
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


def check_loss_func(trainer: Trainer) -> None:
    """Raise a `ValueError` where there is a `compute_loss_func`, which may be set at any time."""
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func cannot be combined with a position-weighted loss: it never sees the positions. "
            "Accepted instead: TemporalWeighting(weight_fn=...) for a shape of your own, a loss_weights column, or "
            "power=0 without one."
        )


def check_order(kind: type, mixin: type) -> None:
    """Raise a `TypeError` where the mixin stands behind transformers' trainer, whose methods then hide its own.

    So does a method of another base that has the name of one of the mixin's own.
    """
    order = kind.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        names = ", ".join(base.__name__ for base in kind.__bases__)
        raise TypeError(
            f"class {kind.__name__}({names}): {mixin.__name__} behind the trainer changes nothing. Accepted: "
            f"class {kind.__name__}({mixin.__name__}, ...), the mixin first."
        )
    ours = {name for base in mixin.__mro__ if _is_ours(base) for name in vars(base) if not name.startswith("__")}
    for base in order:
        if _is_ours(base) or issubclass(Seq2SeqTrainer, base):
            continue
        if taken := sorted(name for name in ours & vars(base).keys() if not hasattr(Seq2SeqTrainer, name)):
            raise TypeError(
                f"{base.__name__}.{taken[0]} has the name of a method that {mixin.__name__} needs for itself. "
                "Accepted: another name for it."
            )


def check_is_trainer(trainer: Any, mixin: type) -> None:
    """Raise a `TypeError` where what the mixin is in front of is no trainer of transformers'."""
    if not isinstance(trainer, Trainer):
        names = ", ".join(f"{base.__module__}.{base.__name__}" for base in type(trainer).__bases__)
        raise TypeError(
            f"class {type(trainer).__name__}({names}): no subclass of transformers.Trainer, whose batches and loss "
            f"{mixin.__name__} changes. Accepted: {mixin.__name__} in front of a subclass, such as the trainer that "
            "this one trains with."
        )


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __package__


@dataclass(eq=False)
class LossCheck(TrainerCallback):
    """Calls `check` once the gradients of an optimizer step are there."""

    check: Callable[[], None]

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.check()


def check_engine(trainer: Trainer) -> None:
    """Raise a `ValueError` under `nn.DataParallel`, or DeepSpeed's sequence parallelism."""
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

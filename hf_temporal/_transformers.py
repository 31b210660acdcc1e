"""The private parts of transformers that this package relies on, each in one function.

They are private because transformers offers nothing else for it, and they differ between releases: transformers 5.0
is the oldest that is known here. `tests/test_private_interfaces.py` has a test for each that names it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import PreTrainedModel, Trainer, trainer_utils
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import PushInProgress

_KNOWS_SCALED_LOSSES = hasattr(Trainer, "loss_is_scaled_for_ga")

if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object  # of mixins that stand in front of any trainer


def shifts_by_class(base: Any, *, default: bool = False) -> bool:
    """Whether a model shifts its labels, as the loss function that it names in `LOSS_MAPPING` tells.

    `default` is the answer for a transformers model whose loss is not there; any other model is taken not to shift.
    """
    if not isinstance(base, PreTrainedModel) or getattr(base.config, "is_encoder_decoder", False):
        return False
    name = str(getattr(base, "loss_type", None))
    return LOSS_MAPPING.get(name, ForCausalLMLoss if default else None) is ForCausalLMLoss


def keep_columns(trainer: Trainer, columns: Iterable[str]) -> None:
    """Adds to the columns that the trainer does not remove from a data set, once it has collected them.

    They stand in `_signature_columns`, which `_set_signature_columns_if_needed` fills from the model's forward.
    """
    kept: Any = trainer._signature_columns
    kept.extend(column for column in columns if column not in kept)


def split_between_ranks(context: Callable[[], Any], buffer: Tensor) -> Callable[[], Any]:
    """Adds a tensor of shape [batch, time] to those that context parallelism splits, in place, like the labels.

    `context` is what `_prepare_context_parallel_inputs` returns, a partial of accelerate's `maybe_context_parallel`;
    anything else, under which the tensor would silently stay whole, is a `TypeError`.
    """
    if not isinstance(context, functools.partial) or not {"buffers", "buffer_seq_dims"} <= context.keywords.keys():
        raise TypeError(
            f"_prepare_context_parallel_inputs of this release of transformers returns {context!r}; accepted: a "
            "partial with buffers and buffer_seq_dims. The weights cannot be split between ranks: set cp_size=1."
        )
    split = context.keywords
    return functools.partial(
        context,
        buffers=[*split["buffers"], buffer],
        buffer_seq_dims=[*split["buffer_seq_dims"], 1],
        no_restore_buffers={*split.get("no_restore_buffers", ()), buffer},
    )


def divides_by_accumulation_steps(trainer: Any, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether `training_step` divides the loss by the number of accumulated micro-batches.

    `loss_is_scaled_for_ga` says so from 5.19 on, unless it is None; before there was no such attribute.
    """
    scaled = trainer.loss_is_scaled_for_ga if _KNOWS_SCALED_LOSSES else None
    if scaled is not None:
        return not scaled
    counts_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counts_items and trainer.compute_loss_func is None


def init_hub_repository(trainer: Trainer, *, token: str | None, private: bool | None) -> None:
    """`init_hf_repo`, which takes `private` from 5.23 on and before from `hub_private_repo` of the arguments alone."""
    if private is None:
        trainer.init_hf_repo(token=token)
    elif "private" in inspect.signature(trainer.init_hf_repo).parameters:
        trainer.init_hf_repo(token=token, private=private)
    else:
        with attribute(trainer.args, "hub_private_repo", private):
            trainer.init_hf_repo(token=token)


def pushes_in_progress(trainer: Trainer) -> list[Future[CommitInfo]]:
    """The uploads of checkpoints, which the trainer keeps in `push_in_progress` and waits for when training ends."""
    progress: Any = trainer.push_in_progress
    return [] if progress is None else progress.jobs


def set_pushes_in_progress(trainer: Trainer, pushes: list[Future[CommitInfo]]) -> None:
    """Those that the trainer waits for."""
    progress: Any = PushInProgress()
    progress.jobs = pushes
    trainer.push_in_progress = progress if pushes else None


def wait_for_pushes(trainer: Trainer) -> None:
    """Waits until the uploads of checkpoints are done; one that failed raises nothing here."""
    trainer._finish_current_push()


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """What `Trainer.train` does before it begins: the model's configurations get the tokenizer's special tokens.

    A function of `transformers.trainer_utils`, and a method of the trainer in 5.0.
    """
    if hasattr(trainer_utils, "align_special_tokens"):
        trainer_utils.align_special_tokens(model, tokenizer)
    else:
        old: Any = Trainer
        old._align_special_tokens(SimpleNamespace(model=model, processing_class=tokenizer))


def forget_eval_dataloaders(trainer: Trainer) -> None:
    """Drops the data loaders that the trainer keeps for evaluation while their workers live on."""
    trainer.__dict__.pop("_eval_dataloaders", None)


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Any:
    """While it is open, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

"""What this package asks of TRL, which is loaded only where a trainer of its kind is: `SFTTrainer` from 1.16 on.

Its `compute_loss` calls the model with `fused_lm_head=True`, upon which TRL's own head returns `log_probs`, `entropy`,
`is_top1` and `label_mask` of each label, which it sums and divides by the number of items. `tests/test_trl.py` has a
test for what is relied on here.
"""

import sys
from typing import Any

from transformers import Trainer

FUSED_HEAD = "fused_lm_head"
KNOWN_MODULES = ("trl.trainer.sft_trainer", "trl.trainer.base_trainer")  # whose compute_loss needs no logits


def is_sft(kind: type) -> bool:
    """Whether a class of trainers is TRL's `SFTTrainer` or a subclass of it."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    return module is not None and issubclass(kind, module.SFTTrainer)


def is_sft_collator(collator: Any) -> bool:
    """Whether a data collator is the one that `SFTTrainer` makes for text, padding on the right."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    return module is not None and type(collator) is module.DataCollatorForLanguageModeling


def has_other_loss(trainer: Trainer) -> bool:
    """Whether an `SFTTrainer` minimises another loss than the model's own."""
    return is_sft(type(trainer)) and getattr(trainer.args, "loss_type", "nll") != "nll"


def check_loss_type(trainer: Trainer) -> None:
    """Raise a `ValueError` under `loss_type="dft"`, a loss that is not the model's own."""
    if has_other_loss(trainer):
        raise ValueError(
            f"loss_type={getattr(trainer.args, 'loss_type', None)!r} of {type(trainer).__name__} weights each token "
            "by its probability, beside a position-weighted loss. Accepted: loss_type='nll', or power=0."
        )


def check_sft_arguments(kind: type, given: dict[str, Any], column: str) -> None:
    """Raise a `TypeError` where an `SFTTrainer` is made with arguments without SFTConfig's fields.

    Weights in `column` that packing, flattening or tokenizing would lose are a `ValueError`.
    """
    if not is_sft(kind):
        return
    args: Any = given.get("args")
    data: Any = given.get("train_dataset")
    config = sys.modules["trl.trainer.sft_trainer"].SFTConfig
    if args is not None and not isinstance(args, config) and hasattr(args, "temporal_power"):
        raise TypeError(
            f"args is a {type(args).__name__}, which {kind.__name__} would turn into an SFTConfig without the "
            "temporal_* fields; accepted: hf_temporal.trl.TemporalSFTConfig, or an SFTConfig beside weighting=."
        )
    if column not in (getattr(data, "column_names", None) or ()):
        return
    lost = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    if lost:
        raise ValueError(
            f"{lost[0]}=True beside a {column} column, which TRL's {lost[0]} leaves out. Accepted: "
            f"{lost[0]}=False, or rows that are packed already (input_ids, labels, position_ids, {column})."
        )
    if "input_ids" not in data.column_names:
        raise ValueError(
            f"a {column} column beside text that SFTTrainer tokenizes: which weight is which token's? Accepted: "
            "rows of input_ids and labels, tokenized before."
        )

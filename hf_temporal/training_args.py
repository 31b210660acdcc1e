"""`TrainingArguments` with the fields of a position-weighted loss."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .positions import ORIGINS, check_choice
from .schedules import SCHEDULES, validate_schedule
from .weighting import NORMALIZATIONS, TemporalWeighting

FUSED_HEAD_MODES = ("auto", "on", "off")


def _field(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": text} | ({"choices": [*choices]} if choices else {}))


@dataclass(repr=False)
class TemporalFields:
    """The `temporal_*` fields, to stand in front of a configuration, see `TemporalTrainingArguments`."""

    temporal_power: float = _field(1.0, "p of the weight t^p: 0 is the usual loss, inf the last target token alone.")
    temporal_origin: str = _field("target", "Where t starts: target, sequence or turn.", ORIGINS)
    temporal_normalization: str = _field(
        "sequence",
        "sequence: mean weight 1 in each document; batch: divided by the sum of the weights; tokens: t^p divided by "
        "the number of target tokens.",
        NORMALIZATIONS,
    )
    temporal_mixture: float = _field(
        1.0, "Share of the weighted loss beside the usual one; below 1 under sequence alone."
    )
    temporal_power_schedule: str = _field(
        "constant",
        "How p goes from temporal_power_start to temporal_power: constant (temporal_power throughout), linear or "
        "cosine.",
        SCHEDULES,
    )
    temporal_power_start: float = _field(0.0, "p at the first step of a linear or cosine schedule.")
    temporal_power_warmup_ratio: float = _field(1.0, "Share of max_steps after which temporal_power is reached.")
    temporal_fused_head: str = _field(
        "auto",
        "Compute LM head and loss together, without the logits: auto (where it is exact for the model and pays), on "
        "(an error where it is not exact) or off.",
        FUSED_HEAD_MODES,
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the defaults of a configuration that stands behind ours, as of SFTConfig in

        @dataclass class Arguments(TemporalTrainingArguments, SFTConfig). A dataclass takes a field from the first of
        its bases that has it, be it inherited there; here it is the first that defines it, as for any attribute.
        """
        super().__init_subclass__(**kwargs)
        defined: dict[str, type] = {}
        for base in cls.__mro__[1:]:
            defined |= {name: base for name in inspect.get_annotations(base) if name not in defined}
        inherited: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= getattr(base, "__dataclass_fields__", {})
        own = inspect.get_annotations(cls)
        for name, given in inherited.items():
            meant = getattr(defined.get(name), "__dataclass_fields__", {}).get(name, given)
            if meant is not given and name not in own:
                own[name] = meant.type
                setattr(cls, name, copy.copy(meant))
        cls.__annotations__ = own

    def __post_init__(self) -> None:
        fields = {each.name for each in dataclasses.fields(self)}
        missing = {name for base in type(self).__mro__ for name in getattr(base, "__dataclass_fields__", ())} - fields
        if missing:
            raise TypeError(
                f"{type(self).__name__} lacks the fields {', '.join(sorted(missing)[:3])}, ... of one of its bases; "
                "accepted: the class with @dataclass in front of it."
            )
        for name in ("temporal_power", "temporal_mixture", "temporal_power_start", "temporal_power_warmup_ratio"):
            value: Any = getattr(self, name)
            try:
                setattr(self, name, float(value))  # YAML reads 5e-1 as a string
            except (TypeError, ValueError):
                raise ValueError(f"{name}={value!r} is not a number; accepted: a float.") from None
        self.validate_temporal_fields()
        super().__post_init__()  # type: ignore[misc]

    def validate_temporal_fields(self) -> None:
        """Raise a `ValueError` that names the field whose value is not accepted."""
        check_choice("temporal_fused_head", self.temporal_fused_head, FUSED_HEAD_MODES)
        self.validate_schedule(self.temporal_power)
        self.temporal_weighting()

    def validate_schedule(self, power: float) -> None:
        """Raise a `ValueError` where the schedule is unknown or cannot reach this power."""
        validate_schedule(**self.power_schedule(power))

    def power_schedule(self, end: float) -> dict[str, Any]:
        """The arguments of `power_at` for a schedule that ends at this power."""
        start, ratio = self.temporal_power_start, self.temporal_power_warmup_ratio
        return {"schedule": self.temporal_power_schedule, "start": start, "end": end, "warmup_ratio": ratio}

    def temporal_weighting(self) -> TemporalWeighting:
        """The weighting that the fields describe, at the final power; a `ValueError` names a field that is wrong."""
        try:
            return TemporalWeighting(
                power=self.temporal_power,
                origin=self.temporal_origin,
                normalization=self.temporal_normalization,
                mixture=self.temporal_mixture,
            )
        except ValueError as error:
            raise ValueError(f"temporal_{error}") from None


@dataclass(repr=False)  # TrainingArguments' own leaves out the tokens
class TemporalTrainingArguments(TemporalFields, TrainingArguments):
    """`TrainingArguments` plus the `temporal_*` fields of `TemporalWeightTrainer`, whose `help` says what they mean.

    They are those of `TemporalWeighting`, `target_positions` (origin) and `power_at` (schedule, start, warmup ratio).

    Raises:
        ValueError: a field whose value is not accepted.
    """


@dataclass(repr=False)
class TemporalSeq2SeqTrainingArguments(TemporalFields, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` plus the `temporal_*` fields, see `TemporalTrainingArguments`."""

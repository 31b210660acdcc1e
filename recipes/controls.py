"""Controls of the laboratory: weightings that share one thing with t^p and lack the other.

t^p weighs late tokens more, and it makes weights uneven. A loss on the late part alone asks whether the power's shape
matters; the same weights in random order ask whether the position does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_temporal.training_args import TemporalTrainingArguments
from hf_temporal.weighting import TemporalWeighting, WeightFunction

CONTROLS = ("power", "late", "shuffled")
ACCEPTED = {
    "temporal_power_schedule": "constant",
    "temporal_origin": "target",
    "temporal_normalization": "sequence",
}


@dataclass
class ControlArguments:
    """What takes the place of t^p."""

    control: str = field(
        default="power",
        metadata={
            "help": "power: t^p; late: the last 1/(p + 1) of the target alone; shuffled: the weights of t^p in random "
            "order, drawn anew for each loss.",
            "choices": [*CONTROLS],
        },
    )


def controlled(arguments: ControlArguments, training_args: TemporalTrainingArguments) -> TemporalWeighting | None:
    """The control's weighting at the training's p; None for t^p itself.

    Raises ValueError for p < 0 and for settings under which t or the weights do not begin anew with each document.
    """
    power = training_args.temporal_power
    if arguments.control == "power":
        return None
    if power < 0:
        raise ValueError(f"control={arguments.control!r} with temporal_power={power!r}; accepted: p ≥ 0")
    for name, accepted in ACCEPTED.items():
        if getattr(training_args, name) != accepted:
            raise ValueError(
                f"control={arguments.control!r} with {name}={getattr(training_args, name)!r}; accepted: {accepted!r}"
            )
    shape = late(power) if arguments.control == "late" else shuffled(power)
    return TemporalWeighting(power=power, origin="target", normalization="sequence", weight_fn=shape)


def late(power: float) -> WeightFunction:
    """1 on the last 1/(p + 1) of the target, one token at least, else 0.

    Its largest weight is that of t^p where there are many tokens, p + 1, once the mean is 1.
    """
    share = 1 / (power + 1)

    def weights(t: Tensor, T: Tensor) -> Tensor:
        return (t > T - (T * share).ceil().clamp(min=1)).to(t.dtype)

    return weights


def shuffled(power: float) -> WeightFunction:
    """(t/T)^p, permuted at random within each document; times of a document follow one another."""

    def weights(t: Tensor, T: Tensor) -> Tensor:
        document = torch.cat([t.new_zeros(1), (t.diff() <= 0).to(t.dtype)]).cumsum(0)
        order = (document + torch.rand_like(t)).argsort()
        ratio = (t / T)[order]
        return (ratio == 1).to(t.dtype) if math.isinf(power) else ratio**power

    return weights

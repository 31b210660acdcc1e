"""Controls: weightings that share one thing with t^p and lack another.

t^p weighs late tokens more, and it makes weights uneven. A loss on the late part alone asks whether the power's shape
matters; the same weights in random order ask whether the position does; a cap, or the usual weight for the last token,
whether the few large weights do.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_temporal.data import argument
from hf_temporal.training_args import TemporalTrainingArguments
from hf_temporal.weighting import TemporalWeighting

from .tasks import TaskArguments

CONTROLS = ("power", "late", "shuffled", "capped", "last_exempt")
CAP = 2.0
ACCEPTED = {  # under others t or the weights do not begin anew with each document
    "temporal_power_schedule": "constant",
    "temporal_origin": "target",
    "temporal_normalization": "sequence",
    "temporal_mixture": 1.0,
}


@dataclass
class ControlArguments:
    """What takes the place of t^p."""

    control: str = argument(
        "power",
        "power: t^p; late: the last 1/(p + 1) of the target alone; shuffled: the weights of t^p in random "
        "order, drawn anew for each loss; capped: t^p, cut off at twice the mean; last_exempt: the last "
        "token has the weight 1, and the others that of t^p with mean 1.",
        CONTROLS,
    )


def controlled(arguments: ControlArguments, training_args: TemporalTrainingArguments) -> TemporalWeighting | None:
    """The control's weighting at the training's p; None for t^p itself."""
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

    def weights(t: Tensor, T: Tensor) -> Tensor:
        return SHAPES[arguments.control](t, T, power)

    weights.__qualname__ = arguments.control  # by which the model card calls it
    return TemporalWeighting(power=power, origin="target", normalization="sequence", weight_fn=weights)


def check_no_power_is_sought(arguments: ControlArguments, task_args: TaskArguments) -> None:
    """Raise a `ValueError` where a p is to be suggested or searched for a control."""
    if arguments.control != "power" and (task_args.suggest_power or task_args.search_power):
        raise ValueError(
            f"control={arguments.control!r} has a weighting of its own, so that no p can be suggested or searched; "
            "accepted: control='power', or neither --suggest_power nor --search_power"
        )


def late(t: Tensor, T: Tensor, power: float) -> Tensor:
    """1 on the last 1/(p + 1) of the target, one token at least, else 0.

    Its largest weight is that of t^p where there are many tokens, p + 1, once the mean is 1.
    """
    return (t > T - (T / (power + 1)).ceil().clamp(min=1)).to(t.dtype)


def shuffled(t: Tensor, T: Tensor, power: float) -> Tensor:
    """(t/T)^p, permuted at random within each document; times of a document follow one another."""
    order = (_document(t) + torch.rand_like(t)).argsort()
    return _power((t / T)[order], power)


def capped(t: Tensor, T: Tensor, power: float) -> Tensor:
    """The smaller of `CAP` and (t/T)^p divided by its mean over the document."""
    return _mean_1(_power(t / T, power), _document(t)).clamp(max=CAP)


def last_exempt(t: Tensor, T: Tensor, power: float) -> Tensor:
    """1 at the last time of a document, and (t/T)^p divided by its mean over the others at those."""
    last, document = t == T, _document(t)
    own = torch.ones_like(t)
    own[~last] = _mean_1(_power(t / T, power)[~last], document[~last])
    return own


def _power(ratio: Tensor, power: float) -> Tensor:
    return (ratio == 1).to(ratio.dtype) if math.isinf(power) else ratio**power


def _document(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), (t.diff() <= 0).to(t.dtype)]).cumsum(0).long()


def _mean_1(weights: Tensor, document: Tensor) -> Tensor:
    size = int(document.max()) + 1 if len(document) else 0
    sums, counts = (
        weights.new_zeros(size).index_add_(0, document, values) for values in (weights, torch.ones_like(weights))
    )
    return weights * (counts / sums.where(sums > 0, 1))[document]


SHAPES = {"late": late, "shuffled": shuffled, "capped": capped, "last_exempt": last_exempt}

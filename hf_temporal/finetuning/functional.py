"""The task of the laboratory: a functional with a known memory, and how much of that memory a model has found."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_temporal.data import argument, check_counts
from hf_temporal.data.loading import TaskData
from hf_temporal.memory.functionals import MEMORY_FUNCTIONS, Functional, FunctionalDataset
from hf_temporal.memory.probe import constant_input_memory, gradient_memory, impulse_memory, memory_distance

from .tasks import LOSSES, Task

RANGES = ("short", "middle", "long")
GRADIENT_INPUTS = 64


@dataclass
class FunctionalArguments:
    """Which functional is learned, from how long and how many series."""

    target: str = argument("exponential", "Memory function ρ of the lag.", MEMORY_FUNCTIONS)
    before: float = argument(0.0, "Nonlinearity before the convolution: 0 none, 1 tanh.")
    after: float = argument(0.0, "The same after it.")
    length: int = argument(100, "Time of a series.")
    min_length: int | None = argument(None, "With it, times differ: each is drawn evenly from here to length.")
    train_samples: int = argument(128_000, "Series to train on, made on the fly.")
    eval_samples: int = argument(256, "Series to evaluate on, the same for every seed.")

    def __post_init__(self) -> None:
        Functional(self.target, before=self.before, after=self.after)
        check_counts(len(RANGES), length=self.length)
        check_counts(train_samples=self.train_samples, eval_samples=self.eval_samples)
        if self.min_length is not None and not 1 <= self.min_length <= self.length:
            raise ValueError(f"min_length={self.min_length!r}; accepted: 1 to length={self.length}")

    @property
    def functional(self) -> Functional:
        return Functional(self.target, before=self.before, after=self.after)


class MemoryScores:
    """Root mean square error of a model's memory function over short, middle and long lags: the thirds of `length`.

    A model that is linear is probed by an impulse, ρ̂(s) against ρ(s). Any other, and every model of a functional that
    is not linear, by its steps under a constant input, |y_s − y_{s−1}|, against those of the functional itself. The
    gradient errors are the same of E[∂y_T/∂x_{T−s}] over the first `GRADIENT_INPUTS` series of N(0, 1), in models and
    targets of any kind. `record` keeps both functions of the last scoring, `memory` and `target_memory`.
    """

    def __init__(self, arguments: FunctionalArguments) -> None:
        self.arguments = arguments
        self.record: dict[str, list[Any]] = {}
        shape = (GRADIENT_INPUTS, arguments.length, 1)
        self._inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._target_gradients = gradient_memory(arguments.functional, self._inputs.double())[:, 0, 0]

    def of(self, model: PreTrainedModel) -> dict[str, float]:
        """`short_memory_error`, `middle_memory_error`, `long_memory_error`, and `short_gradient_error` and so on."""
        memory, target = self._memories(model)
        self.record = {"memory": memory.tolist(), "target_memory": target.tolist()}
        gradients = gradient_memory(model, self._inputs.to(model.device, model.dtype))[:, 0, 0]
        distances = {
            "memory": memory_distance(memory, target),
            "gradient": memory_distance(gradients.double().cpu(), self._target_gradients),
        }
        return {f"{name}_{kind}_error": getattr(distances[kind], name) for kind in distances for name in RANGES}

    def _memories(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        functional, length = self.arguments.functional, self.arguments.length
        if functional.before == functional.after == 0:
            try:
                return impulse_memory(model, length)[:, 0, 0].double(), functional.memory(length)
            except ValueError:  # the model is not linear
                pass
        outputs = functional(torch.ones(length, 1, dtype=torch.float64))[:, 0]
        return constant_input_memory(model, length)[:, 0, 0].double(), outputs.diff(prepend=outputs.new_zeros(1)).abs()


class LearnedFunctional(Task):
    """Float inputs x and the functional's outputs y at each time."""

    verb = "follow a functional"
    pipeline_tag = "time-series-forecasting"
    metrics: ClassVar = {
        f"{name}_{kind}_error": (f"{kind} error, {name} lags", 4) for kind in ("memory", "gradient") for name in RANGES
    } | LOSSES
    answer_length = 0
    generates = False

    def __init__(self, arguments: FunctionalArguments, *, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        self.sizes = {"train": arguments.train_samples, "validation": arguments.eval_samples}
        known = json.dumps([asdict(arguments), seed])
        bent = [f"{name} {getattr(arguments, name):g}" for name in ("before", "after") if getattr(arguments, name)]
        what = f"{arguments.target} functional" + (f", nonlinear ({', '.join(bent)})" if bent else "")
        least = f"{arguments.min_length} to " if arguments.min_length else ""
        self.data = TaskData(
            {split: range(size) for split, size in self.sizes.items()},
            f"the {what}, {least}{arguments.length} times",
            hashlib.sha256(known.encode()).hexdigest(),
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig) -> dict[str, Any]:  # noqa: ARG002
        arguments = self.arguments
        return {
            split: FunctionalDataset(
                arguments.functional,
                split=split,
                size=size,
                seed=self.seed,
                length=arguments.length,
                min_length=arguments.min_length,
            )
            for split, size in self.sizes.items()
        }

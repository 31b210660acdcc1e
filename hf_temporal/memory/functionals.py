"""Functionals with a known memory, y_t = Σ_s ρ(s) x_{t−s} and nonlinear ones around it, and data sets of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_temporal.data import check_counts
from hf_temporal.data.drawn import DrawnDataset
from hf_temporal.installed import require
from hf_temporal.weighting import wide_dtype

from .mixers import depthwise_convolution

MemoryFunction = Callable[[Tensor], Tensor]


def _airy(lag: Tensor) -> Tensor:
    require("memory")
    from scipy import special

    return torch.from_numpy(special.airy(lag.numpy() - 6)[0])  # torch.special.airy_ai errs by 5e-9


MEMORY_FUNCTIONS: Mapping[str, MemoryFunction] = {
    "exponential": lambda lag: torch.exp(-lag),
    "polynomial": lambda lag: (1 + 0.1 * lag) ** -1.1,
    "shift": lambda lag: ((lag > 9) & (lag < 11)).to(lag),
    "two_part": lambda lag: torch.exp(-lag) + torch.exp(-((lag - 9) ** 2)),
    "airy": _airy,
    "sine": torch.sin,
}
"""ρ(t) by name: e^{−t}; 1/(1 + 0.1t)^{1.1}; 1 on 9 < t < 11; e^{−t} + e^{−(t−9)²}; Ai(t − 6); sin t."""


def memory_function(target: str | MemoryFunction, length: int) -> Tensor:
    """Values of a memory function, ρ(0), …, ρ(length − 1), float64 `[length]`.

    `target` is a name of `MEMORY_FUNCTIONS`, or ρ itself, called with the lags as a float64 tensor `[length]`.

    Another target, a `length` below 1, a result that is not finite or not `[length]` are a ValueError or TypeError.

    Source: the targets of Wang & Yan, arXiv 2307.11462.
    """
    check_counts(length=length)
    memory = _function(target)(torch.arange(length, dtype=torch.float64))
    if not isinstance(memory, Tensor) or memory.shape != (length,):
        shape = tuple(memory.shape) if isinstance(memory, Tensor) else type(memory).__name__
        raise ValueError(f"target={target!r} returned {shape}; accepted: a tensor of shape {(length,)}.")
    if not memory.isfinite().all():
        lag = int((~memory.isfinite()).nonzero()[0])
        raise ValueError(f"target={target!r} is {memory[lag].item()} at lag {lag}; accepted: finite numbers.")
    return memory.double()


def causal_convolution(inputs: Tensor, memory: Tensor) -> Tensor:
    """y_t = Σ_{s=0..t} ρ(s) x_{t−s} by FFT, of the shape and dtype of x, computed in float64.

    x are floats `[..., time, dimension]`; every dimension is convolved by itself. ρ is `[time]`, of the lags from 0.
    Tensors of another kind or shape are a `ValueError`.
    """
    length = _duration(inputs)
    if memory.shape != (length,):
        raise ValueError(f"memory has shape {tuple(memory.shape)}; accepted: {(length,)}, a value per time of inputs.")
    dtype = wide_dtype(inputs.device)
    return depthwise_convolution(inputs.to(dtype).mT, memory.to(inputs.device, dtype)).mT.to(inputs.dtype)


@dataclass(frozen=True)
class Functional:
    """y = φ_after(ρ ∗ φ_before(x)), with (ρ ∗ x)_t = Σ_{s=0..t} ρ(s) x_{t−s} and φ_α(z) = (1 − α)·z + α·tanh(z).

    φ is applied at each time. φ_0 is the identity and φ_1 is tanh, so both α = 0 give the paper's linear functional.
    A field whose value is not accepted is a ValueError or TypeError.

    Source: linear functionals, Wang & Yan, arXiv 2307.11462; nonlinear ones are the question it leaves open.
    """

    target: str | MemoryFunction  # ρ, see `memory_function`
    before: float = 0.0  # α of the nonlinearity before the convolution, in [0, 1]
    after: float = 0.0  # α of the one after it

    def __post_init__(self) -> None:
        _function(self.target)
        for name in ("before", "after"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: a number from 0 to 1.")

    def __call__(self, inputs: Tensor) -> Tensor:
        """y of x `[..., time, dimension]`; shape, dtype and errors are those of `causal_convolution`."""
        memory = self.memory(_duration(inputs))
        return _bend(causal_convolution(_bend(inputs, self.before), memory), self.after)

    def memory(self, length: int) -> Tensor:
        """ρ(0), …, ρ(length − 1), float64: the memory of the linear part."""
        return memory_function(self.target, length)


@dataclass(eq=False)
class FunctionalDataset(DrawnDataset[dict[str, Tensor]]):
    """Examples `{"input_values": x, "labels": y}` of x ~ N(0, 1) and a functional's y, float32 `[time, dimension]`.

    y is computed in float64 from the float32 x, and rounded; a data loader's batch is computed by one FFT. Batch
    examples of several lengths by `pad_series`. A number below 1, `min_length` above `length` and an unknown split are
    a `ValueError`.
    """

    functional: Functional  # what is to be learned
    length: int = field(default=100, kw_only=True)  # time of an example, the longest where they differ
    min_length: int | None = field(
        default=None, kw_only=True
    )  # with it, each time is drawn evenly from here to length
    dimension: int = field(default=1, kw_only=True)  # of x and of y, each of which is a series of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(length=self.length, dimension=self.dimension)
        if self.min_length is not None and not 1 <= self.min_length <= self.length:
            raise ValueError(f"min_length={self.min_length!r}; accepted: 1 to length={self.length}.")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        inputs = np.zeros((len(indices), self.length, self.dimension), dtype=np.float32)
        times = []
        for row, index in zip(inputs, indices, strict=True):
            rng = self._generator(index)
            time = self.length if self.min_length is None else int(rng.integers(self.min_length, self.length + 1))
            rng.standard_normal(out=row[:time], dtype=np.float32)
            times.append(time)
        x = torch.from_numpy(inputs)
        y = self.functional(x.double()).float()
        return [{"input_values": x[i, :time], "labels": y[i, :time]} for i, time in enumerate(times)]


def pad_series(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch `[batch, longest time, dimension]`: `input_values` are padded by zeros, `labels` by NaN, no target.

    The Trainer's evaluation loop pads batches of different lengths by −100, so `compute_metrics` sees it beside NaN.
    """
    return {
        key: pad_sequence([example[key] for example in examples], batch_first=True, padding_value=padding)
        for key, padding in (("input_values", 0.0), ("labels", float("nan")))
    }


def _function(target: str | MemoryFunction) -> MemoryFunction:
    if callable(target):
        return target
    if target in MEMORY_FUNCTIONS:
        return MEMORY_FUNCTIONS[target]
    error, names = ValueError if isinstance(target, str) else TypeError, ", ".join(map(repr, MEMORY_FUNCTIONS))
    raise error(f"target={target!r}; accepted: {names}, or a function of the lags.")


def _duration(inputs: Tensor) -> int:
    if inputs.dim() < 2 or not inputs.is_floating_point():
        given = f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}"
        raise ValueError(f"{given}; accepted: floats [..., time, dimension].")
    return inputs.shape[-2]


def _bend(values: Tensor, strength: float) -> Tensor:
    return values if strength == 0 else torch.lerp(values, values.tanh(), strength)

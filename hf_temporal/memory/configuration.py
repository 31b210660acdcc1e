"""Configurations of the model families: width, depth, normalization, skip connections, and what each family adds."""

import math
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

CHOICES: dict[str, tuple[Any, ...]] = {
    "normalization": ("none", "layer"),
    "hidden_act": ("linear", "relu", "gelu"),
    "skip_connections": (True, False),
    "use_bias": (True, False),
}
POSITIVE = ("recurrent_scale", "smallest_step", "largest_step")
COUNTS = (
    "vocab_size", "input_size", "output_size", "hidden_size", "num_hidden_layers", "kernel_size", "state_size",
    "num_attention_heads", "intermediate_size",
)  # fmt: skip


if TYPE_CHECKING or hasattr(PreTrainedConfig, "__post_init__"):
    _Config = PreTrainedConfig
else:

    class _Config(PreTrainedConfig):
        """Before transformers 5.4, configurations are no dataclasses: this one sets its annotated fields itself."""

        def __init__(self, **kwargs: Any) -> None:
            for each in type(self).__mro__:
                if issubclass(each, _Config):
                    for name in vars(each).get("__annotations__", {}):
                        setattr(self, name, kwargs.pop(name, getattr(self, name)))
            super().__init__(**kwargs)
            self.__post_init__()

        def __post_init__(self) -> None:
            """Where a subclass checks its fields."""


class MemoryModelConfig(_Config):
    """What the families have in common: a linear map or embedding, `num_hidden_layers` blocks, and a head.

    A block maps x to mix(norm(x)), plus x under `skip_connections`; everything between input and head has the width
    `hidden_size`. A value that is not accepted is a `ValueError` that names it.
    """

    vocab_size: int | None = None  # number of tokens; needed by the models for tokens alone
    input_size: int = 1  # numbers per time in `input_values`, for the models for regression
    output_size: int = 1  # numbers per time in the output of these
    hidden_size: int = 32
    num_hidden_layers: int = 1
    normalization: str = "none"  # or "layer": a layer norm in front of each mixer and of the head
    skip_connections: bool = False  # whether a block's input is added to its output
    use_bias: bool = True  # of the linear maps

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, value in vars(self).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in COUNTS and not (type(value) is int and value >= 1) and (name, value) != ("vocab_size", None):
                raise ValueError(f"{name}={value!r}; accepted: a whole number of at least 1.")
            if name in POSITIVE and not (is_number and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r}; accepted: a positive number.")
            # types are compared because 1 equals True
            if name in CHOICES and (type(value), value) not in [(type(each), each) for each in CHOICES[name]]:
                raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(repr, CHOICES[name]))}.")


class LinearRnnConfig(MemoryModelConfig):
    """A linear RNN, h_t = W h_{t−1} + U x_t, as in the paper's theory.

    With its defaults the model is linear and time-invariant: y_t = Σ_s C W^s U x_{t−s}.
    """

    model_type = "memory_linear_rnn"

    use_bias: bool = False
    hidden_act: str = "linear"  # or "relu", "gelu": of the states of each layer, but not within the recurrence
    recurrent_scale: float = 0.95  # W starts as an orthogonal matrix times this, the modulus of all its eigenvalues


class TanhRnnConfig(MemoryModelConfig):
    """A tanh RNN, h_t = tanh(W h_{t−1} + U x_t + b)."""

    model_type = "memory_tanh_rnn"

    recurrent_scale: float = 0.95  # W starts as an orthogonal matrix times this number


class TcnConfig(MemoryModelConfig):
    """A temporal convolutional network: in layer i, two causal, weight-normalized convolutions of dilation 2^i.

    An output sees 1 + 2 (kernel_size − 1) (2^num_hidden_layers − 1) inputs: its own and those before it.

    Source: Bai, Kolter & Koltun, arXiv 1803.01271.
    """

    model_type = "memory_tcn"

    num_hidden_layers: int = 6
    skip_connections: bool = True
    hidden_act: str = "relu"  # or "linear", "gelu": after each of the two convolutions
    kernel_size: int = 4  # taps of a convolution


class StateSpaceConfig(MemoryModelConfig):
    """A diagonal state-space model with `state_size` complex states for each of the `hidden_size` channels.

    The time steps Δ start log-uniformly between the two given ones; a channel begins with a memory of about 2/Δ times.

    Source: Gu, Gupta, Goel & Ré, arXiv 2206.11893 (S4D-Lin).
    """

    model_type = "memory_state_space"

    num_hidden_layers: int = 2
    normalization: str = "layer"
    skip_connections: bool = True
    hidden_act: str = "gelu"  # or "linear", "relu": between the state-space model and the linear map of its channels
    state_size: int = 16  # complex states per channel, each standing for itself and its conjugate
    smallest_step: float = 0.001
    largest_step: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.smallest_step > self.largest_step:
            raise ValueError(
                f"smallest_step={self.smallest_step}; accepted: at most largest_step={self.largest_step}."
            )


class AttentionConfig(MemoryModelConfig):
    """Causal self-attention, each layer followed by a feed-forward layer in a block of its own.

    Sinusoidal positions are added to the input, so that inputs of any length are accepted.
    """

    model_type = "memory_attention"

    num_hidden_layers: int = 2
    normalization: str = "layer"
    skip_connections: bool = True
    hidden_act: str = "gelu"  # or "linear", "relu": inside the feed-forward layer
    num_attention_heads: int = 2  # has to divide `hidden_size`
    intermediate_size: int = 128  # width of the feed-forward layer

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"num_attention_heads={heads}; accepted: a divisor of hidden_size={self.hidden_size}.")

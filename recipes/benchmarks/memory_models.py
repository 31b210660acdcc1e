r"""A training step of each family of `hf_temporal.memory` against what is obvious to write in PyTorch.

    python recipes/benchmarks/memory_models.py --output recipes/results/memory_models.json

A few seconds, on a toy:

    python recipes/benchmarks/memory_models.py --repeats 2 --length 50 --batch_size 4

The references: a Python loop over time for the linear RNN, the tanh RNN and the state-space model, a stack of
`nn.Conv1d` with the same convolutions, weight norms and skips, and `nn.TransformerEncoder` under a causal mask; all
of the width, depth and activation of the family's configuration, and the loops in their fast form, over `unbind`:
indexing by time costs backward the square of the length. A step is forward, squared error, backward and AdamW
on one input and one output per time. Both take their steps in turn and in changing order, in one process, so that
whatever else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from hf_temporal.finetuning.tables import environment, spread, table, write
from hf_temporal.memory.modeling import sinusoidal_positions
from hf_temporal.memory.models import FAMILIES

WARMUP = 1


class LoopRnn(nn.Module):
    """h_t = act(W h_{t−1} + U x_t), a time after the other."""

    def __init__(self, config: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.input = nn.Linear(config.input_size, config.hidden_size)
        self.recurrent = nn.Parameter(nn.init.orthogonal_(torch.empty(config.hidden_size, config.hidden_size)))
        self.head = nn.Linear(config.hidden_size, config.output_size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, input_size]` to `[batch, time, output_size]`."""
        state, states = x.new_zeros(x.shape[0], len(self.recurrent)), []
        for each in self.input(x).unbind(1):
            state = self.activation(each + state @ self.recurrent.T)
            states.append(state)
        return self.head(torch.stack(states, 1))


class LoopStateSpace(nn.Module):
    """s_t = e^{ΔA} s_{t−1} + A⁻¹(e^{ΔA} − 1) x_t and y_t = 2 Re(C·s_t) + D x_t, a time after the other."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, layers = config.hidden_size, range(config.num_hidden_layers)
        shape = (width, config.state_size)
        self.input, self.head = nn.Linear(config.input_size, width), nn.Linear(width, config.output_size)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in layers)
        self.steps = nn.ParameterList(torch.rand(width, 1) * 0.1 for _ in layers)
        self.rates = nn.ParameterList(torch.complex(-0.5 * torch.ones(shape), 3 * torch.rand(shape)) for _ in layers)
        self.readouts = nn.ParameterList(torch.randn(shape, dtype=torch.complex64) for _ in layers)
        self.directs = nn.ParameterList(torch.ones(width) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, input_size]` to `[batch, time, output_size]`."""
        x = self.input(x)
        for norm, output, step, rate, readout, direct in zip(
            self.norms, self.outputs, self.steps, self.rates, self.readouts, self.directs, strict=True
        ):
            factor = torch.exp(step * rate)
            drive = (factor - 1) / rate
            state, states = torch.zeros_like(rate), []
            for each in norm(x).unbind(1):
                state = factor * state + drive * each[..., None]
                states.append(2 * (readout * state).sum(-1).real + direct * each)
            x = x + output(F.gelu(torch.stack(states, 1)))
        return self.head(x)


class ConvolutionStack(nn.Module):
    """Residual layers of two weight-normalised causal `nn.Conv1d` each, all in the layout that they take."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.input, self.head = nn.Conv1d(config.input_size, width, 1), nn.Conv1d(width, config.output_size, 1)
        self.convolutions = nn.ModuleList(
            weight_norm(nn.Conv1d(width, width, config.kernel_size, dilation=2 ** (i // 2)))
            for i in range(2 * config.num_hidden_layers)
        )
        self.taps = config.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, input_size]` to `[batch, time, output_size]`."""
        x = self.input(x.transpose(1, 2))
        for i in range(0, len(self.convolutions), 2):
            y = x
            for convolution in (self.convolutions[i], self.convolutions[i + 1]):
                y = F.relu(convolution(F.pad(y, ((self.taps - 1) * 2 ** (i // 2), 0))))
            x = x + y
        return self.head(x).transpose(1, 2)


class TransformerEncoder(nn.Module):
    """`nn.TransformerEncoder` under a causal mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.input, self.head = nn.Linear(config.input_size, width), nn.Linear(width, config.output_size)
        layer = nn.TransformerEncoderLayer(
            width, config.num_attention_heads, config.intermediate_size, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            layer, config.num_hidden_layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, input_size]` to `[batch, time, output_size]`."""
        x = self.input(x)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x, mask=mask, is_causal=True))


REFERENCES: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "linear_rnn": ("Python loop", lambda config: LoopRnn(config, nn.Identity())),
    "tanh_rnn": ("Python loop", lambda config: LoopRnn(config, torch.tanh)),
    "tcn": ("nn.Conv1d stack", ConvolutionStack),
    "state_space": ("Python loop", LoopStateSpace),
    "attention": ("nn.TransformerEncoder", TransformerEncoder),
}


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Takes a step of training on each call, and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        start = time.perf_counter()
        outputs = model(x)
        loss = F.mse_loss(outputs if isinstance(outputs, Tensor) else outputs.logits, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def measure(family: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians and noise of both; the ratio is the median of the ratios within a round."""
    torch.manual_seed(settings.seed)
    config = FAMILIES[family].config(hidden_size=settings.hidden_size)
    name, build = REFERENCES[family]
    x = torch.randn(settings.batch_size, settings.length, 1)
    y = torch.randn(settings.batch_size, settings.length, 1)
    peers = [training_step(model, x, y) for model in (build(config), FAMILIES[family].regression(config))]
    seconds: list[list[float]] = [[], []]
    for turn in range(WARMUP + settings.repeats):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which].append(peers[which]())
    seconds = [each[WARMUP:] for each in seconds]
    return [
        {
            "family": family,
            "model": model,
            "seconds": statistics.median(mine),
            "noise": spread(mine),
            "time / reference": statistics.median([a / b for a, b in zip(mine, seconds[0], strict=True)]),
            "all_seconds": mine,
        }
        for model, mine in zip((name, FAMILIES[family].regression.__name__), seconds, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=[*FAMILIES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--hidden_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    results: dict[str, Any] = {
        "benchmark": "memory_models",
        **environment(),
        "settings": {
            name: getattr(settings, name)
            for name in ("repeats", "batch_size", "length", "hidden_size", "threads", "seed")
        },
        "rows": [row for family in settings.families for row in measure(family, settings)],
    }
    print(json.dumps({key: results[key] for key in ("date", "hardware", "versions", "settings")}))
    print(table(results["rows"], ["family", "model", "seconds", "noise", "time / reference"]))
    write(settings.output, results)
    return results


if __name__ == "__main__":
    main()

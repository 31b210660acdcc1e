"""The causal modules that mix the times of a sequence of any length, `[batch, time, width]` to the same."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .configuration import AttentionConfig, LinearRnnConfig, StateSpaceConfig, TanhRnnConfig, TcnConfig
from .recurrences import linear_recurrence, tanh_recurrence

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda x: x, "relu": F.relu, "gelu": F.gelu}


class RnnMixer(nn.Module):
    """act(h_t) with h_t = W h_{t−1} + u_t, or h_t = tanh(W h_{t−1} + u_t).

    u_t = U x_t + b; in the first layer u = x, the mapped or embedded input of the model.
    """

    def __init__(self, config: LinearRnnConfig | TanhRnnConfig, layer: int) -> None:
        super().__init__()
        width, is_tanh = config.hidden_size, config.model_type == TanhRnnConfig.model_type
        self.input = nn.Linear(width, width, bias=config.use_bias) if layer else nn.Identity()
        self.recurrent = nn.Parameter(torch.empty(width, width))
        self.recurrence = tanh_recurrence if is_tanh else linear_recurrence
        self.activation = ACTIVATION_FUNCTIONS[getattr(config, "hidden_act", "linear")]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.recurrence(self.input(x), self.recurrent))


class CausalConvolution(nn.Module):
    """y_t = b + Σ_{k<K} W_k x_{t−(K−1−k)d} with dilation d and weight normalization, W = g V/‖V‖ for each output.

    The parameters are those of an `nn.Conv1d`. It is computed as a convolution of images of height 1, which is faster
    since these take the layout `[batch, time, width]` as it is ("channels last").
    """

    def __init__(self, width: int, kernel_size: int, dilation: int, *, bias: bool) -> None:
        super().__init__()
        self.convolution = weight_norm(nn.Conv1d(width, width, kernel_size, bias=bias))
        self.dilation = dilation
        self.padding = (kernel_size - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        images = F.pad(x, (0, 0, self.padding, 0)).transpose(1, 2)[:, :, None]
        weight, bias = self.convolution.weight[:, :, None], self.convolution.bias
        return F.conv2d(images, weight, bias, dilation=(1, self.dilation))[:, :, 0].transpose(1, 2)


class TcnMixer(nn.Module):
    """act(conv(act(conv(x)))) with two causal convolutions of dilation 2^layer."""

    def __init__(self, config: TcnConfig, layer: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            CausalConvolution(config.hidden_size, config.kernel_size, 2**layer, bias=config.use_bias) for _ in range(2)
        )
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
        return x


class StateSpaceMixer(nn.Module):
    """M act(y) with, in each channel, s_t = e^{ΔA} s_{t−1} + A⁻¹(e^{ΔA} − 1) x_t and y_t = 2 Re(C·s_t) + D x_t.

    A is complex and diagonal, Re A < 0, and discretized with a zero-order hold. The states are not computed: y is the
    convolution of x with the kernel K_l = 2 Re Σ_n C_n A_n⁻¹ (e^{ΔA_n} − 1) e^{lΔA_n}, by FFT.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        width, states = config.hidden_size, config.state_size
        self.log_step = nn.Parameter(torch.empty(width))
        self.log_decay = nn.Parameter(torch.empty(width, states))
        self.frequency = nn.Parameter(torch.empty(width, states))
        self.readout = nn.Parameter(torch.empty(width, states, 2))
        self.direct = nn.Parameter(torch.empty(width))
        self.output = nn.Linear(width, width, bias=config.use_bias)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def kernel(self, length: int) -> Tensor:
        """K_l for l = 0..length−1, `[width, length]`, in float32 at least.

        For l = jc + i, K is a matrix product of the exponentials e^{jcΔA} and e^{iΔA}, of which there are far fewer.
        """
        dtype = torch.promote_types(torch.float32, self.frequency.dtype)
        a = torch.complex(-self.log_decay.to(dtype).exp(), self.frequency.to(dtype))
        a_step = a * self.log_step.to(dtype).exp()[:, None]
        coefficients = 2 * torch.complex(*self.readout.to(dtype).unbind(-1)) * torch.expm1(a_step) / a
        chunk = math.isqrt(length - 1) + 1
        times = torch.arange(chunk, device=a.device)
        coarse = coefficients[:, None] * torch.exp(a_step[:, None] * (chunk * times)[:, None])
        fine = torch.exp(a_step[..., None] * times)
        product = torch.cat([coarse.real, -coarse.imag], -1) @ torch.cat([fine.real, fine.imag], -2)
        return product.flatten(1)[:, :length]

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            y = depthwise_convolution(x.transpose(1, 2), self.kernel(x.shape[1])).transpose(1, 2) + self.direct * x
        return self.output(self.activation(y).to(self.output.weight.dtype))


def depthwise_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = Σ_{s=0..t} k_s x_{t−s} by FFT, for x `[batch, width, time]` and k `[width, time]`."""
    time = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * time) * torch.fft.rfft(kernel, n=2 * time)
    return torch.fft.irfft(spectrum, n=2 * time)[..., :time]


class SelfAttentionMixer(nn.Module):
    """Multi-head attention of each time to itself and to those before it."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.input = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.use_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.input(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(2))


class FeedForwardMixer(nn.Module):
    """M₂ act(M₁ x_t) at each time by itself; follows attention in a block of its own."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.input(x)))


MIXERS: dict[str, Callable[[Any, int], list[nn.Module]]] = {
    LinearRnnConfig.model_type: lambda config, layer: [RnnMixer(config, layer)],
    TanhRnnConfig.model_type: lambda config, layer: [RnnMixer(config, layer)],
    TcnConfig.model_type: lambda config, layer: [TcnMixer(config, layer)],
    StateSpaceConfig.model_type: lambda config, _: [StateSpaceMixer(config)],
    AttentionConfig.model_type: lambda config, _: [SelfAttentionMixer(config), FeedForwardMixer(config)],
}

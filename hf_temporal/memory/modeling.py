"""The model families of the paper's laboratory, each for regression and for tokens.

Saved models hold a copy of this file and of those that it imports, so they load without the package if
`trust_remote_code=True`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput, TokenClassifierOutput

from .configuration import (
    AttentionConfig,
    LinearRnnConfig,
    MemoryModelConfig,
    StateSpaceConfig,
    TanhRnnConfig,
    TcnConfig,
)
from .mixers import MIXERS, RnnMixer, StateSpaceMixer
from .recurrences import linear_recurrence  # noqa: F401  older transformers copy what this file imports, but no deeper

PACKED_KEYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "document_ids")


class MemoryBlock(nn.Module):
    """Maps x to mix(norm(x)), plus x under `skip_connections`; `[batch, time, hidden_size]` to the same."""

    def __init__(self, config: MemoryModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = _normalization(config)
        self.mixer = mixer
        self.skips = config.skip_connections

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm(x))
        return x + mixed if self.skips else mixed


class MemoryBackbone(nn.Module):
    """The blocks of a family and the norm in front of the head, `[batch, time, hidden_size]` to the same.

    Under attention the positions are added first.
    """

    def __init__(self, config: MemoryModelConfig) -> None:
        super().__init__()
        mixers = [mixer for i in range(config.num_hidden_layers) for mixer in MIXERS[config.model_type](config, i)]
        self.takes_positions = config.model_type == AttentionConfig.model_type
        self.blocks = nn.ModuleList(MemoryBlock(config, mixer) for mixer in mixers)
        self.norm = _normalization(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_positions:
            x = x + sinusoidal_positions(x.shape[1], x.shape[2], device=x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MemoryPreTrainedModel(PreTrainedModel):
    """How the parameters of all families are initialized.

    - Linear maps and convolutions are uniform in ±1/√inputs, weight and bias, as in torch; the norms of a
      weight-normalized convolution are those of the direction.
    - Recurrent matrices are orthogonal, times `recurrent_scale`.
    - State-space models are S4D-Lin: A = −1/2 + iπn, Δ log-uniform between the configured steps, C complex normal of
      variance 1, D = 1.
    - Embeddings are standard normal, layer norms the identity.
    """

    config_class = MemoryModelConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            _uniform(module.in_features, module.weight, module.bias)
        elif isinstance(module, nn.Conv1d):
            _uniform(module.in_channels * module.kernel_size[0], module.bias)
        elif isinstance(module, ParametrizationList):
            norm, direction = module.parameters()
            _uniform(direction[0].numel(), direction)
            init.copy_(norm, direction.norm(dim=(1, 2), keepdim=True))
        elif isinstance(module, RnnMixer):
            init.orthogonal_(module.recurrent, gain=config.recurrent_scale)
        elif isinstance(module, StateSpaceMixer):
            init.uniform_(module.log_step, math.log(config.smallest_step), math.log(config.largest_step))
            init.constant_(module.log_decay, math.log(0.5))
            init.copy_(module.frequency, math.pi * torch.arange(config.state_size).expand_as(module.frequency))
            init.normal_(module.readout, std=0.5**0.5)
            init.ones_(module.direct)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MemoryModelForRegression(MemoryPreTrainedModel):
    """Maps float inputs to float outputs; each output depends on the inputs up to its time alone."""

    main_input_name = "input_values"
    accepts_loss_kwargs = False

    def __init__(self, config: MemoryModelConfig) -> None:
        super().__init__(config)
        self.input = nn.Linear(config.input_size, config.hidden_size, bias=config.use_bias)
        self.backbone = MemoryBackbone(config)
        self.head = nn.Linear(config.hidden_size, config.output_size, bias=config.use_bias)
        self.post_init()

    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> TokenClassifierOutput:
        """The outputs, and their squared error: its mean over the outputs of a time, then over the target times.

        Args:
            input_values: `[batch, time, input_size]`; other shapes are a `ValueError`.
            labels: `[batch, time, output_size]`, aligned with the inputs, or `[batch, time]` for one output. A time
                with a NaN among its labels is no target; without any target the loss is 0.

        Returns:
            The outputs as `logits`, `[batch, time, output_size]`, and `loss`, in float32 at least.
        """
        size = self.config.input_size
        if input_values.dim() != 3 or input_values.shape[-1] != size:
            raise ValueError(f"input_values have shape {tuple(input_values.shape)}; accepted: [batch, time, {size}].")
        outputs: Tensor = self.head(self.backbone(self.input(input_values.to(self.input.weight.dtype))))
        loss = None if labels is None else _squared_error(outputs, labels)
        return TokenClassifierOutput(loss=loss, logits=outputs)


class MemoryModelForCausalLM(MemoryPreTrainedModel):
    """Maps tokens to the logits of the next token, with the loss of transformers' causal language models."""

    accepts_loss_kwargs = True

    def __init__(self, config: MemoryModelConfig) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("vocab_size=None; accepted by a model for tokens: their number, at least 1.")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = MemoryBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.use_bias)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        """`logits`, `[batch, time, vocab_size]`, and for labels transformers' causal `loss`, which takes the `kwargs`.

        Args:
            input_ids: `[batch, time]`, of one document each.
            attention_mask: `[batch, time]`, 0 on padding. Padding has to be on the right, where it changes no output
                before it; the mask is not used further.
            labels: `[batch, time]`, −100 where there is no target; the logits at i are compared with labels[i + 1].

        Raises:
            ValueError: rows that are padded on the left or hold several documents, a mask of another shape.
        """
        _check_rows(attention_mask, kwargs)
        logits: Tensor = self.lm_head(self.backbone(self.embed_tokens(input_ids)))
        size = self.config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


def _models_of(config: type[MemoryModelConfig]) -> tuple[type[MemoryModelForRegression], type[MemoryModelForCausalLM]]:
    """The model classes of a family, `XForRegression` and `XForCausalLM` for its configuration `XConfig`."""
    name, content = config.__name__.removesuffix("Config"), {"config_class": config, "__module__": __name__}
    return (
        type(f"{name}ForRegression", (MemoryModelForRegression,), content),
        type(f"{name}ForCausalLM", (MemoryModelForCausalLM,), content),
    )


LinearRnnForRegression, LinearRnnForCausalLM = _models_of(LinearRnnConfig)
TanhRnnForRegression, TanhRnnForCausalLM = _models_of(TanhRnnConfig)
TcnForRegression, TcnForCausalLM = _models_of(TcnConfig)
StateSpaceForRegression, StateSpaceForCausalLM = _models_of(StateSpaceConfig)
AttentionForRegression, AttentionForCausalLM = _models_of(AttentionConfig)


def sinusoidal_positions(time: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions, `[time, width]`: sin(t/10000^{2i/width}) in the first columns, the cosines in the rest."""
    frequencies = 10000.0 ** -(torch.arange((width + 1) // 2, device=device) / ((width + 1) // 2))
    angles = torch.arange(time, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]


def _check_rows(attention_mask: Tensor | None, others: Mapping[str, Any]) -> None:
    packed = [key for key in PACKED_KEYS if others.get(key) is not None]
    if packed:
        raise ValueError(f"{packed[0]} is given: documents of a row are not kept apart; accepted: one per row.")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; accepted: [batch, time].")
    if attention_mask is not None and bool((attention_mask[:, 0] < attention_mask.amax(-1)).any()):
        accepted = "padding on the right (padding_side='right')"
        raise ValueError(f"attention_mask has rows padded on the left; accepted: {accepted}.")


def _uniform(inputs: int, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)


def _normalization(config: MemoryModelConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size) if config.normalization == "layer" else nn.Identity()


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == 2 and outputs.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != outputs.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; accepted: {tuple(outputs.shape)}.")
    dtype = torch.promote_types(torch.float32, outputs.dtype)
    is_target = ~labels.isnan().any(-1)
    errors = (outputs.to(dtype) - labels.nan_to_num().to(dtype)).square().mean(-1)
    return (errors * is_target).sum() / is_target.sum().clamp(min=1)

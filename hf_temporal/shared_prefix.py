"""The tokens that all documents of a packed row begin with, computed once.

Rows of an instruction data set begin alike: with the chat template's system message and the words of the task. A
token's hidden state depends on what precedes it in its document alone, so in a row of documents these tokens have the
same states again and again. `share_prefix` takes their copies out in front of a model's layers, and puts their states
back behind them, so that whoever calls the model sees the whole row: labels, weights and losses stay as they are, and
the gradient of the one copy is the sum of all.
"""

import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .collator import without

MIN_PREFIX = 8  # tokens, fewer of which are not worth their handling
PER_TOKEN = ("input_ids", "position_ids")
OF_FLASH_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

prefix_length: ContextVar[int] = ContextVar("prefix_length", default=0)
"""How many tokens the first document of the row in progress has in place of all documents."""


def share_prefix(base: PreTrainedModel, attention: str) -> list[RemovableHandle]:
    """Let the body of a language model compute once what all documents of a packed row begin with.

    It does so while its attention is the one of this name, which has to read `prefix_length` as masks are made: behind
    the first document, `prefix_length` tokens are missing in front of each. A call with a mask, a cache, embeddings or
    other values by token is left alone.

    Returns:
        What removes it; nothing where the model has it already, or is a body alone.
    """
    body: Any = base.base_model
    hooks = body._forward_pre_hooks.values()
    if body is base or any(isinstance(getattr(hook, "__self__", None), SharedPrefix) for hook in hooks):
        return []
    own = SharedPrefix(attention)
    return [
        body.register_forward_pre_hook(own.take_out, with_kwargs=True),
        body.register_forward_hook(own.put_back, always_call=True),
    ]


class SharedPrefix:
    """The hooks of `share_prefix` on one body."""

    def __init__(self, attention: str) -> None:
        self.attention = attention
        self._places: Tensor | None = None  # of each token's state among those that are computed

    def take_out(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._places = None
        names = inspect.signature(body.forward).parameters if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        given = without(given, OF_FLASH_ATTENTION)  # which say what position_ids say, for the whole row
        found = None if torch.compiler.is_compiling() or not self._is_packed(body, given) else _shared(given)
        if found is None:
            return None
        length, kept, self._places = found
        prefix_length.set(length)
        return (), given | {name: given[name][:, kept] for name in PER_TOKEN}

    def put_back(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        prefix_length.set(0)
        places, self._places = self._places, None
        if places is None or not isinstance(outputs, ModelOutput):
            return None
        for name, value in outputs.items():
            is_tuple = isinstance(value, tuple)
            outputs[name] = tuple(each[:, places] for each in value) if is_tuple else value[:, places]
        return outputs

    def _is_packed(self, body: Any, given: dict[str, Any]) -> bool:
        """Whether a call has one row of tokens with `position_ids`, and nothing else by token, in or out."""
        tokens, positions = (given.get(name) for name in PER_TOKEN)
        config = body.config
        asked = {"use_cache", "output_attentions", "output_router_logits"}
        return (
            config._attn_implementation == self.attention
            and isinstance(tokens, Tensor)
            and isinstance(positions, Tensor)
            and tokens.shape == positions.shape
            and tokens.dim() == 2
            and len(tokens) == 1
            and not any(given.get(name, getattr(config, name, False)) for name in asked)
            and given.get("return_dict", True) is not False
            and given.get("attention_mask") is None
            and given.get("past_key_values") is None
            and not any(
                isinstance(value, Tensor) and value.dim() for name, value in given.items() if name not in PER_TOKEN
            )
        )


def _shared(given: dict[str, Any]) -> tuple[int, Tensor, Tensor] | None:
    """The length of the documents' common beginning, which tokens are kept, and where each one's state is then.

    Each document keeps a token of its own. None where less than `MIN_PREFIX` tokens are shared.
    """
    tokens, positions = (given[name][0] for name in PER_TOKEN)
    is_first = F.pad(positions.diff() != 1, (1, 0), value=True)
    starts = is_first.nonzero()[:, 0]
    shortest = int(F.pad(starts, (0, 1), value=len(tokens)).diff().min())
    if len(starts) < 2 or shortest <= MIN_PREFIX:
        return None
    columns = starts[:, None] + torch.arange(shortest - 1, device=starts.device)
    alike = ((tokens[columns] == tokens[columns[0]]) & (positions[columns] == positions[columns[0]])).all(0)
    length = int(alike.cumprod(0).sum())
    if length < MIN_PREFIX:
        return None
    place = torch.arange(len(tokens), device=starts.device)
    column = place - starts[is_first.cumsum(0) - 1]
    kept = (place == column) | (column >= length)
    return length, kept, torch.where(kept, kept.cumsum(0) - 1, column)

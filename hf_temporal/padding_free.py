"""Padding-free batches on every device: one row of real tokens, whose attention runs document by document.

A padded batch computes its padding in every layer. `DataCollatorWithFlattening` and TRL's `padding_free=True` put the
examples of a batch into one row instead, with `position_ids` that start again at each. transformers keeps them apart
by flash attention on GPUs, and elsewhere by a mask of all tokens by all tokens, most of which is computed for nothing.
The attention that is registered here under the name `ATTENTION` calls `scaled_dot_product_attention` once for each
document. What all documents of a row begin with goes through the model once.
"""

import contextlib
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from ._peft import base_model, described, is_prompt_learner
from .model.undisturbed import undisturbed
from .shared_prefix import MIN_PREFIX, prefix_length, share_prefix

logger = logging.get_logger(__name__)

ATTENTION = "padding_free"
FLASH_ATTENTION = "flash_attention_2"
REPLACED = ("eager", "sdpa")  # others keep the documents of a row apart by themselves, or not at all
PROBED_LENGTHS = (5, 1, 9)


def use_padding_free(model: nn.Module) -> bool:
    """Let a decoder-only model's attention run document by document where several stand in a row.

    On a GPU with flash-attn and weights in half precision, flash attention does it; elsewhere `ATTENTION`, which is as
    exact as `sdpa`. Padded batches and generation take the usual way. The model keeps its own attention, and one line
    of the log says why, where the logits of three short documents in a row are not those of each alone. Pack with
    `position_ids`, and without an `attention_mask` or a cache (`use_cache=False`, as in training).

    Where `ATTENTION` is set, tokens that all documents of a row begin with, at least eight, are computed once, and
    their hidden states stand for all: under dropout, with one mask.

    Args:
        model: the model or `PeftModel`, before a trainer wraps or shards it.

    Returns:
        Whether packed rows may be fed to the model.
    """
    problem = switch_attention(model)
    if problem:
        logger.warning(f"Batches of {described(model)} are to be padded: {problem}.")
    return not problem


def switch_attention(model: nn.Module) -> str:
    """What `use_padding_free` does; why the model has kept its own attention, else empty."""
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return "an encoder-decoder has rows of two lengths"
    if not isinstance(base, PreTrainedModel) or base.config.sub_configs:
        return "it is no plain text model of transformers"
    if is_prompt_learner(model):
        return "prompt learning puts virtual tokens in front of a row, not of a document"
    if any(parameter.is_meta or not parameter.numel() for parameter in model.parameters()):
        return "its weights are not at hand for a trial"
    own = base.config._attn_implementation
    chosen = own if own not in REPLACED else FLASH_ATTENTION if _has_flash_attention(base) else ATTENTION
    try:
        with undisturbed(model):
            trials = [_documents(base, prefix) for prefix in (0, MIN_PREFIX)]
            expected = [_logits_alone(model, documents) for documents in trials]
            if chosen != own:
                base.set_attn_implementation(chosen)
            is_exact = _gives(model, trials[0], expected[0])
    except Exception as error:  # noqa: BLE001  a model may raise anything, such as where its attention needs more
        problem = f"a trial row gives {type(error).__name__}: {error}"
    else:
        if base.config._attn_implementation != chosen:
            return "its attention does not come from transformers' AttentionInterface"
        if is_exact:
            if chosen == ATTENTION:
                _compute_beginnings_once(model, trials[1], expected[1])
            return ""
        problem = "the logits of documents in one row are not those of each alone"
    if chosen != own:
        base.set_attn_implementation(own)
    return problem


def _compute_beginnings_once(model: nn.Module, documents: list[Tensor], expected: Tensor) -> None:
    """Let what all documents of a row begin with be computed once, if these documents then have the same logits."""
    handles = share_prefix(base_model(model), ATTENTION)
    is_exact = False
    with contextlib.suppress(Exception), undisturbed(model):  # any that a model raises on a shorter row
        is_exact = _gives(model, documents, expected)
    if not is_exact:
        for handle in handles:
            handle.remove()


def _has_flash_attention(base: PreTrainedModel) -> bool:
    is_half = base.dtype in (torch.bfloat16, torch.float16)
    return base.device.type == "cuda" and is_half and base._supports_flash_attn and is_flash_attn_2_available()


def _documents(base: PreTrainedModel, prefix: int) -> list[Tensor]:
    """Tokens `[1, time]` of the documents that are tried out, the first `prefix` of which all have in common."""
    embeddings: Any = base.get_input_embeddings()
    vocabulary = len(embeddings.weight)
    tokens = torch.arange(prefix + sum(PROBED_LENGTHS), device=base.device)[None] * 7 + 5
    first, *own = (tokens % vocabulary).split((prefix, *PROBED_LENGTHS), 1)
    return [torch.cat([first, each], 1) for each in own]


def _logits_alone(model: nn.Module, documents: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=document, use_cache=False)["logits"] for document in documents], 1)


def _gives(model: nn.Module, documents: list[Tensor], expected: Tensor) -> bool:
    """Whether documents have these logits where they stand in one row."""
    positions = torch.cat([torch.arange(document.shape[1], device=document.device) for document in documents])[None]
    logits = model(input_ids=torch.cat(documents, 1), position_ids=positions, use_cache=False)["logits"]
    tolerance = max(1e-4, 4 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    return torch.allclose(logits.float(), expected.float(), rtol=0, atol=tolerance)


# ---- what transformers calls


def document_mask(**settings: Any) -> Tensor | None:
    """What `AttentionMaskInterface` makes of a row of documents: `[1, 1, 1, 2 + documents]` integers on the CPU.

    The first is the window of sliding attention, 0 for none; the second `prefix_length`; the others are the tokens of
    each document. Any other input gets the mask of `sdpa`: without several documents, with padding, a cache, or a
    pattern that is not causal or sliding within documents.
    """
    lengths = _lengths_in(**settings)
    if lengths is None:
        mask: Tensor | None = AttentionMaskInterface()["sdpa"](**settings)
        return mask
    return torch.tensor([settings.get("local_size") or 0, prefix_length.get(), *lengths])[None, None, None]


def _lengths_in(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    kv_offset: int = 0,
    q_length: int | None = None,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> list[int] | None:
    """The lengths of the documents of the only row, None where there is another mask to make.

    `mask_function(batch, head, query, key)` tells which keys a query sees. It is asked where a causal or sliding
    pattern within documents would differ from any other that transformers has: six keys for each query.
    """
    if q_length is None:  # transformers before 5.6
        assert cache_position is not None
        q_length, device = len(cache_position), cache_position.device
    is_packed = not (allow_is_causal_skip or use_vmap) and attention_mask is None
    if not is_packed or batch_size > 1 or kv_offset or q_length != kv_length or torch.compiler.is_compiling():
        return None
    place = torch.arange(q_length, device=device)

    def sees(key: Tensor) -> Tensor:
        seen = mask_function(place * 0, place * 0, place, key.clamp(0, len(place) - 1))
        return seen & (key >= 0) & (key < len(place))

    starts = ~sees(place - 1)
    first = torch.where(starts, place, 0).cummax(0).values
    last_seen = first if local_size is None else first.maximum(place - local_size + 1)
    inside, outside = (place, last_seen), (place + 1, last_seen - 1, first - 1)
    checks = [sees(key) for key in inside] + [~sees(key) for key in outside] + [sees(place * 0) == (last_seen == 0)]
    if not torch.stack(checks).all():
        return None
    return [end - start for start, end in pairwise([*starts.nonzero().flatten().tolist(), q_length])]


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Softmax(cap(scaling · Q Kᵀ) + mask) V of each document; with any mask but that of `document_mask`, of each row.

    cap(s) = softcap · tanh(s / softcap), where the model has a `softcap`.

    Args:
        module: the model's attention layer.
        query: `[batch, heads, time, size]`; key and value may have fewer heads.
        key: see query.
        value: see query.
        attention_mask: of `document_mask`.
        softcap: see above.
        settings: `dropout`, `scaling`, and whatever else `sdpa` is given.

    Returns:
        `[batch, time, heads, size]`, and no weights.

    Raises:
        NotImplementedError: an attention sink, a bias by position, or a paged cache.
        ValueError: documents that do not add up to the row.
    """
    for name in ("s_aux", "sinks", "position_bias", "cache"):
        if settings.get(name) is not None:
            raise NotImplementedError(f"the attention {ATTENTION!r} knows no {name}")
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return _attention(module, query, key, value, attention_mask, softcap, settings), None
    window, prefix, *lengths = attention_mask.flatten().tolist()
    if query.shape[0] != 1 or not sum(lengths) == query.shape[2] == key.shape[2]:
        raise ValueError(f"documents of {lengths} tokens, and queries of shape {tuple(query.shape)}")
    has_prefix = [prefix == 0 or index == 0 for index, _ in enumerate(lengths)]
    # neighbours of one length are attended to at once
    runs = [(len([*run]), length, whole) for (length, whole), run in groupby(zip(lengths, has_prefix, strict=True))]
    sizes = [documents * length for documents, length, _ in runs]
    first, *_ = parts = [*zip(*(each.split(sizes, 2) for each in (query, key, value)), strict=True)]
    beginnings = [each[:, :, :prefix] for each in first]
    outputs = []
    for (documents, length, whole), part in zip(runs, parts, strict=True):
        own = [each[0].unflatten(1, (documents, length)).transpose(0, 1) for each in part]
        if not whole:
            own = [torch.cat([a.expand(documents, -1, -1, -1), b], 2) for a, b in zip(beginnings, own, strict=True)]
        q, k, v = own
        output = _attention(module, q, k, v, _window_mask(q, window), softcap, settings)
        outputs.append(output[:, output.shape[1] - length :].flatten(0, 1)[None])
    return torch.cat(outputs, 1), None


def _window_mask(query: Tensor, window: int) -> Tensor | None:
    """Which keys each query of a document sees; None where it is all up to its own place."""
    length = query.shape[2]
    if not 0 < window < length:
        return None
    sees = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return sees.tril_().triu_(1 - window)[None, None]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    settings: dict[str, Any],
) -> Tensor:
    """The attention of `sdpa`, causal without a mask; and that with a soft cap, which `sdpa` has not."""
    if softcap is None:
        output: Tensor = AttentionInterface()["sdpa"](module, query, key, value, mask, **settings)[0]
        return output
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = nn.functional.dropout(weights, settings.get("dropout") or 0.0)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, document_attention)
AttentionMaskInterface.register(ATTENTION, document_mask)

"""Answers generated for an evaluation: greedily or by beam search, from prompts alone, in batches of like length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, DynamicCache, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from hf_temporal._peft import base_model
from hf_temporal.data.rows import runs_of_targets
from hf_temporal.shared_prefix import MIN_PREFIX

from .adapters import adapter_added
from .waiting import brief_waiting_when_busy

logger = logging.get_logger(__name__)

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
OF_WHOLE_ROWS = ("max_length", "min_length", "repetition_penalty", "no_repeat_ngram_size")
AT_ONCE = 4  # results of the width of a gated feed-forward layer that are there at once
TOKENS_AT_ONCE = 1024  # of prompts, from which on a CPU takes as long for each of more
LOGITS_AT_ONCE = 3  # of a next token: the model's, a copy, and what rules make of it
DROPPED_SHARE = 0.25  # of a batch has ended when its rows leave it
PADDED_TRIAL = 9  # tokens of the longer of two rows that are tried out
ROUNDED, UNROUNDED = 2**-5, 2**-8  # of the largest logit: four roundings of bfloat16, and of TF32


def prompt_of(encoded: dict[str, list[int]]) -> list[int]:
    """The tokens in front of the first target: all that a model may see when it generates."""
    first, _ = runs_of_targets(encoded["labels"])[0]
    return encoded["input_ids"][:first]


@torch.no_grad()
def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    synced_gpus: bool = False,
) -> list[list[int]]:
    """The tokens with which a decoder-only `model` continues each prompt, end and padding included.

    Left-padded batches of similar length, no sampling; one prompt at a time, with a warning, where the model gives a
    row of a batch other logits than alone (`is_read_alone`). An adapter is added to a copy of the weights as long as
    this takes. What all prompts begin with is computed once, and a batch has as many prompts as `room` says; a greedy
    search on a CPU computes a few of like length at once before it continues all of them. Under autocast, and with
    weights that are quantized or of less than 32 bits, it is `batch_size` prompts, each computed in full: how such
    numbers are rounded depends on the batch.

    Args:
        synced_gpus: The weights are sharded: every process has as many batches as the others, and no adapter is added.
    """
    was_training = model.training
    model.eval()
    completions: list[list[int]] = [[]] * len(prompts)
    base = base_model(model)
    autocast = "forward" in vars(base)  # which accelerate has put there
    rounded = autocast or getattr(base, "is_quantized", False) or torch.finfo(model.dtype).bits < 32
    lengths = [len(prompt) for prompt in prompts]
    how = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": False,
        "return_dict_in_generate": False,
        "pad_token_id": tokenizer.pad_token_id,
        "synced_gpus": synced_gpus,
    }
    with brief_waiting_when_busy(), nullcontext() if synced_gpus else adapter_added(model):
        in_batches = len(prompts) < 2 or is_read_alone(
            model, tokenizer.pad_token_id, ROUNDED if rounded else UNROUNDED, synced_gpus=synced_gpus
        )
        if not in_batches:
            logger.warning_once(
                f"{type(base).__name__} gives a row behind padding, or beside another row, other logits than alone: "
                "answers are generated one at a time, which takes longer."
            )
            batch_size = 1
        exact = in_batches and not synced_gpus and not rounded
        prefix = prefix_cache(model, prompts) if exact else None
        in_parts = prefix is not None and can_drop(model, num_beams)
        longest = max(lengths, default=0) + max_new_tokens
        most = room(base, prefix, batch_size, longest, in_parts=in_parts)
        batches = make_batches(lengths, lambda length: most(length + max_new_tokens) if exact else batch_size)
        for chosen in tqdm(batches, "Generating", leave=False):
            batch: BatchEncoding = tokenizer.pad(
                {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
            )
            batch = batch.to(model.device)
            if prefix is not None and in_parts:
                rows = generate_and_drop(model, prefix, batch, batch_size * longest, **how)
            else:
                rows = generate_all(model, prefix, batch, **how)
            for index, row in zip(chosen, rows, strict=True):
                completions[index] = row
    model.train(was_training)
    return completions


def generate_all(model: Any, prefix: DynamicCache | None, batch: Any, **how: Any) -> list[list[int]]:
    """What `generate` appends to each row of a batch."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if prefix is not None:
        how["past_key_values"] = cache_behind_padding(prefix, padding_of(mask).repeat_interleave(how["num_beams"]))
    tokens = model.generate(input_ids=ids, attention_mask=mask, **how)
    rows: list[list[int]] = tokens[:, ids.shape[1] :].tolist()
    return rows


def generate_and_drop(
    model: Any, prefix: DynamicCache, batch: Any, at_once: int, *, max_new_tokens: int, **how: Any
) -> list[list[int]]:
    """The same for rows that are sorted by length: their first tokens in parts, the following ones of all together.

    A part computes `at_once` tokens of prompts, or fewer where more would only add padding. Rows that have ended leave
    the batch as soon as they are a share of it that pays, again and again.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width, ends = ids.shape[1], model.generation_config.eos_token_id

    def generate(ids: Tensor, mask: Tensor, cache: DynamicCache, share: float) -> tuple[Tensor, Tensor]:
        """The rows with new tokens, and which of them have ended."""
        ended = ShareEnded(ends, len(ids), share)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=width + max_new_tokens - ids.shape[1],
            stopping_criteria=StoppingCriteriaList([ended]),
            **how,
        )
        return tokens, ended.rows

    space = space_like(prefix, len(ids), width + max_new_tokens)
    computed = (mask.sum(1) - prefix.get_seq_length()).tolist()
    first = []
    for indices in make_batches(computed, lambda length: min(at_once, TOKENS_AT_ONCE) // length):
        part = slice(indices[0], indices[-1] + 1)
        cache = cache_in([(keys[part], values[part]) for keys, values in space], 0)
        layers: Any = cache_behind_padding(prefix, padding_of(mask[part])).layers
        for index, layer in enumerate(layers):
            cache.update(layer.keys, layer.values, index)
        first.append(generate(ids[part], mask[part], cache, 0.0))
    ids, ended = (torch.cat(parts) for parts in zip(*first, strict=True))
    cache = cache_in(space, width)
    del space
    rows: list[list[int]] = [[]] * len(ids)
    places = torch.arange(len(ids))
    while True:
        for place, row in zip(places.tolist(), ids[:, width:].tolist(), strict=True):
            rows[place] = row
        going = (~ended).nonzero()[:, 0]
        if not len(going) or ids.shape[1] == width + max_new_tokens:
            return rows
        if len(going) < len(ids):
            ids, mask, places = ids[going], mask[going], places[going]
            cache.batch_select_indices(going)
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ids, ended = generate(ids, mask, cache, DROPPED_SHARE)


class ShareEnded(StoppingCriteria):
    """Stops all rows once this share of them has written a token that ends them; after one token where it is 0."""

    def __init__(self, ends: int | list[int] | None, rows: int, share: float) -> None:
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long)
        self.rows = torch.zeros(rows, dtype=torch.bool)  # which have ended
        self.share = share

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        self.rows |= torch.isin(input_ids[:, -1], self.ends)
        return self.rows | (self.rows.sum() >= self.share * len(self.rows))


def is_read_alone(model: Any, pad_token_id: int, tolerance: float, *, synced_gpus: bool = False) -> bool:
    """Whether rows of a batch, one of them behind padding, get the logits of two tokens that each gets alone.

    They may differ by the share `tolerance` of the largest, for rounding depends on the batch.

    Recurrent models are seen to read padding, decoders to count it in their learned positions, and RWKV to mix rows
    that go on from its state.
    """
    ends = model.generation_config.eos_token_id
    ending = {pad_token_id, *(ends if isinstance(ends, list) else [ends])}
    vocabulary = len(base_model(model).get_input_embeddings().weight)
    then = next(token for token in range(vocabulary) if token not in ending)
    rows = torch.arange(PADDED_TRIAL, device=model.device).mul(3).add(5).remainder(vocabulary).repeat(2, 1)
    mask = torch.ones_like(rows)
    padding = PADDED_TRIAL // 2
    rows[1, :padding], mask[1, :padding] = pad_token_id, 0

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=2,
            num_beams=1,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda *_: [then],
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=pad_token_id,
            synced_gpus=synced_gpus,
        )
        return torch.stack(found.logits).float()

    together = logits(rows, mask)
    alone = torch.cat([logits(rows[:1], mask[:1]), logits(rows[1:, padding:], mask[1:, padding:])], dim=1)
    return torch.allclose(together, alone, rtol=0, atol=tolerance * float(alone.abs().max()))


def can_drop(model: Any, num_beams: int) -> bool:
    """Whether dropping rows pays, and `generate` goes on as if it had not stopped.

    On a CPU a step takes the longer the more rows there are. Some entries of a generation configuration count from
    where the call of `generate` began, or end it; those that are named here do not.
    """
    known = {*TOKENS, *SAMPLING, *OF_WHOLE_ROWS, "use_cache", "transformers_version", "_from_model_config"}
    given = {name for name, value in model.generation_config.to_diff_dict().items() if value}
    return model.device.type == "cpu" and num_beams == 1 and given <= known


def room(
    base: Any, prefix: DynamicCache | None, batch_size: int, longest: int, *, in_parts: bool = False
) -> Callable[[int], int]:
    """How many rows of some length, prompt and answer, a batch may have: `batch_size` of the longest, or more.

    With their logits in float32, as of the plain Trainer's evaluation, these rows take the memory of more of them with
    keys and values instead. Both have what the widest layer makes of a token: of all tokens of a batch, or `in_parts`
    of as many as `batch_size` rows have, and then of the next token of all rows, which has logits too.
    """
    if prefix is None:
        return lambda length: batch_size * longest // length
    layers: Any = prefix.layers
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // prefix.get_seq_length()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    widest = max((max(weight.shape) for weight in base.parameters() if vocabulary not in weight.shape), default=0)
    logits, layer = 4 * vocabulary, 4 * AT_ONCE * widest
    rows = batch_size * longest * max(logits, cached)
    memory = rows + batch_size * longest * layer
    if not in_parts:
        return lambda length: memory // (length * (cached + layer))
    return lambda length: min(rows // (length * cached), memory // (length * cached + LOGITS_AT_ONCE * logits + layer))


def make_batches(lengths: Sequence[int], most: Callable[[int], int]) -> list[list[int]]:
    """Batches of the indices of prompts of these lengths, from the shortest to the longest.

    A batch whose longest prompt has L tokens has no more than `most(L)` prompts, unless it is a single one.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batches and len(batches[-1]) < most(lengths[index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def prefix_cache(model: Any, prompts: Sequence[list[int]]) -> DynamicCache | None:
    """Keys and values of the tokens that all prompts begin with; each prompt keeps its last token to itself.

    None where these tokens are few, where the cache of the model is more than a key and a value for each token, where
    the generation configuration wants another cache or none, and for a mixture of experts that returns what its
    routers say, which cannot go on from a cache.
    """
    base, rules = base_model(model), model.generation_config
    if rules.use_cache is False or rules.cache_implementation is not None:
        return None
    takes = {"position_ids", "logits_to_keep"} <= set(inspect.signature(base.forward).parameters)
    if len(prompts) < 2 or not takes or getattr(base.config, "output_router_logits", False):
        return None
    length = min(len(prompt) for prompt in prompts) - 1
    for column in reversed(range(length)):
        if len({prompt[column] for prompt in prompts}) > 1:
            length = column
    if length < MIN_PREFIX:
        return None
    tokens = torch.tensor([prompts[0][:length]], device=model.device)
    cache = base(input_ids=tokens, use_cache=True, logits_to_keep=1).get("past_key_values")
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return cache


def padding_of(mask: Tensor) -> Tensor:
    """The tokens of padding in each row of an attention mask."""
    return (mask == 0).sum(1)


def cache_behind_padding(cache: DynamicCache, padding: Tensor) -> DynamicCache:
    """The first columns of left-padded rows: `padding` [rows] tokens, then those of `cache`.

    All of `cache` stands in the row with the least padding, and the others are cut there. What stands at the padding
    is masked.
    """
    columns = torch.arange(cache.get_seq_length() + int(padding.min()), device=padding.device) - padding[:, None]
    rows = DynamicCache()
    for index, layer in enumerate(cache.layers):
        own: Any = layer
        keys, values = (each[0][:, columns.clamp(min=0)].transpose(0, 1) for each in (own.keys, own.values))
        rows.update(keys.contiguous(), values.contiguous(), index)
    return rows


class LayerWithRoom(DynamicLayer):
    """Keys and values in the first columns of tensors that have more, where those of a new token are written.

    A `DynamicLayer` copies all that it holds for every new token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, space: tuple[Tensor, Tensor], columns: int) -> None:
        super().__init__()
        self.space = space
        self.is_initialized = True
        self._hold(columns)

    def _hold(self, columns: int) -> None:
        self.keys, self.values = (each.narrow(2, 0, columns) for each in self.space)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, more = self.get_seq_length(), key_states.shape[2]
        for each, new in zip(self.space, (key_states, value_states), strict=True):
            each.narrow(2, start, more).copy_(new)
        self._hold(start + more)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        keys, values = self.space
        self.space = keys[indices], values[indices]
        self._hold(self.get_seq_length())


Space = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [rows, heads, columns, size]


def space_like(cache: DynamicCache, rows: int, columns: int) -> Space:
    """Empty tensors for the keys and values of a model, of which `cache` has some."""
    layers: Any = cache.layers

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_empty(rows, tensor.shape[1], columns, tensor.shape[3])

    return [(empty(layer.keys), empty(layer.values)) for layer in layers]


def cache_in(space: Space, columns: int) -> DynamicCache:
    """A cache that holds the first columns and has room in the others."""
    cache = DynamicCache()
    cache.layers = [LayerWithRoom(pair, columns) for pair in space]
    return cache

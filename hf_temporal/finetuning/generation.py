"""Answers generated for an evaluation: greedily or by beam search, from prompts alone, in batches of like length."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, DynamicCache, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from hf_temporal._peft import base_model
from hf_temporal.data.rows import runs_of_targets

from .adapters import adapter_added

MIN_PREFIX = 8  # tokens that all prompts begin with
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
OF_WHOLE_ROWS = ("max_length", "min_length", "repetition_penalty", "no_repeat_ngram_size")
AT_ONCE = 4  # results of the width of a gated feed-forward layer that are there at once
PERIOD = 0.25  # seconds between two looks
BUSY_SHARE = 0.75  # of a core: 0.99 on an idle machine, 0.2 to 0.5 beside three busy processes on two cores


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

    Left-padded batches of similar length, no sampling. A LoRA adapter is added to a copy of the weights as long as
    this takes. What all prompts begin with is computed once, and a batch has as many prompts as `room` says. Under
    autocast, and with weights that are quantized or of less than 32 bits, it is `batch_size` prompts, each computed in
    full: how such numbers are rounded depends on the batch.

    Args:
        synced_gpus: The weights are sharded: every process has as many batches as the others, and no adapter is added.
    """
    was_training = model.training
    model.eval()
    completions: list[list[int]] = [[]] * len(prompts)
    base = base_model(model)
    autocast = "forward" in vars(base)  # which accelerate has put there
    rounded = autocast or getattr(base, "is_quantized", False) or torch.finfo(model.dtype).bits < 32
    exact = not synced_gpus and not rounded
    lengths = [len(prompt) for prompt in prompts]
    how = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "synced_gpus": synced_gpus,
    }
    with brief_waiting_when_busy(), nullcontext() if synced_gpus else adapter_added(model):
        prefix = prefix_cache(model, prompts) if exact else None
        tokens = room(base, prefix, batch_size, max(lengths, default=0) + max_new_tokens)
        batches = make_batches(lengths, lambda length: tokens // (length + max_new_tokens) if exact else batch_size)
        generate = generate_and_drop if prefix and can_drop(model, num_beams) else generate_all
        for chosen in tqdm(batches, "Generating", leave=False):
            batch: BatchEncoding = tokenizer.pad(
                {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
            )
            batch = batch.to(model.device)
            if prefix is not None:
                padding = (batch["attention_mask"] == 0).sum(1).repeat_interleave(num_beams)
                batch["past_key_values"] = cache_behind_padding(prefix, padding)
            for index, row in zip(chosen, generate(model, batch, **how), strict=True):
                completions[index] = row
    model.train(was_training)
    return completions


def generate_all(model: Any, batch: Any, **how: Any) -> list[list[int]]:
    """What `generate` appends to each row of a batch."""
    tokens = model.generate(**batch, **how)
    rows: list[list[int]] = tokens[:, batch["input_ids"].shape[1] :].tolist()
    return rows


def generate_and_drop(model: Any, batch: Any, *, max_new_tokens: int, **how: Any) -> list[list[int]]:
    """The same, without the rows that have ended as soon as these are half of the batch, again and again."""
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], batch["past_key_values"]
    width = ids.shape[1]
    rows: list[list[int]] = [[]] * len(ids)
    places = torch.arange(len(ids))
    while True:
        ended = HalfEnded(model.generation_config.eos_token_id, len(ids))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=width + max_new_tokens - ids.shape[1],
            stopping_criteria=StoppingCriteriaList([ended]),
            return_dict_in_generate=True,
            **how,
        )
        ids, cache = out.sequences, out.past_key_values
        for place, row in zip(places.tolist(), ids[:, width:].tolist(), strict=True):
            rows[place] = row
        going = (~ended.rows).nonzero()[:, 0]
        if not len(going) or ids.shape[1] == width + max_new_tokens:
            return rows
        ids, places = ids[going], places[going]
        mask = F.pad(mask[going], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(going)


class HalfEnded(StoppingCriteria):
    """Stops all rows once half of them have written a token that ends them."""

    def __init__(self, ends: int | list[int] | None, rows: int) -> None:
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long)
        self.rows = torch.zeros(rows, dtype=torch.bool)  # which have ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        self.rows |= torch.isin(input_ids[:, -1], self.ends)
        return self.rows | (2 * self.rows.sum() >= len(self.rows))


def can_drop(model: Any, num_beams: int) -> bool:
    """Whether dropping rows pays, and `generate` goes on as if it had not stopped.

    On a CPU a step takes the longer the more rows there are. Some entries of a generation configuration count from
    where the call of `generate` began, or end it; those that are named here do not.
    """
    known = {*TOKENS, *SAMPLING, *OF_WHOLE_ROWS, "use_cache", "transformers_version", "_from_model_config"}
    given = {name for name, value in model.generation_config.to_diff_dict().items() if value}
    return model.device.type == "cpu" and num_beams == 1 and given <= known


def room(base: Any, prefix: DynamicCache | None, batch_size: int, longest: int) -> int:
    """The tokens that a batch may have, prompts and answers: `batch_size` of the longest rows, or more.

    With their logits in float32, as of the plain Trainer's evaluation, these rows take the memory of more of them with
    keys and values instead. Both have what the widest layer makes of a token.
    """
    if prefix is None:
        return batch_size * longest
    layers: Any = prefix.layers
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // prefix.get_seq_length()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    widest = max((max(weight.shape) for weight in base.parameters() if vocabulary not in weight.shape), default=0)
    layer = 4 * AT_ONCE * widest
    return batch_size * longest * (max(4 * vocabulary, cached) + layer) // (cached + layer)


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
    cache = base(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain else None


def cache_behind_padding(cache: DynamicCache, padding: Tensor) -> DynamicCache:
    """The first columns of left-padded rows: `padding` [rows] tokens, then those of `cache`, cut at its length.

    What stands at the padding is masked.
    """
    columns = torch.arange(cache.get_seq_length(), device=padding.device) - padding[:, None]
    rows = DynamicCache()
    for index, layer in enumerate(cache.layers):
        own: Any = layer
        keys, values = (each[0][:, columns.clamp(min=0)].transpose(0, 1) for each in (own.keys, own.values))
        rows.update(keys.contiguous(), values.contiguous(), index)
    return rows


@contextmanager
def brief_waiting_when_busy() -> Iterator[None]:
    """Let OpenMP's threads wait briefly for each other, from when other processes take this thread's core.

    Threads that wait actively lose whole time slices to the others. libgomp, the OpenMP of PyTorch's builds for Linux,
    waits briefly while a process has more OpenMP threads than there are cores, so a second team of threads is held
    from then until the end. On an idle machine nothing changes, where passive waiting would cost a fifth of the time.
    """
    if not hasattr(time, "pthread_getcpuclockid") or torch.get_num_threads() == 1:
        yield
        return
    stop = threading.Event()
    clock = time.pthread_getcpuclockid(threading.get_ident())
    watcher = threading.Thread(target=_watch, args=(clock, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(clock: int, stop: threading.Event) -> None:
    """Hold a second team once the thread with this clock gets less than `BUSY_SHARE` of a core."""
    wall, used = time.perf_counter(), time.clock_gettime(clock)
    while not stop.wait(PERIOD):
        before = wall, used
        wall, used = time.perf_counter(), time.clock_gettime(clock)
        if used - before[1] < BUSY_SHARE * (wall - before[0]):
            torch.ones(1 << 20).add_(1)  # large enough that its threads are made
            stop.wait()

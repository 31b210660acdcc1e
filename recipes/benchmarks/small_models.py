"""Time a training step of each of the small models (`--config_overrides small`) on the copying problem.

    python recipes/benchmarks/small_models.py                                          # all, about two minutes
    python recipes/benchmarks/small_models.py --models mamba2 rwkv --repeats 3         # seconds

A step is forward, backward and AdamW on 32 sequences of 81 tokens: ten digits over a blank of 60. `loss` says whether
the trainer's weighted loss is exact for the model: whether its own is the cross-entropy of its logits, shifted.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from measured import carry_out, parsed, parser_of, spread
from torch.utils.data import default_collate
from transformers import AutoConfig

from hf_temporal.data.copying import FORMS, CopyingArguments
from hf_temporal.finetuning.models import ModelArguments, Seq2SeqModelArguments, load_causal_lm, load_seq2seq_lm
from hf_temporal.finetuning.small_models import SMALL
from hf_temporal.model.model_loss import read_model_loss

TASK = CopyingArguments(copying_form="digits", copy_length=10, blank_length=60)
BATCH = 32
COLUMNS = ["model", "parameters", "tokens", "seconds a step", "noise", "loss", "documents apart", "fused head"]


def measure(settings: Namespace) -> list[dict[str, Any]]:
    """The rows of all models."""
    return [row_of(name, settings.repeats, settings.seed) for name in settings.models]


def row_of(name: str, repeats: int, seed: int) -> dict[str, Any]:
    """The row of a model."""
    torch.manual_seed(seed)
    is_encoder_decoder = AutoConfig.for_model(name).is_encoder_decoder
    form = FORMS[TASK.copying_form]
    tokenizer: Any = form.tokenizer_of(TASK)
    model: Any
    if is_encoder_decoder:
        arguments = Seq2SeqModelArguments(model_type=name, config_overrides="small")
        model, _ = load_seq2seq_lm(arguments, tokenizer)
    else:
        model, _ = load_causal_lm(ModelArguments(model_type=name, config_overrides="small"), tokenizer)
    read = read_model_loss(model)
    examples = form(TASK, split="train", size=BATCH, seed=seed, is_encoder_decoder=is_encoder_decoder)
    batch = default_collate([{key: torch.tensor(each) for key, each in one.items()} for one in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    taken = seconds[1:]  # the first also allocates
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "tokens": batch["input_ids"].numel() + (batch["labels"].numel() if is_encoder_decoder else 0),
        "seconds a step": statistics.median(taken),
        "noise": spread(taken),
        "loss": read.unsupported or ("exact" if read.is_read else "not tried out"),
        "documents apart": read.keeps_documents_apart,
        "fused head": read.fused_head if isinstance(read.fused_head, str) else "exact",
        "all_seconds": taken,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=SMALL, default=list(SMALL), metavar="MODEL_TYPE")
    settings = parsed(parser, arguments)
    carry_out("small_models", settings, measure, COLUMNS)


if __name__ == "__main__":
    main()

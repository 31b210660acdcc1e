"""Time how long conversations take to become rows, in turns with TRL's SFTTrainer on the same file.

    python recipes/benchmarks/encoding.py                                   # 20,000 conversations of 4 turns
    python recipes/benchmarks/encoding.py --conversations 500 --repeats 1   # seconds

TRL's time is that of making an `SFTTrainer` with assistant_only_loss=True, less that of making one that prepares
nothing; ours that of the task's `encode`, with its checks. Both use as many processes, and nothing is cached.
"""

import importlib
import json
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
from measured import carry_out, median_ratio, parsed, parser_of, spread
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from hf_temporal.data.language_modeling import LanguageModelingArguments
from hf_temporal.data.loading import DataArguments
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.finetuning.tasks import LanguageModeling

WORDS = "the value of a file folder reads writes returns array matrix number rows and columns given by name if not set"
TURN = 40  # words
LENGTH = 1024  # tokens of a row at most


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Random conversations of four turns."""
    drawn, words = random.Random(seed), WORDS.split()
    roles = ("user", "assistant") * 2
    return [
        {"messages": [{"role": role, "content": " ".join(drawn.choices(words, k=TURN))} for role in roles]}
        for _ in range(count)
    ]


def ours(file: Path, tokenizer: PreTrainedTokenizerBase, workers: int | None) -> float:
    """Seconds of the recipe's task."""
    arguments = DataArguments(train_file=str(file), preprocessing_num_workers=workers)
    task = LanguageModeling(arguments, LanguageModelingArguments(block_size=LENGTH), text_column=None)
    start = time.perf_counter()
    task.encode(tokenizer, _config(tokenizer))
    return time.perf_counter() - start


def trl(file: Path, tokenizer: PreTrainedTokenizerBase, workers: int | None) -> float:
    """Seconds of SFTTrainer, without those that it takes with nothing to prepare."""
    examples = datasets.load_dataset("json", data_files=str(file))["train"]
    sft: Any = importlib.import_module("trl")  # no peer is among what the project needs
    seconds = {}
    for skip in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            args = sft.SFTConfig(
                folder,
                max_length=LENGTH,
                assistant_only_loss=True,
                dataset_num_proc=workers,
                dataset_kwargs={"skip_prepare_dataset": skip},
                report_to="none",
                bf16=False,
                use_cpu=True,
            )
            model = LlamaForCausalLM(_config(tokenizer))
            start = time.perf_counter()
            sft.SFTTrainer(model, args, train_dataset=examples, processing_class=tokenizer)
            seconds[skip] = time.perf_counter() - start
    return seconds[False] - seconds[True]


def _config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)


def measure(settings: Namespace) -> list[dict[str, Any]]:
    """A row for each of both, in whose rounds they take turns at being first."""
    _, tokenizer = load_causal_lm(ModelArguments(), None)
    tokenizer.chat_template = (resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    datasets.disable_caching()
    runs: dict[str, Callable[..., float]] = {"TRL's SFTTrainer": trl, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        lines = (json.dumps(each) for each in conversations(settings.conversations, settings.seed))
        file.write_text("\n".join(lines), encoding="utf-8")
        for repeat in range(settings.repeats):
            for name in [*runs][:: 1 if repeat % 2 else -1]:
                seconds[name].append(runs[name](file, tokenizer, settings.workers))
    stock = seconds["TRL's SFTTrainer"]
    return [
        {
            "what": name,
            "conversations a second": settings.conversations / statistics.median(taken),
            "rate": median_ratio(stock, taken),
            "noise": spread(taken),
            "all_seconds": taken,
        }
        for name, taken in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--workers", type=int, help="processes of each; unset: one")
    settings = parsed(parser, arguments)
    carry_out("encoding", settings, measure, ["what", "conversations a second", "rate", "noise"])


if __name__ == "__main__":
    main()

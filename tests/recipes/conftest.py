"""A tiny model and a few pairs in files, once for all recipe tests."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from recipes.comparison import runs
from tests.tiny_summarization import tiny_llama, tiny_tokenizer, write_pairs

from .stub_recipe import STUB

# The benchmarks compare with torch's own chunked loss, which its older releases do not have.
BENCHMARKS = ["test_bench_loss_head.py", "test_bench_loss_head_gpu.py", "test_bench_others.py"]
collect_ignore = [] if hasattr(torch.nn, "LinearCrossEntropyOptions") else BENCHMARKS
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Tiny:
    """Folder of a tiny Llama with its tokenizer, and the flags that name it and the data."""

    model: Path
    data_flags: list[str]

    def flags(self, output_dir: Path, *more: str) -> list[str]:
        """Those of a short LoRA run."""
        return [
            *("--model_name_or_path", str(self.model)),
            *self.data_flags,
            *("--output_dir", str(output_dir)),
            *("--use_peft", "--lora_r", "4", "--lora_dropout", "0.1"),
            *("--max_source_length", "48", "--max_target_length", "12", "--source_prefix", "Summarize:\n"),
            *("--do_train", "--do_eval", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2"),
            *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
            *("--logging_steps", "1", "--report_to", "none", "--use_cpu", "--dataloader_pin_memory", "false"),
            *more,
        ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made once."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    files = write_pairs(folder)
    return Tiny(folder / "model", [part for split, path in files.items() for part in (f"--{split}_file", str(path))])


@pytest.fixture(scope="session")
def child_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of child processes: the repository on the path, caches of their own."""
    folder = tmp_path_factory.mktemp("cache")
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that takes no time; run by Python itself."""
    monkeypatch.setattr(runs, "LAUNCHER", (sys.executable,))
    path = tmp_path / "stub_recipe.py"
    path.write_text(STUB, encoding="utf-8")
    return path


@pytest.fixture
def flags(stub: Path, tmp_path: Path) -> list[str]:
    grid = ["--powers", "0", "1", "inf", "--seeds", "0", "1", "2"]
    return [str(stub), *grid, "--metric", "recall", "--output_dir", str(tmp_path / "out")]

"""Evaluation on two processes, really run: gloo, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import DataCollatorWithFlattening, Trainer

from hf_temporal import TemporalTrainingArguments, TemporalWeightTrainer
from hf_temporal.profile import load_profiles
from tests.tiny_models import PadCollator, examples, tiny_model

EXACT = tuple(f"eval_{name}_loss" for name in ("temporal", "first_token", "head", "tail", "last_token"))
CASES = [("llama", 2.0, "sequence"), ("llama", -1.0, "batch"), ("t5", 2.0, "tokens"), ("gpt2", 2.0, "sequence")]


def evaluate(kind: type[Trainer], case: tuple[str, float, str], folder: Path) -> dict[str, float]:
    """Eleven examples, two a batch: on two processes the last batches are filled up with examples seen before."""
    name, power, normalization = case
    args = TemporalTrainingArguments(
        str(folder),
        per_device_eval_batch_size=2,
        temporal_power=power,
        temporal_normalization=normalization,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator: Any = DataCollatorWithFlattening() if name == "gpt2" else PadCollator()
    trainer = kind(tiny_model(name), args, eval_dataset=examples(name, 11), data_collator=collator)
    return {**trainer.evaluate(), "world_size": args.world_size}


def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", __file__, str(tmp_path),
        ],
        check=True, timeout=240, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for index, case in enumerate(CASES):
        alone = evaluate(TemporalWeightTrainer, case, tmp_path / "alone" / str(index))
        both = [json.loads((tmp_path / f"{index}-{rank}.json").read_text()) for rank in range(2)]
        for rank in both:
            assert rank["ours"]["world_size"] == 2
            for key in EXACT:
                assert rank["ours"][key] == pytest.approx(alone[key], rel=1e-6), (case, key)
            stock = rank["stock"]["eval_loss"] / (2 if case[0] == "t5" else 1)  # stock doubles T5's on two processes
            assert rank["ours"]["eval_loss"] == pytest.approx(stock, rel=1e-6), case
        (one,) = load_profiles(tmp_path / "alone" / str(index) / "loss_by_position.json")
        (two,) = load_profiles(tmp_path / "both" / str(index) / "loss_by_position.json")
        for left, right in zip(one["bins"], two["bins"], strict=True):
            assert left["count"] == right["count"]
            assert (left["loss"] or 0.0) == pytest.approx(right["loss"] or 0.0, rel=1e-6)
            assert left["accuracy"] == right["accuracy"]


def _rank(folder: Path) -> None:
    torch.set_num_threads(1)
    for index, case in enumerate(CASES):
        result: dict[str, Any] = {
            "ours": evaluate(TemporalWeightTrainer, case, folder / "both" / str(index)),
            "stock": evaluate(Trainer, case, folder / "stock"),
        }
        (folder / f"{index}-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
    PartialState().destroy_process_group()

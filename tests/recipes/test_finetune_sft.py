"""The recipe with TRL's SFTTrainer on a tiny model, from its command lines to the saved adapter."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", minversion="1.16.0")

from hf_temporal.finetuning.configuration import parse
from hf_temporal.finetuning.models import load_causal_lm
from hf_temporal.finetuning.tasks import Summarization
from hf_temporal.trl import TemporalWeightSFTTrainer
from recipes import finetune_causal_lm, finetune_sft
from tests.recipes.test_configs import COMMAND, RECIPES
from tests.tiny_run import Tiny
from tests.tiny_training import distance

QUICK = ("--bf16", "false", "--gradient_checkpointing", "false", "--optim", "sgd", "--max_grad_norm", "0")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def history(output_dir: Path) -> list[dict[str, Any]]:
    state = max(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    entries: list[dict[str, Any]] = json.loads(state.read_text("utf-8"))["log_history"]
    return entries


def logs(output_dir: Path) -> list[dict[str, Any]]:
    return [entry for entry in history(output_dir) if "loss" in entry]


def before(output_dir: Path) -> dict[str, Any]:
    return next(entry for entry in history(output_dir) if "eval_loss" in entry)


def test_its_commands_are_read() -> None:
    commands = list(COMMAND.finditer(str(finetune_sft.__doc__)))
    assert len(commands) == 2
    for command in commands:
        assert command["script"] == "finetune_sft.py"
        flags = shlex.split(command["flags"].replace("\\\n", " "))
        flags = [str(RECIPES.parent / flag) if flag.endswith(".yaml") else flag for flag in flags]
        *_, training_args = parse(finetune_sft.ARGUMENTS, [*flags, "--bf16", "false"])
        assert training_args.temporal_power == 1
        assert training_args.output_dir.startswith("outputs/smollm2_sft")


def test_it_trains_what_the_main_recipe_trains(tiny: Tiny, tmp_path: Path) -> None:
    flags = (*QUICK, "--temporal_power", "2", "--lora_dropout", "0", "--temporal_fused_head", "on")
    finetune_sft.main(tiny.flags(tmp_path / "sft", *flags))
    finetune_causal_lm.main(tiny.flags(tmp_path / "plain", *flags))
    ours, plain = (logs(tmp_path / name) for name in ("sft", "plain"))
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in plain], rel=1e-5)
    assert {"temporal_power", "entropy", "mean_token_accuracy", "num_tokens"} <= ours[0].keys()
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    after = json.loads((tmp_path / "sft" / "eval_results.json").read_text("utf-8"))
    assert after["eval_loss"] < before(tmp_path / "sft")["eval_loss"]
    assert "eval_tail_loss" in after


@pytest.mark.parametrize("flags", [QUICK, ("--bf16", "true")], ids=["float32", "TRL's defaults"])
def test_no_padding_is_computed_and_nothing_else_changes(
    flags: tuple[str, ...],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainers: dict[str, Any] = {}

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        def keep(*args: Any, **kwargs: Any) -> Any:
            return trainers.setdefault(name, TemporalWeightSFTTrainer(*args, **kwargs))

        monkeypatch.setattr(finetune_sft, "TemporalWeightSFTTrainer", keep)
        common = (*flags, "--lora_dropout", "0", "--temporal_power", "2", "--max_steps", "3", "--save_steps", "3")
        finetune_sft.main(tiny.flags(tmp_path / name, *common, *more))
        return load_file(tmp_path / name / "adapter_model.safetensors")

    rounding = 1e-5 if flags is QUICK else 2e-2
    with caplog.at_level("WARNING"):
        packed = run("packed")
    assert not [record for record in caplog.records if "padding" in record.message]
    padded = run("padded", "--padding_free", "false")
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    assert {name: len(batch["input_ids"]) for name, batch in batches.items()} == {"packed": 1, "padded": 4}
    assert distance(packed, padded) < rounding
    for ours, right in zip(*(history(tmp_path / name) for name in ("packed", "padded")), strict=True):
        for key in {
            "loss",
            "entropy",
            "mean_token_accuracy",
            "eval_loss",
            "eval_temporal_loss",
            "eval_tail_loss",
        } & right.keys():
            assert ours[key] == pytest.approx(right[key], rel=rounding, abs=rounding / 10), key


@pytest.mark.parametrize(
    "flags",
    [
        ("--max_length", "20"),
        ("--per_device_train_batch_size", "1"),
        ("--packing", "true"),
        ("--padding_free", "true"),
    ],
    ids=" ".join,
)
def test_where_batches_are_single_rows(flags: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    """Not where TRL would cut rows or there is nothing to gain; where packing does it, rows are cut as ever."""
    *_, args = parsed = parse(finetune_sft.ARGUMENTS, [*tiny.flags(tmp_path), "--bf16", "false", *flags])
    model, tokenizer = load_causal_lm(parsed[0], None)
    rows = Summarization(*parsed[1:3]).encode(tokenizer, model.config)
    limit = args.max_length
    finetune_sft.pad_nothing(model, args, rows)
    assert bool(args.padding_free) is ("--padding_free" in flags)
    assert args.max_length == (None if args.padding_free else limit)
    assert model.config._attn_implementation == "padding_free"


def test_two_processes_train_one_model(tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]) -> None:
    flags = (*QUICK, "--lora_dropout", "0", "--max_steps", "2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(finetune_sft.__file__), *tiny.flags(tmp_path / "two", *flags)]
    environment = {**child_environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command += ["--per_device_train_batch_size", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    finetune_sft.main(tiny.flags(tmp_path / "one", *flags))
    two, one = (logs(tmp_path / name) for name in ("two", "one"))
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in two] == pytest.approx([entry[key] for entry in one], rel=1e-4)

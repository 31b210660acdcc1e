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

pytest.importorskip("trl", minversion="1.16.0")

from hf_temporal.finetuning.configuration import parse
from recipes import finetune_causal_lm, finetune_sft
from tests.recipes.test_configs import COMMAND, RECIPES
from tests.tiny_run import Tiny

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


def test_two_processes_train_one_model(tiny: Tiny, tmp_path: Path, child_environment: dict[str, str]) -> None:
    flags = (*QUICK, "--lora_dropout", "0", "--max_steps", "2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(finetune_sft.__file__), *tiny.flags(tmp_path / "two", *flags)]
    environment = {**child_environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "--per_device_train_batch_size", "2"], env=environment, check=True)
    finetune_sft.main(tiny.flags(tmp_path / "one", *flags))
    two, one = (logs(tmp_path / name) for name in ("two", "one"))
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in two] == pytest.approx([entry[key] for entry in one], rel=1e-4)

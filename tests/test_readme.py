"""Every code block of the README runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)

STOCK_SCRIPT = """\
import torch
from transformers import Trainer, TrainingArguments
from transformers import LlamaConfig, LlamaForCausalLM

args = TrainingArguments("outputs", max_steps=3)
args.disable_tqdm, args.report_to, args.save_strategy = True, [], "no"
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
)
rows = [{"input_ids": torch.arange(3 + i, 9 + i), "labels": torch.arange(3 + i, 9 + i)} for i in range(8)]
trainer = Trainer(model, args, train_dataset=rows)
trainer.train()
"""


def test_readme_has_only_blocks_that_run() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "diff", "python"}
    assert len(BLOCKS) == (ROOT / "README.md").read_text(encoding="utf-8").count("```") / 2


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "bash"])
def test_commands_are_targets_of_make(code: str) -> None:
    for line in code.splitlines():
        command = line.split("#")[0].split()
        assert command[0] == "make"
        planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ("recipes/finetune_causal_lm.py" if command[1] == "demo" else "pytest") in planned


def test_diff_turns_a_stock_script_into_a_weighted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (diff,) = (code for language, code in BLOCKS if language == "diff")
    removed = [line[1:] for line in diff.splitlines() if line.startswith("-")]
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    script = STOCK_SCRIPT
    for old, new in zip(removed, added, strict=True):
        assert script.count(f"{old}\n") == 1
        script = script.replace(f"{old}\n", f"{new}\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "script"}
    exec(compile(script, "script", "exec"), names)
    trainer = names["trainer"]
    assert trainer.weighting.power == 2.0  # type: ignore[attr-defined]
    assert trainer.state.global_step == 3  # type: ignore[attr-defined]

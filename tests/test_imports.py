"""What is imported: nothing that takes its time before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CODE = """
import json, sys
from transformers import {trainer}
before = set(sys.modules)
{imports}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
OPTIONAL = ("datasets", "evaluate", "gguf", "matplotlib", "optuna", "peft", "rouge_score", "scipy", "trl", "yaml")
WITHOUT = """
import json, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

from transformers import Seq2SeqTrainer
sys.meta_path.insert(0, Without())
for name in [name for name in sys.modules if name.partition(".")[0] in {optional}]:
    del sys.modules[name]  # of those that Trainer itself takes where they are installed
import hf_temporal
from hf_temporal import *
print(json.dumps(sorted(name for name in sys.modules if name in {optional})))
"""
SLOW = {"evaluate", "matplotlib", "nltk", "optuna", "pandas", "rouge_score", "scipy", "tensorboard", "triton", "trl"}


def imported(imports: str, *, trainer: str) -> list[str]:
    """The modules that are imported beyond those of the trainer."""
    code = CODE.format(imports=imports, trainer=trainer)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY, encoding="utf-8"
    )
    assert ran.returncode == 0, ran.stderr
    modules: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return modules


def test_hf_temporal_imports_nothing_but_itself() -> None:
    """Beyond what Trainer itself imports: itself, and of transformers little more than its other trainer."""
    modules = imported("import hf_temporal", trainer="Trainer")
    assert "hf_temporal.trainer" in modules
    assert not any(module.startswith(("hf_temporal.data", "hf_temporal.memory")) for module in modules)
    others = [module for module in modules if module.partition(".")[0] != "hf_temporal"]
    assert all(module.startswith("transformers.") for module in others), others
    assert len(others) <= 5, others


def test_hf_temporal_works_without_what_is_optional() -> None:
    """Those that `Trainer` itself imports where they are there are gone again before ours is imported."""
    code = WITHOUT.format(optional=OPTIONAL)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY, encoding="utf-8"
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == []


def test_recipes_start_without_what_they_need_later() -> None:
    recipes = ("finetune_causal_lm", "finetune_seq2seq", "train_functional")
    modules = imported("\n".join(f"import recipes.{recipe}" for recipe in recipes), trainer="Seq2SeqTrainer")
    assert {f"recipes.{recipe}" for recipe in recipes} <= {*modules}
    assert SLOW.isdisjoint(module.partition(".")[0] for module in modules)

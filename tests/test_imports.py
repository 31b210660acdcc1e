"""What is imported: nothing that takes its time before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CODE = """
import json, sys
from transformers import {trainer}
before = set(sys.modules)
{imports}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
IMPORT = """
import sys, time
from transformers import Trainer
sys.dont_write_bytecode, sys.pycache_prefix = False, {prefix!r}
times = []
for _ in range(6):
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_temporal"]:
        del sys.modules[name]
    start = time.process_time()
    from hf_temporal import TemporalWeightTrainer
    times.append(time.process_time() - start)
print(1000 * min(times))
"""
LATER = ("hub.model_card", "hub.privacy", "linear_cross_entropy.triton_kernel", "plots", "power_plots", "suggest")
OPTIONAL = ("datasets", "gguf", "matplotlib", "optuna", "peft", "rouge_score", "scipy", "trl", "yaml")
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


# Those of the extras that none of the hard dependencies needs itself.
EXTRAS = ["datasets", "matplotlib", "optuna", "peft", "rouge_score", "scipy", "tensorboard", "trl"]
SLOW = {"matplotlib", "nltk", "optuna", "pandas", "rouge_score", "scipy", "tensorboard", "triton", "trl"}


def ran(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, encoding="utf-8")


def imported(imports: str, *, trainer: str) -> list[str]:
    """The modules that are imported beyond those of the trainer."""
    code = CODE.format(imports=imports, trainer=trainer)
    found = ran(code)
    assert found.returncode == 0, found.stderr
    modules: list[str] = json.loads(found.stdout.splitlines()[-1])
    return modules


def test_hf_temporal_imports_nothing_but_itself() -> None:
    """Beyond what Trainer itself imports: itself, and of transformers little more than its other trainer."""
    modules = imported("from hf_temporal import TemporalWeightTrainer", trainer="Trainer")
    assert "hf_temporal.trainer" in modules
    assert not any(module.startswith(("hf_temporal.data", "hf_temporal.memory")) for module in modules)
    assert {f"hf_temporal.{name}" for name in LATER}.isdisjoint(modules)
    others = [module for module in modules if module.partition(".")[0] != "hf_temporal"]
    assert all(module.startswith("transformers.") for module in others), others
    assert len(others) <= 5, others


def test_the_import_takes_at_most_50_ms(tmp_path: Path) -> None:
    """Of one core, with bytecode at hand as after an installation, beyond importing `transformers.Trainer`."""
    found = ran(IMPORT.format(prefix=str(tmp_path)))
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.splitlines()[-1]) <= 50


def test_hf_temporal_works_without_what_is_optional() -> None:
    """Those that `Trainer` itself imports where they are there are gone again before ours is imported."""
    found = ran(WITHOUT.format(optional=OPTIONAL))
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("needs", "code"),
    [
        (None, "from hf_temporal.cli import main; assert main(['--help']) == 0"),
        ("recipes", "import hf_temporal.finetuning.run"),
        ("recipes", "from hf_temporal.cli import main; import sys; sys.exit(main(['suggest']))"),
        ("plots", "import hf_temporal.plots"),
        ("memory", "from hf_temporal.memory.functionals import memory_function; memory_function('airy', 3)"),
    ],
)
def test_without_extras_what_is_missing_is_named_with_its_pip_command(needs: str | None, code: str) -> None:
    """An extra that is not installed cannot be imported."""
    found = ran(f"import sys; sys.modules |= dict.fromkeys({EXTRAS}); {code}")
    assert (found.returncode == 0) == (needs is None), found.stderr
    assert needs is None or f"accepted with: pip install 'hf-temporal[{needs}]'" in found.stderr


def test_names_and_modules_are_there_when_they_are_asked_for() -> None:
    found = ran("import hf_temporal; assert hf_temporal.trainer; assert 'power_at' in dir(hf_temporal); hf_temporal.Q")
    assert found.stderr.splitlines()[-1].startswith("AttributeError: ")
    assert found.stderr.splitlines()[-1].endswith("has no attribute 'Q'")


def test_help_of_the_command_is_there_at_once() -> None:
    found = ran("import sys; from hf_temporal.cli import main; main(['--help']); print('torch' in sys.modules)")
    assert found.stdout.splitlines()[-1] == "False", found.stderr


def test_recipes_start_without_what_they_need_later() -> None:
    recipes = ("finetune_causal_lm", "finetune_seq2seq", "laboratory.train_functional")
    modules = imported("\n".join(f"import recipes.{recipe}" for recipe in recipes), trainer="Seq2SeqTrainer")
    assert {f"recipes.{recipe}" for recipe in recipes} <= {*modules}
    assert SLOW.isdisjoint(module.partition(".")[0] for module in modules)

"""What a user installs: the wheel in an environment of its own, away from the repository, and its command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_run import Tiny, tiny

ROOT = Path(__file__).parents[1]
__all__ = ["tiny"]  # a fixture
SOURCES = ("hf_temporal", "recipes", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel; the other packages are those of the tests, less their editable install."""

    environment: Path
    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, from another folder, with nothing of the caller's Python."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"HF_DATASETS_CACHE": str(self.folder / "cache"), "HF_TEMPORAL_CACHE": str(self.folder / "cache")}
        program = str(self.environment / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built and installed offline."""
    folder = tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(folder / "source")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip += ["--python", str(environment / "bin" / "python")]
    install = ("install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))  # as what a PYTHONPATH names
    subprocess.run([*pip, *install], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (folder / "elsewhere").mkdir()
    return Installed(environment, folder / "elsewhere")


@pytest.fixture(scope="module")
def flags(tiny: Tiny, installed: Installed) -> list[str]:
    """Those of a tiny model and pairs in CSV files."""
    for name, path in zip(tiny.data_flags[::2], tiny.data_flags[1::2], strict=True):
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        with (installed.folder / f"{name[2:]}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    data = [part for name in tiny.data_flags[::2] for part in (name, f"{name[2:]}.csv")]
    return ["--model_name_or_path", str(tiny.model), *data, "--report_to", "none", "--max_source_length", "48"]


def test_it_is_the_wheel_that_is_imported(installed: Installed) -> None:
    found = installed.run("python", "-c", "import hf_temporal; print(hf_temporal.__file__)")
    assert Path(found.stdout.strip()).is_relative_to(installed.environment), found.stderr
    recipes = next(installed.environment.glob("lib/python*/site-packages/hf_temporal/recipes"))
    names = {path.relative_to(recipes).as_posix() for path in recipes.rglob("*.*")}
    shipped = {
        path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes" / "configs").rglob("*.yaml")
    }
    assert shipped | {"finetune_causal_lm.py", "finetune_seq2seq.py", "accelerate/fsdp2.yaml"} <= names
    assert not {name.partition("/")[0] for name in names} & {"benchmarks", "laboratory", "examples", "results"}


def test_a_model_is_fine_tuned_on_a_csv_file(installed: Installed, flags: list[str], tiny: Tiny) -> None:
    ran = installed.run(
        *("hf-temporal", "finetune-causal-lm", "--accelerate_config", "cpu", *flags, "--use_peft", "--do_train"),
        *("--do_eval", "--max_steps", "2", "--max_target_length", "4", "--max_eval_samples", "2"),
        *("--output_dir", "mine"),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "| ROUGE-1" in ran.stdout
    assert (installed.folder / "mine" / "adapter_model.safetensors").is_file()
    card = (installed.folder / "mine" / "README.md").read_text("utf-8")
    assert "hf-temporal finetune-causal-lm --model_name_or_path" in card
    for path in (tiny.model.parent, installed.environment):
        assert str(path) not in card


def test_powers_are_suggested_for_it(installed: Installed, flags: list[str]) -> None:
    ran = installed.run("hf-temporal", "suggest", *flags, "--output_dir", "look")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "| weight at p = 4 " in ran.stdout
    assert (installed.folder / "look" / "suggested_power.png").is_file()


def test_a_configuration_of_the_package_is_named(installed: Installed) -> None:
    ran = installed.run(
        *("hf-temporal", "finetune-causal-lm", "--config", "copying/small_llama", "--max_steps", "1"),
        *("--blank_length", "4", "--copy_length", "2", "--max_eval_samples", "2", "--report_to", "none"),
        *("--num_processes", "1", "--output_dir", "copies"),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "--config copying/small_llama" in (installed.folder / "copies" / "README.md").read_text("utf-8")


def test_the_status_of_a_run_that_fails_is_handed_on(installed: Installed) -> None:
    ran = installed.run("hf-temporal", "finetune-seq2seq", "--config", "copying/small_t5", "--temporal_pwer", "2")
    assert ran.returncode == 1
    assert "--temporal_pwer is no argument of this recipe; the nearest is --temporal_power" in ran.stderr
    assert "CalledProcessError" not in ran.stderr


def test_help_is_in_the_name_of_the_command(installed: Installed) -> None:
    ran = installed.run("hf-temporal", "finetune-seq2seq", "--help")
    assert ran.stdout.startswith("usage: hf-temporal finetune-seq2seq [--config FILE.yaml]"), ran.stderr

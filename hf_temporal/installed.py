"""What is installed: packages of an extra, and the recipes with their configurations."""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The modules of an extra that are needed from the start, as pyproject.toml declares them.
EXTRAS = {
    "recipes": ("datasets", "evaluate", "filelock", "matplotlib", "peft", "rouge_score", "scipy", "yaml"),
    "plots": ("matplotlib",),
    "memory": ("scipy",),
    "search": ("optuna",),
    "trl": ("trl",),
}


def require(extra: str) -> None:
    """Check that the packages of an extra are installed; the error has the pip command."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"not installed: {', '.join(missing)}; accepted with: pip install 'hf-temporal[{extra}]'"
        )


def recipes() -> Path:
    """The folder of the recipes: in the installed package, or beside it in a clone."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def config_path(given: str) -> Path:
    """The YAML file of a recipe's arguments: a file, or a configuration of the package by its name."""
    return _file_or_shipped(given, recipes() / "configs", "config")


def engine_path(given: str) -> Path:
    """A configuration of `accelerate launch`: a file, or one of the package by its name."""
    return _file_or_shipped(given, recipes() / "accelerate", "accelerate_config")


def nearest(name: object, names: Iterable[str]) -> str:
    """The one of the names that is most like a mistyped one."""
    return difflib.get_close_matches(str(name), [*names], n=1, cutoff=0.0)[0]


def _file_or_shipped(given: str, folder: Path, argument: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    shipped = {each.relative_to(folder).with_suffix("").as_posix(): each for each in folder.rglob("*.yaml")}
    if given not in shipped:
        names = sorted(shipped)
        raise ValueError(
            f"{argument}={given!r} is neither a file nor a configuration of the package; the nearest is "
            f"{nearest(given, names)!r}; looked at {path.absolute()}; accepted: a YAML file, or {', '.join(names)}"
        )
    return shipped[given]

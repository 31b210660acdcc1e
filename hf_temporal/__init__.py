"""Drop-in replacements for the Hugging Face `Trainer` that give each target token the weight t^p."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name or a module; torch and transformers are loaded with the first, and not to print a help."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    public = import_module("._public", __name__)
    if name in globals():  # a module that was loaded with them
        return globals()[name]
    return getattr(public, name)


def __dir__() -> list[str]:
    return [*globals(), *import_module("._public", __name__).__all__]

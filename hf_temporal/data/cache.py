"""Folders that are made once and kept in the cache of the user."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants


def cache_directory() -> Path:
    """`$HF_TEMPORAL_CACHE`, else `hf_temporal` in the Hugging Face cache (`$HF_HOME`, `$XDG_CACHE_HOME`)."""
    return Path(os.environ.get("HF_TEMPORAL_CACHE") or Path(constants.HF_HOME) / "hf_temporal").expanduser()


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of the cache, filled by `make(folder)` if it is not there.

    It appears whole or not at all, because `make` writes into a folder beside it that is then renamed. Of several
    processes one makes it while the others wait.
    """
    folder = cache_directory() / name
    if folder.is_dir():  # without a lock, which a read-only cache does not allow
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            make(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder

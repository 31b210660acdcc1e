"""Summarization data that every Python environment holds: docstrings, whose first paragraph is the summary."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils import tqdm

from . import SPLITS, docstring_reader
from .cache import made_once

EXTRACTION_VERSION = 1  # raise it with every change of what is read, kept or how it is split
MAX_PAIRS = 20_000
HELD_OUT_SHARE = 0.05  # of the pairs, for validation and for test each
MAX_HELD_OUT_PACKAGE_SHARE = 0.02  # a larger package is always trained on
STANDARD_LIBRARY = "python"
THIS = "hf-temporal"

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor"})
_FILES_PER_PROCESS = 200


class Pair(NamedTuple):
    """One example: a docstring's first paragraph, `summary`, and the rest, `body`."""

    package: str
    body: str
    summary: str


class SourceFile(NamedTuple):
    """A Python file and the distribution that installed it."""

    package: str
    name: str
    path: Path


def docstring_files() -> dict[str, Path]:
    """JSON Lines files "train", "validation" and "test" with `package`, `body`, `summary`, and "provenance" (JSON).

    They hold at most `MAX_PAIRS` pairs of this environment's packages, and no package is in two files. They are made
    on first use; the cache's key is a hash of all versions, `EXTRACTION_VERSION` among them. "provenance" has the
    sha256 of the three files, the versions, and how many pairs are of each package.
    """
    versions = package_versions()
    key = hashlib.sha256(json.dumps([EXTRACTION_VERSION, versions]).encode()).hexdigest()[:16]
    folder = made_once(f"docstrings-{key}", lambda unfinished: _write(unfinished, versions))
    return {split: folder / f"{split}.jsonl" for split in SPLITS} | {"provenance": folder / "provenance.json"}


def package_versions() -> dict[str, str]:
    """Version of Python and of every installed distribution but this one, sorted by name."""
    read = (each.metadata for each in metadata.distributions())  # `name` and `version` would each read it again
    installed = {_normalized(each["Name"]): each["Version"] for each in read}
    installed.pop(THIS, None)
    return dict(sorted((installed | {STANDARD_LIBRARY: platform.python_version()}).items()))


def installed_files() -> list[SourceFile]:
    """Every Python file of the standard library and of the distributions except tests and vendored copies."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [SourceFile(STANDARD_LIBRARY, path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    for distribution in metadata.distributions():
        # as in `distribution.files`, which takes ten times as long
        record = csv.reader((distribution.read_text("RECORD") or "").splitlines())
        names = [row[0] for row in record if row[0].endswith(".py") and not row[0].startswith("..")]
        package = _normalized(distribution.name)
        files += [SourceFile(package, name, Path(str(distribution.locate_file(name)))) for name in names]
    wanted = {(each.package, each.name): each for each in files if _is_wanted(each)}
    return sorted(wanted.values())


def extract_pairs(files: list[SourceFile]) -> list[Pair]:
    """The pairs of `files` in their order; a body that several packages have is that of the first."""
    chunks = [files[start : start + _FILES_PER_PROCESS] for start in range(0, len(files), _FILES_PER_PROCESS)]
    unique: dict[str, Pair] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(_read, chunks), desc="Reading docstrings", total=len(chunks), unit="batch")
        for file, pairs in zip(files, chain.from_iterable(found), strict=True):
            for body, summary in pairs:
                unique.setdefault(" ".join(body.lower().split()), Pair(file.package, body, summary))
    return list(unique.values())


def _read(files: list[SourceFile]) -> list[list[list[str]]]:
    """What `docstring_reader` finds in each file, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-I", docstring_reader.__file__],
        input=json.dumps([str(file.path) for file in files]),
        capture_output=True, check=True, encoding="utf-8",
    )  # fmt: skip
    return [json.loads(line) for line in answer.stdout.splitlines()]


def split_by_package(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Train, validation and test, with no package in two of them; each is sorted by the hashes of its pairs.

    Small packages go to test and validation in the order of their names' hashes until each has its share.
    """
    sizes = Counter(pair.package for pair in pairs)
    side_of: dict[str, str] = {}
    filled: Counter[str] = Counter()
    for package in sorted(sizes, key=_digest):
        wanting = [side for side in ("test", "validation") if filled[side] < HELD_OUT_SHARE * len(pairs)]
        side = wanting[0] if wanting and sizes[package] <= MAX_HELD_OUT_PACKAGE_SHARE * len(pairs) else "train"
        side_of[package] = side
        filled[side] += sizes[package]
    shuffled = _by_digest(pairs)
    return {side: [pair for pair in shuffled if side_of[pair.package] == side] for side in SPLITS}


def _write(folder: Path, versions: dict[str, str]) -> None:
    splits = split_by_package(_by_digest(extract_pairs(installed_files()))[:MAX_PAIRS])
    digest = hashlib.sha256()
    for split, chosen in splits.items():
        lines = "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in chosen).encode()
        digest.update(lines)
        (folder / f"{split}.jsonl").write_bytes(lines)
    provenance = {
        "sha256": digest.hexdigest(),
        "pairs": {split: dict(sorted(Counter(pair.package for pair in splits[split]).items())) for split in SPLITS},
        "versions": versions,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _is_wanted(file: SourceFile) -> bool:
    *folders, name = Path(file.name).parts
    return file.package != THIS and _SKIPPED_FOLDERS.isdisjoint(folders) and not name.startswith("test_")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _by_digest(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: _digest("\0".join(pair)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

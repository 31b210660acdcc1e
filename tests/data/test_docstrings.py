"""Docstrings become pairs: which ones, from which files, on which side of the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_temporal.data import docstrings
from hf_temporal.data.docstring_reader import pairs_of_file, split_docstring
from hf_temporal.data.docstrings import Pair, SourceFile, docstring_files, extract_pairs, split_by_package

BODY = "The file is read line by line, and lines that begin with a number sign are left out. Empty lines are kept."
OTHER_BODY = (
    "Whatever the caller hands over is sorted first, so that two calls with the same names always give one answer."
)


def write_module(path: Path, docstring: str, code: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{docstring}"""\n{code}\n', encoding="utf-8")
    return path


def test_first_paragraph_is_the_summary_and_the_rest_the_body() -> None:
    docstring = f"Read a file\n    of settings.\n\n    {BODY}\n    \n    Second paragraph.\n    "
    assert split_docstring(docstring) == (f"{BODY}\n\nSecond paragraph.", "Read a file of settings.")


@pytest.mark.parametrize(
    "docstring",
    [
        "Read a file of settings.",
        "Read a file of settings.\n\nToo short a body.",
        f"Too short.\n\n{BODY}",
        f"{'very ' * 40}long summary.\n\n{BODY}",
        f".. deprecated:: 1.2 use the other function.\n\n{BODY}",
        f"Parameters of the function are these:\n\n{BODY}",
        f"Args: the name of a file.\n\n{BODY}",
        f"path (`str`): The name of a file.\n\n{BODY}",
        "Read a file of settings.\n\n" + ">>> f(1, x=2) == [3, 4]  # 5\n" * 10,
        "-- == -- == ++ ==\n\n" + BODY,
        "\n\n",
    ],
)
def test_what_does_not_read_like_a_text_is_left_out(docstring: str) -> None:
    assert split_docstring(docstring) is None


def test_files_are_read_in_order_and_never_imported(tmp_path: Path) -> None:
    code = f'''
raise RuntimeError("imported")

class Reader:
    """Reads files of settings.

    {BODY}
    """

    def read(self):
        """Read the very next line.

        {OTHER_BODY}
        """
'''
    path = write_module(tmp_path / "module.py", "A module of one class.", code)
    assert pairs_of_file(path) == [(BODY, "Reads files of settings."), (OTHER_BODY, "Read the very next line.")]


@pytest.mark.parametrize("content", [b"def broken(:", b"\xff\xfe\x00", b"# coding: no-such-thing\n"])
def test_files_that_cannot_be_parsed_have_no_pairs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert pairs_of_file(path) == []
    assert pairs_of_file(tmp_path / "missing.py") == []


def test_each_body_is_kept_once_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "_FILES_PER_PROCESS", 2)
    texts = [
        ("first", f"Read a file of settings.\n\n{BODY}"),
        ("second", f"Says the same elsewhere.\n\n{BODY.upper()}"),
        ("second", "No body here at all."),
        ("third", f"Sort what is given.\n\n{OTHER_BODY}"),
        ("third", f"Read a file of settings.\n\n{BODY}"),
    ]
    files = [
        SourceFile(package, f"{index}.py", write_module(tmp_path / f"{index}.py", text))
        for index, (package, text) in enumerate(texts)
    ]
    expected = [Pair("first", BODY, "Read a file of settings."), Pair("third", OTHER_BODY, "Sort what is given.")]
    assert extract_pairs(files) == expected


def many_pairs() -> list[Pair]:
    sizes = {f"large{index}": 75 for index in range(10)} | {f"small{index}": 10 for index in range(25)}
    return [
        Pair(name, f"body {index} of {name}", f"summary {index}") for name in sizes for index in range(sizes[name])
    ]


def test_no_package_is_on_two_sides_and_large_ones_are_trained_on() -> None:
    pairs = many_pairs()
    splits = split_by_package(pairs)
    packages = {split: {pair.package for pair in chosen} for split, chosen in splits.items()}
    assert not packages["train"] & packages["validation"]
    assert not packages["train"] & packages["test"]
    assert not packages["validation"] & packages["test"]
    assert {f"large{index}" for index in range(10)} <= packages["train"]
    assert sorted(pair for chosen in splits.values() for pair in chosen) == sorted(pairs)
    assert [len(splits[split]) for split in ("validation", "test")] == [50, 50]


def test_split_does_not_depend_on_the_order_of_the_pairs() -> None:
    pairs = many_pairs()
    assert split_by_package(pairs) == split_by_package(pairs[::-1])


def test_rows_of_a_split_mix_its_packages() -> None:
    first = [pair.package for pair in split_by_package(many_pairs())["validation"][:10]]
    assert len(set(first)) > 2


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an environment of fifteen packages with eight modules each."""
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(tmp_path / "cache"))
    files = []
    for package in range(15):
        for module in range(8):
            name = f"p{package}/m{module}.py"
            text = f"Say number {module} of {package}.\n\n{BODY} This is module {module} of the package p{package}."
            files.append(SourceFile(f"p{package}", name, write_module(tmp_path / name, text)))
    monkeypatch.setattr(docstrings, "installed_files", lambda: files)
    monkeypatch.setattr(docstrings, "MAX_HELD_OUT_PACKAGE_SHARE", 0.1)
    monkeypatch.setattr(docstrings, "package_versions", lambda: {"p0": "1.0"})
    return tmp_path


def test_files_and_their_provenance(environment: Path) -> None:
    files = docstring_files()
    rows = {split: files[split].read_text("utf-8").splitlines() for split in ("train", "validation", "test")}
    assert [len(rows[split]) for split in rows] == [104, 8, 8]
    pair = json.loads(rows["train"][0])
    assert set(pair) == {"package", "body", "summary"}
    assert pair["summary"].startswith("Say number")
    provenance = json.loads(files["provenance"].read_text("utf-8"))
    assert provenance["versions"] == {"p0": "1.0"}
    assert sum(provenance["pairs"]["train"].values()) == 104
    assert environment / "cache" in files["train"].parents


def test_second_call_reads_the_cache_and_other_versions_do_not(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del environment
    first = docstring_files()
    monkeypatch.setattr(docstrings, "extract_pairs", lambda files: pytest.fail(f"read {len(files)} files again"))
    assert docstring_files() == first
    monkeypatch.setattr(docstrings, "package_versions", lambda: {"p0": "1.1"})
    with pytest.raises(pytest.fail.Exception, match="read 120 files again"):
        docstring_files()


def test_the_same_environment_gives_the_same_bytes(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {split: path.read_bytes() for split, path in docstring_files().items()}
    monkeypatch.setenv("HF_TEMPORAL_CACHE", str(environment / "other"))
    assert {split: path.read_bytes() for split, path in docstring_files().items()} == first


def test_no_more_pairs_than_wanted(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del environment
    monkeypatch.setattr(docstrings, "MAX_PAIRS", 60)
    counts = json.loads(docstring_files()["provenance"].read_text("utf-8"))["pairs"]
    assert sum(sum(packages.values()) for packages in counts.values()) == 60


def test_files_of_this_environment() -> None:
    files = docstrings.installed_files()
    packages = {file.package for file in files}
    assert {"python", "torch", "transformers"} <= packages
    assert "hf-temporal" not in packages
    assert not [file for file in files if {"tests", "_vendor", "site-packages"} & set(Path(file.name).parts)]
    assert files == sorted(files, key=lambda file: (file.package, file.name))
    assert all(file.path.is_file() for file in files[:: len(files) // 50])

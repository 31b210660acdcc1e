"""Reads (rest, first paragraph) of docstrings from Python files, which are parsed and not imported.

Run as a script it takes a JSON list of paths on standard input and prints a JSON list of pairs per file. It needs the
standard library alone, so that many processes of it start at once in little time.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

MIN_BODY_WORDS = 20
SUMMARY_WORDS = range(4, 41)
MIN_SHARE_OF_WORDS = 0.6

_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*[.,;:!?)]*")
_NO_SUMMARY = re.compile(r"\w+:( |$)|\w+ \(")  # a section's title, a parameter's entry


def pairs_of_file(path: Path) -> list[tuple[str, str]]:
    """(body, summary) of the docstrings in a file; none if it is missing or cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    pairs = (split_docstring(docstring) for docstring in _docstrings(tree))
    return [pair for pair in pairs if pair is not None]


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(body, summary), or None if there is no body or one of them does not read like a text."""
    summary, _, body = _PARAGRAPH_BREAK.sub("\n\n", cleandoc(docstring)).partition("\n\n")
    summary, body = " ".join(summary.split()), body.strip()
    if len(summary.split()) not in SUMMARY_WORDS or len(body.split()) < MIN_BODY_WORDS:
        return None
    if not summary[0].isalpha() or summary.endswith((":", ",")) or _NO_SUMMARY.match(summary):
        return None
    share = min(_share_of_words(summary), _share_of_words(body))
    return (body, summary) if share >= MIN_SHARE_OF_WORDS else None


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module and of its classes and functions, in the order of the file."""
    waiting: list[ast.stmt | ast.Module] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                yield docstring
        waiting.extend(reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]))


def _share_of_words(text: str) -> float:
    pieces = text.split()
    return sum(_WORD.fullmatch(piece) is not None for piece in pieces) / len(pieces)


if __name__ == "__main__":
    for name in json.load(sys.stdin):
        sys.stdout.write(json.dumps(pairs_of_file(Path(name))) + "\n")

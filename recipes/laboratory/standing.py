"""What the laboratory's comparisons share: a recipe with flags that stand unless others are given."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hf_temporal.compare.grid import flag_name
from recipes import compare_powers

ROOT = Path(__file__).resolve().parent
FAMILIES = "model_type=memory_linear_rnn,memory_tanh_rnn,memory_tcn,memory_state_space,memory_attention"
SHARED = {"seeds": "0 1 2", "max_parallel": "2", "report_to": "none", "save_strategy": "no"}


def compare(recipe: str, standing: Mapping[str, str], *, description: str | None) -> int:
    """`compare_powers` on a recipe of this folder; the exit status.

    Each of the `standing` and `SHARED` flags, whose values are separated by spaces, gives way to one of the same name
    on the command line. The standing config is a path in this folder, as `recipe` is.
    """
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        print(f"{description}\n")
    given = {flag_name(each) for each in argv if each.startswith("--")}
    standing = {**standing, **SHARED, "config": path_of(standing["config"])}
    flags = [word for name, values in standing.items() if name not in given for word in (f"--{name}", *values.split())]
    return compare_powers.main([path_of(recipe), *flags, *argv])


def path_of(name: str) -> str:
    """A file of this folder as seen from where the command was typed, since commands are written down."""
    return os.path.relpath(ROOT / name)

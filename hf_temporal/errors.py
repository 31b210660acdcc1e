"""Errors that a user can mend, and how a command tells them: in one line, where a bug shows its traceback."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hf_temporal.installed import PACKAGE, recipes

PROGRAM_VARIABLE = "HF_TEMPORAL_PROGRAM"  # what the user typed, for the processes that `hf-temporal` launches


def is_users_mistake(error: BaseException) -> bool:
    """Whether a `raise` statement of this package or its recipes refused what it was given.

    A ValueError that a library or a built-in function raises is unexpected, and its traceback is needed.
    """
    if not isinstance(error, (ModuleNotFoundError, ValueError)):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(Path(innermost.filename).resolve().is_relative_to(folder) for folder in (PACKAGE, recipes()))
    return ours and (innermost.line or "").startswith("raise ")


def in_one_line(error: BaseException) -> str:
    """The message, its line breaks replaced by spaces."""
    return " ".join(str(error).split())


def run_script(main: Callable[[], None]) -> None:
    """Run a recipe's `main` in one of the launched processes, and leave their group.

    A user's mistake ends it with one line on stderr and exit status 1.
    """
    sys.argv[0] = os.environ.get(PROGRAM_VARIABLE, sys.argv[0])
    try:
        main()
        from accelerate import PartialState

        PartialState().destroy_process_group()
        # The group ends with its last reference, which a trainer's cycles hold: gloo's threads would outlive the
        # interpreter, and one that then drops a tensor aborts a process that has done all its work.
        gc.collect()
    except (ModuleNotFoundError, ValueError) as error:
        if not is_users_mistake(error):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {in_one_line(error)}")

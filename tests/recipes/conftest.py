"""The fixtures of short runs."""

from tests.tiny_run import child_environment, tiny

__all__ = ["child_environment", "tiny"]

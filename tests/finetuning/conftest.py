"""The fixtures of short runs, and tiny checkpoints."""

from tests.finetuning.tiny_checkpoints import bert, llama, t5_pegasus
from tests.tiny_run import child_environment, tiny

__all__ = ["bert", "child_environment", "llama", "t5_pegasus", "tiny"]

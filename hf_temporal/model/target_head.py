"""The LM head at the positions alone that answer a target, during one forward call of an evaluation."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .fused_head import answer_logits


@contextlib.contextmanager
def head_at(head: nn.Module, root: nn.Module, rows: Tensor, length: int) -> Iterator[None]:
    """While inside, a call of the model returns the logits `[1, n, V]` of n positions in place of all.

    The head's own `forward` is given their hidden states, and what the model does to its logits afterwards it does to
    these. `model_loss` has found out that this is no more than a scale, a soft cap and a bias.

    Args:
        head: the model's output embeddings.
        root: the model inside any wrapper of accelerate's.
        rows: the positions, indices into the flattened labels, `[n]`.
        length: the number of labels in a row.
    """
    own = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = answer_logits(root, hidden, length).flatten(0, 1)
        return own(states.index_select(0, rows.to(states.device))[None], *args, **kwargs)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward

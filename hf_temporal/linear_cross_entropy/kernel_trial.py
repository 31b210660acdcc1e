"""Whether the Triton kernel can be trusted: its results on a few rows beside those of PyTorch, at the first use."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .block_head import BlockHead
from .head import Head, Term
from .row_head import RowHead

ROWS, CHUNK = 8, 3  # three chunks: gradients are begun, added to and finished
SPREAD = 3.0  # of the logits, so that many words have a probability that is seen in the gradients
LOSS = "the loss"
FAULTS: dict[Any, str] = {}  # what the kernel did wrong with each kind of head so far, empty where it did nothing


def is_trusted(terms: Sequence[Term], bias: Tensor | None, **settings: Any) -> bool:
    """Whether the kernel gives the losses and gradients of `BlockHead`, tried once for each kind of head.

    Heads are of one kind where the same compiled kernel serves them: device, dtypes, size of the vocabulary, and
    whether there is a bias, a soft cap or label smoothing; the kernel sees logits, whatever the width of the head. The
    trial waits for the device. A kind that is first met while a CUDA graph is captured is left to PyTorch, untried.
    A fault is told in one warning, and ends the use of the kernel in this process.

    Args:
        terms: the products in the sum of the logits, whichever of their gradients are needed.
        bias: b, [V].
        settings: the other fields of `Head`.

    Raises:
        torch.OutOfMemoryError: there is not even memory for these rows.
    """
    V, device = len(terms[0].matrix), terms[0].matrix.device
    dtypes = [settings["exact"], settings["stored"], *((term.matrix.dtype, term.dtype) for term in terms)]
    options = (bias is not None and bias.dtype, settings["softcap"] is None, settings["label_smoothing"] == 0)
    kind = (device, V, *dtypes, options)
    if kind not in FAULTS and not any(FAULTS.values()):
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        FAULTS[kind] = fault = _fault(terms, bias, settings)
        if fault:
            warnings.warn(f"the fused head runs without Triton, which is installed but {fault}", stacklevel=2)
    return not any(FAULTS.values())


def _fault(terms: Sequence[Term], bias: Tensor | None, settings: dict[str, Any]) -> str:
    """What the kernel does wrong, else empty.

    The hidden states of a row are a power of two and otherwise 0: it makes logits of a usual size from a column of the
    real head, and no product of 16 bits is rounded, so that both ways begin with the same logits.
    """
    numbers = torch.arange(ROWS, device=terms[0].matrix.device)
    y = numbers * (len(terms[0].matrix) - 1) // (ROWS - 1)
    scale = abs(settings["logit_scale"]) or 1.0
    w = (numbers / (ROWS * scale)).to(settings["exact"])  # gradients of up to 1, as far as float16 has digits
    pairs = []
    for term in terms:
        columns = term.matrix[:, :ROWS].contiguous()
        size = columns.float().square().mean(0).sqrt() * scale
        powers = (SPREAD / size.clamp(min=1e-3)).log2().round().exp2()
        pairs.append((powers.diag()[numbers % columns.shape[1]].to(term.dtype), columns))
    expected = _results(BlockHead, pairs, bias, y, w, settings)
    try:
        found = _results(RowHead, pairs, bias, y, w, settings)
        differences = (_difference(name, found[name], right, settings["stored"]) for name, right in expected.items())
        return next(filter(None, differences), "")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a compiler and a driver may raise anything
        return f"failed: {error}"


def _results(
    backend: type[Head],
    pairs: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    y: Tensor,
    w: Tensor,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """What the trial compares: losses and gradients, and the losses where no gradient is wanted."""
    chunks = [slice(start, min(start + CHUNK, ROWS)) for start in range(0, ROWS, CHUNK)]
    results = {}
    for name, trains in ((LOSS, True), (f"{LOSS} without gradients", False)):
        terms = [Term(matrix, x.dtype, trains, matrix.dtype if trains else None) for x, matrix in pairs]
        grad_bias = torch.zeros_like(bias, dtype=settings["exact"]) if trains and bias is not None else None
        head = backend(terms, bias=bias, grad_bias=grad_bias, **settings)
        head.make_gradients(len(chunks))
        head.reserve(CHUNK)
        xs = [[x[chunk] for x, _ in pairs] for chunk in chunks]
        ends = [{"is_first": chunk.start == 0, "is_last": chunk.stop == ROWS} for chunk in chunks]
        parts = [head.losses(x, y[chunk], w[chunk], **end) for x, chunk, end in zip(xs, chunks, ends, strict=True)]
        results[name] = torch.cat([losses for losses, _ in parts])
        for i, term in enumerate(terms):
            if term.grad_matrix is not None:
                results[f"the gradient of head weight {i}"] = term.grad_matrix
                of_chunks = [grads_x[i] for _, grads_x in parts]
                results[f"the gradient of hidden states {i}"] = torch.cat([g for g in of_chunks if g is not None])
        if grad_bias is not None:
            results["the gradient of the bias"] = grad_bias
    return results


def _difference(name: str, found: Tensor, expected: Tensor, stored: torch.dtype) -> str:
    """The entry that is most in error, else empty.

    Most rows of a gradient of the head are as small as a word's probability, and are held to a share of themselves.
    Products of float32 may run as TF32, which has the digits of float16.
    """
    finite = expected.isfinite()
    if not finite.any():
        return ""
    found, right = found[finite].float(), expected[finite].float()
    eps = torch.finfo(torch.float16 if stored == torch.float32 else stored).eps
    share = eps if name.startswith(LOSS) else 8 * eps
    smallest = 8 * torch.finfo(stored).tiny * torch.finfo(stored).eps  # a few of the least steps, float16's are large
    allowed = share * right.abs() + (8 * share / len(expected) + smallest) * right.abs().max()
    excess = ((found - right).abs() - allowed).nan_to_num(nan=math.inf)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ""
    return (
        f"gives {found[worst]:.6g} in {name}, where PyTorch gives {right[worst]:.6g}; "
        f"accepted: a difference of up to {allowed[worst]:.2g}"
    )

"""Time two other ways of computing x Wᵀ + s (x Aᵀ) Bᵀ of a LoRA layer, beside PEFT's, in whole training steps.

    python recipes/benchmarks/lora_products.py --tokens 640 2048

- *one function*: a single autograd function, whose small products are added in place to the large ones;
- *sum*: the matrix W + s B A is made anew in each step, and no small product is left in the forward pass;
- *frozen*: no adapter at all, and the gradient goes down to the embeddings: what is left cannot be saved.

SmolLM2-135M-Instruct with rank 8 in all linear layers, eight documents in a padding-free row, forward and backward
pass without the LM head's loss.
"""

import statistics
import time
import types
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from measured import carry_out, median_ratio, parsed, parser_of, spread
from peft.tuners.lora import Linear
from torch import Tensor

from hf_temporal.finetuning.adapters import add_adapter
from hf_temporal.finetuning.models import ModelArguments, load_causal_lm
from hf_temporal.padding_free import use_padding_free

DOCUMENTS = 8


class OneFunction(torch.autograd.Function):
    """Small products that are added to the large ones in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        rows = x.flatten(0, -2)
        h = rows @ A.t()
        ctx.save_for_backward(rows, W, A, B, h)
        ctx.s = s
        return (rows @ W.t()).addmm_(h, B.t(), alpha=s).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_h = rows @ (ctx.s * B)
        grad_x = (rows @ W).addmm_(grad_h, A).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_h.t() @ x, ctx.s * (rows.t() @ h), None


class Sum(torch.autograd.Function):
    """One large product with W + s B A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        rows, both = x.flatten(0, -2), torch.addmm(W, B, A, alpha=s)
        ctx.save_for_backward(rows, both, A, B)
        ctx.s = s
        return (rows @ both.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, both, A, B = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = (rows @ both).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None, (rows @ (ctx.s * B)).t() @ x, ctx.s * (rows.t() @ (x @ A.t())), None


WAYS: dict[str, Any] = {"PEFT": None, "one function": OneFunction, "sum": Sum, "frozen": None}


def model_of(way: str) -> Any:
    """The model, whose LoRA layers compute in this way."""
    arguments = ModelArguments(use_peft=True)
    model: Any = load_causal_lm(arguments, None)[0]
    if way == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    else:
        model = add_adapter(model, arguments, "CAUSAL_LM")
    use_padding_free(model)
    if function := WAYS[way]:

        def forward(layer: Any, x: Tensor) -> Any:
            factors = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
            return function.apply(x, layer.base_layer.weight, *factors, layer.scaling["default"])

        layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Linear)]
        for layer in layers:
            layer.forward = types.MethodType(forward, layer)
    return model.train()


def step(model: Any, tokens: int) -> float:
    """Seconds of a forward and backward pass."""
    size = tokens // DOCUMENTS
    ids = torch.randint(10, 40_000, (1, DOCUMENTS * size))
    positions = torch.arange(size).repeat(DOCUMENTS)[None]
    start = time.perf_counter()
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits.sum().backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def measure(settings: Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens and way; the ways take turns."""
    models, rows = {way: model_of(way) for way in WAYS}, []
    for tokens in settings.tokens:
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(settings.repeats + 1):
            for way, model in models.items():
                taken[way].append(step(model, tokens))
        rows += [
            {
                "tokens": tokens,
                "way": way,
                "seconds": statistics.median(mine[1:]),
                "time / PEFT": median_ratio(mine[1:], taken["PEFT"][1:]),
                "noise": spread(mine[1:]),
            }
            for way, mine in taken.items()
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[640, 2048], help="of a batch")
    settings = parsed(parser, arguments)
    carry_out("lora_products", settings, measure, ["tokens", "way", "seconds", "time / PEFT", "noise"])


if __name__ == "__main__":
    main()

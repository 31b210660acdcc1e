"""A model run on a few tokens, and left as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags, numbers, random states, buffers and FSDP2's shards are restored.

    Some modules keep a number that a forward finds, such as a router the capacity of its experts. FSDP2 leaves a root
    gathered after a forward, and an optimizer that is made then never sees its shards.
    """
    plain = (int, float, str, type(None))
    numbers = [
        (module, {key: value for key, value in vars(module).items() if isinstance(value, plain)})
        for module in model.modules()
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, attributes in numbers:
                vars(module).update(attributes)
            for buffer, before in buffers:
                buffer.copy_(before)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

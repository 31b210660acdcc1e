"""The function inside of what may be around it: compiled graphs, and heads that are sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_temporal.linear_cross_entropy.function import weighted_linear_cross_entropy
from tests.linear_cross_entropy.head_problems import make_problem

pytestmark = pytest.mark.usefixtures("sixteen_bits_are_native")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 31, bias=False)

    def forward(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return weighted_linear_cross_entropy(hidden, self.head.weight, targets, weights) / 2 + hidden.sum() * 0.1


def test_a_compiled_module_runs_the_loss_outside_its_graphs() -> None:
    torch.manual_seed(0)
    plain = Tiny()
    module = copy.deepcopy(plain)
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled: Callable[..., Tensor] = torch.compile(module, backend=backend)
    problem = make_problem()
    x = torch.randn(len(problem.targets), 5)
    expected, loss = plain(x, problem.targets, problem.weights), compiled(x, problem.targets, problem.weights)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    for got, right in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, right.grad)
    assert any("tanh" in target for target in traced)
    assert not any("nonzero" in target or "index_select" in target for target in traced)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_a_sharded_head_is_gathered(placement: Shard | Replicate) -> None:
    problem = make_problem(bias=True)
    hidden, *parameters = problem.leaves
    mesh = init_device_mesh("cpu", (1,))
    weight, bias = (distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in parameters)
    loss = replace(problem, tensors=[hidden, weight], bias=bias).loss()
    assert loss == problem.loss()
    expected = torch.autograd.grad(problem.loss(), parameters)
    try:
        found = torch.autograd.grad(loss, [weight, bias])
    except RuntimeError as error:
        if "ReduceOp.AVG with Gloo" in str(error):
            pytest.skip("this torch has no averages on CPUs")
        raise
    for got, right in zip(found, expected, strict=True):
        assert isinstance(got, DTensor)
        assert torch.equal(got.full_tensor(), right)


def check_a_sharded_head() -> None:
    """A share of the positions on each rank, the head a FSDP2 module of its own whose forward is never called.

    `tests/distributed` runs it on the ranks of a process group.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    plain = Tiny()
    problem = make_problem(N=12)
    x = torch.randn(12, 5)
    (plain(x, problem.targets, problem.weights) / ranks).backward()
    sharded = copy.deepcopy(plain)
    sharded.zero_grad()
    fully_shard(sharded.head)
    fully_shard(sharded)
    share = slice(12 // ranks * rank, 12 // ranks * (rank + 1))
    sharded(x[share], problem.targets[share], problem.weights[share]).backward()
    assert isinstance(sharded.head.weight, DTensor)
    for got, right in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(got.grad, DTensor)
        torch.testing.assert_close(got.grad.full_tensor(), right.grad)

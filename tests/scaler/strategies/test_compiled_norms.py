"""Compiled residual blocks whose batch norm spans ranks: one graph, collectives inside, and the eager numbers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch._dynamo.utils import counters

from scaler.collectives import World
from scaler.nn.batch_norm import convert_batch_norm
from scaler.strategies.blocks import arrange_blocks_
from tests.distributed.helper import run_distributed

C = 4
CHECKPOINTING = {1: ("selective",), 2: ("none", "blocks")}  # by ranks


def trained(world: World, checkpointing: str, *, compiled: bool) -> dict[str, Any]:
    """Two steps of two blocks, this rank's part of four images: outputs, gradients and statistics."""
    torch.manual_seed(0)
    blocks = [BasicBlock(C, C) for _ in range(2)]
    net = nn.Sequential(*(convert_batch_norm(block, world) for block in blocks)).train()
    arrange_blocks_(list(net), checkpointing=checkpointing, compiled=compiled, backend="aot_eager")
    x = torch.randn(4, C, 6, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 5).view(4, 1, 1, 1)
    inputs = x.chunk(world.size)[world.rank].clone().requires_grad_()
    outputs: list[Tensor] = []
    for _ in range(2):
        outputs.append(net(inputs))
        (outputs[-1] ** 2).mean().backward()
    assert inputs.grad is not None
    return {
        "outputs": [y.detach() for y in outputs],
        "gradients": [inputs.grad, *(p.grad for p in net.parameters())],
        "buffers": dict(net.named_buffers()),
    }


def job(world: World) -> list[tuple[dict[str, Any], dict[str, Any], int, int]]:
    """Eager and compiled results of each way to checkpoint, graphs and breaks."""
    found = []
    for checkpointing in CHECKPOINTING[world.size]:
        eager = trained(world, "none", compiled=False)
        torch._dynamo.reset()
        counters.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*compiled")
            compiled = trained(world, checkpointing, compiled=True)
        found.append((eager, compiled, counters["stats"]["unique_graphs"], len(counters["graph_break"])))
    return found


@pytest.mark.parametrize("world_size", CHECKPOINTING)
def test_blocks_with_global_norms_are_one_graph_with_the_eager_results(world_size: int) -> None:
    for rank in run_distributed(job, world_size):
        for eager, compiled, graphs, breaks in rank:
            assert (graphs, breaks) == (1, 0), "two blocks of a kind"
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
            assert compiled["buffers"]["0.bn1.num_batches_tracked"] == 2

"""FSDP2: parameters, gradients and optimiser state sharded by `fully_shard`, block by block.

With `strategy.shard_group` smaller than all ranks the sharding is hybrid: each group of so many neighbouring ranks (one
node: "node") holds one copy of the model, and gradients are averaged over the groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scaler.collectives import World
from scaler.methods.base import Method
from scaler.strategies.base import DTYPES, MakeOptimizer, Piece, StepResult, Strategy
from scaler.strategies.processes import ranks_per_node


class FSDP2(Strategy):
    """Each block is a unit that is gathered for its forward and backward; the rest belongs to the root unit."""

    name = "fsdp2"
    sharded = True
    cut = ("parameters", "gradients", "optimizer", "teacher")
    reads = frozenset({"reshard_after_forward", "cpu_offload", "shard_group", "reduce_precision"})

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See `Strategy.wrap`.

        Weights are gathered, and gradients computed, in the run's precision; gradients are reduced in
        `reduce_precision`.

        Raises:
            ValueError: a shard group that does not divide the ranks.
        """
        width = shard_width(self.settings.shard_group, world_size=self.world.size)
        if width == self.world.size:
            mesh = init_device_mesh(self.device.type, (width,))
        else:
            shape = (self.world.size // width, width)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
            self.shard_world = World(rank=self.world.rank % width, size=width, group=mesh.get_group("shard"))
        mixed = self.dtype is not torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if mixed else None,
            reduce_dtype=DTYPES[self.settings.reduce_precision] if mixed else None,
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy() if self.settings.cpu_offload else OffloadPolicy()
        reshard = self.settings.reshard_after_forward
        for block in method.blocks():
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
        fully_shard(method, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
        return method, make_optimizer()

    def verify(self) -> None:
        """See `Strategy.verify`."""
        for name, parameter in self.method.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert all(isinstance(block, FSDPModule) for block in self.method.blocks())

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Strategy.accumulate`."""
        root = self._root
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        yield

    @torch.no_grad()
    def step(self) -> StepResult:
        """See `Strategy.step`; the root unit's gathered weights are freed first, since they are about to be stale."""
        self._reshard()
        return super().step()

    def pieces(self) -> dict[str, Piece]:
        """See `Strategy.pieces`."""
        self._reshard()
        return super().pieces()

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.module, FSDPModule)
        return self.module

    def _reshard(self) -> None:
        for module in self.method.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard_width(group: str | int, *, world_size: int) -> int:
    """Ranks that hold one copy of the model between them.

    Raises:
        ValueError: it does not divide the number of ranks.
    """
    width = int({"all": world_size, "node": ranks_per_node(world_size)}.get(str(group), group))
    if world_size % width:
        valid = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"strategy.shard_group is {width} ranks, which does not divide {world_size} ranks; valid: "
            f"{', '.join(map(str, valid))}, or node or all"
        )
    return width

"""FSDP2: parameters, gradients and optimiser state sharded by `fully_shard`, block by block.

With `strategy.shard_group` smaller than all ranks the sharding is hybrid: each group of so many neighbouring ranks (one
node: "node") holds one copy of the model, and gradients are averaged over the groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

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
    reads = frozenset({"reshard_after_forward", "prefetch", "cpu_offload", "shard_group", "reduce_precision"})

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See `Strategy.wrap`.

        Weights are gathered, and gradients computed, in the run's precision; gradients are reduced in
        `reduce_precision`. The last trained block is not freed after its forward: its backward comes next.

        Raises:
            ValueError: a shard group that does not divide the ranks, or a reshard_after_forward that does not divide
                the shard group.
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
        reshard = check_reshard(self.settings.reshard_after_forward, width=width)
        for row in rows_of_blocks(method):
            for block in row:
                trained = any(p.requires_grad for p in block.parameters())
                # What has no backward need not be near for one.
                after = False if trained and block is row[-1] else reshard if trained else bool(reshard)
                fully_shard(block, mesh=mesh, reshard_after_forward=after, mp_policy=policy, offload_policy=offload)
            prefetch_(row, self.settings.prefetch)
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


def rows_of_blocks(method: Method) -> list[list[nn.Module]]:
    """The method's blocks as they run one after the other: those of the student, of the teacher, … each a row."""
    names = {module: name.partition(".")[0] for name, module in method.named_modules()}
    rows: dict[str, list[nn.Module]] = {}
    for block in method.blocks():
        rows.setdefault(names[block], []).append(block)
    return list(rows.values())


def prefetch_(row: Sequence[nn.Module], count: int) -> None:
    """Gather so many blocks ahead of the one that runs: the next in a forward, those before it in a backward.

    With 0 torch gathers the next block when the host comes to it, and in a backward one block ahead.
    """
    units = list[FSDPModule](block for block in row if isinstance(block, FSDPModule))
    for i, unit in enumerate(units if count else ()):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + count])
        # None at all would mean torch's own, which after the first block gathers what ran before it: the teacher.
        unit.set_modules_to_backward_prefetch(units[max(0, i - count) : i][::-1] or [unit])


def check_reshard(after: bool | int, *, width: int) -> bool | int:
    """What a block's weights become after its forward: cut over all ranks again, not at all, or over so many.

    Raises:
        ValueError: a number of ranks that does not divide the shard group.
    """
    if not isinstance(after, bool) and (after >= width or width % after):
        valid = [n for n in range(2, width) if width % n == 0]
        raise ValueError(
            f"strategy.reshard_after_forward is {after} ranks, which is no part of a shard group of {width}; "
            f"valid: {', '.join(map(str, ['true', 'false', *valid]))}"
        )
    return after


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

"""FSDP2: parameters, gradients and optimiser state sharded over all ranks by `fully_shard`, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scaler.methods.base import Method
from scaler.strategies.base import Piece, StepResult, Strategy


class FSDP2(Strategy):
    """Each block is a unit that is gathered for its forward and backward; the rest belongs to the root unit."""

    name = "fsdp2"
    sharded = True

    def wrap(self, method: Method) -> nn.Module:
        """See `Strategy.wrap`.

        Weights are gathered, and gradients computed, in the run's precision; gradients are reduced in fp32.
        """
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        mixed = self.dtype is not torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if mixed else None,
            reduce_dtype=torch.float32 if mixed else None,
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy() if self.settings.cpu_offload else OffloadPolicy()
        reshard = self.settings.reshard_after_forward
        for block in method.blocks():
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
        fully_shard(method, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
        return method

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

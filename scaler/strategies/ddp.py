"""DistributedDataParallel, or the bare module on one process."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaler.methods.base import Method
from scaler.strategies.base import MakeOptimizer, Strategy

# Nothing is broadcast before a forward: buffers are global already (batch norm, centres). torch 2.15 has renamed this.
_NEW_NAME = "forward_sync_buffers"
_HAS_NEW_NAME = _NEW_NAME in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {_NEW_NAME if _HAS_NEW_NAME else "broadcast_buffers": False}


class DDP(Strategy):
    """Every rank holds everything; gradients are averaged in buckets during the last micro-batch's backward."""

    name = "ddp"
    sharded = False
    reads = frozenset({"static_graph"})

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See `Strategy.wrap`.

        Gradients are views of the buckets, so that there is one copy of them. Deterministic runs search for unused
        parameters, which keeps the first bucket layout: rebuilt buckets would change the order of summation between a
        run and its resumption.

        Raises:
            ValueError: a static graph in a deterministic run, whose buckets it would rebuild.
        """
        if self.settings.static_graph and self.deterministic:
            raise ValueError(
                "strategy.static_graph rebuilds DDP's buckets after the first step, so a resumed run would sum in "
                "another order; leave out static_graph, or run.deterministic"
            )
        if self.world.size == 1:
            return method, make_optimizer()
        module = DistributedDataParallel(
            method,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **_NO_BUFFER_SYNC,
            gradient_as_bucket_view=True,
            static_graph=self.settings.static_graph,
            find_unused_parameters=self.deterministic,
        )
        return module, make_optimizer()

    def verify(self) -> None:
        """See `Strategy.verify`."""
        wrapped = isinstance(self.module, DistributedDataParallel)
        assert (self.world.size > 1) == wrapped
        assert not wrapped or self.module.static_graph == self.settings.static_graph

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Strategy.accumulate`.

        Raises:
            ValueError: accumulation with a static graph, which torch cannot do.
        """
        if self.settings.static_graph and not last:
            raise ValueError(
                "strategy.static_graph does not go with accumulation (more than one micro-batch per rank): torch's DDP "
                "fails on it; leave it out, or raise strategy.micro_batch_size"
            )
        if last or not isinstance(self.module, DistributedDataParallel):
            yield
        else:
            with self.module.no_sync():
                yield

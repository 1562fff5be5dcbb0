"""DistributedDataParallel, or the bare module on one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaler.methods.base import Method
from scaler.strategies.base import Strategy


class DDP(Strategy):
    """Every rank holds everything; gradients are averaged in buckets during the last micro-batch's backward."""

    name = "ddp"
    sharded = False

    def wrap(self, method: Method) -> nn.Module:
        """See `Strategy.wrap`.

        Deterministic runs search for unused parameters, which keeps the first bucket layout: rebuilt buckets would
        change the order of summation between a run and its resumption.
        """
        if self.world.size == 1:
            return method
        return DistributedDataParallel(
            method,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.deterministic,
        )

    def verify(self) -> None:
        """See `Strategy.verify`."""
        assert (self.world.size > 1) == isinstance(self.module, DistributedDataParallel)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Strategy.accumulate`."""
        if last or not isinstance(self.module, DistributedDataParallel):
            yield
        else:
            with self.module.no_sync():
                yield

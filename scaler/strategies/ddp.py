"""DistributedDataParallel, or the bare module on one process."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaler.methods.base import Method
from scaler.strategies.base import Strategy

# Nothing is broadcast before a forward: buffers are global already (batch norm, centres). torch 2.15 has renamed this.
_NEW_NAME = "forward_sync_buffers"
_HAS_NEW_NAME = _NEW_NAME in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {_NEW_NAME if _HAS_NEW_NAME else "broadcast_buffers": False}


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
            **_NO_BUFFER_SYNC,
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

"""The collectives that training code uses, as methods of a `World`; every one is the identity on a single process.

A `World` is passed to whoever needs it (losses, batch norm, methods), so that nothing reads global process-group
state. Gradients follow one convention: the wrappers *average* gradients over ranks, so a loss that every rank computes
over gathered tensors as the mean of its *local* part gets exact gradients when the gather's backward sums over ranks
and takes its own slice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class World:
    """Rank, size and collectives of one process group (`group=None`: the default group, or a single process)."""

    def __init__(self, *, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @classmethod
    def current(cls) -> World:
        """The world of the initialised default process group, or a single process."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate equal-shaped `x` of all ranks along dim 0 in rank order; differentiable."""
        return x if self.size == 1 else _AllGather.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks as a new tensor; differentiable (backward: sum)."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks in place, without gradient; returns `x`."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Maximum over ranks in place, without gradient; returns `x`."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.length = world, x.shape[0]
        out = x.new_empty((world.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=world.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = ctx.world.sum_(grads[0].contiguous().clone())
        return grad[ctx.world.rank * ctx.length : (ctx.world.rank + 1) * ctx.length], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum_(grads[0].contiguous().clone()), None


class Agreement:
    """Small flags that all ranks act on together: the maximum over ranks, known one exchange later.

    Every rank calls `exchange` once per step. The reduction runs while the step computes and is read at the next call,
    so that a step never waits for it; the price is that a flag takes effect one step late, on all ranks at once.
    """

    def __init__(self, world: World, *, count: int) -> None:
        self._world = world
        self._values = torch.zeros(count, dtype=torch.int64)
        self._work: dist.Work | None = None

    def exchange(self, flags: list[int]) -> list[int]:
        """Hand in this rank's flags; returns the maxima of those handed in at the call before."""
        before = self.last()
        self._values = torch.tensor(flags, dtype=torch.int64)
        if self._world.size > 1:
            self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._world.group, async_op=True)
        return before

    def last(self) -> list[int]:
        """The maxima of the flags handed in last; waits for them."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._values.numpy().tolist()

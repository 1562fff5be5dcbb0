"""What a strategy does for the loop: place the method on the processes, run it, step it, and hand out its state.

Everything that is the same wherever the tensors lie is here: autocast, loss scaling, clipping per module on local
shards, EMA on local shards, and the pieces that checkpoints are made of. A strategy adds how it wraps the method and
when gradients are exchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from scaler.collectives import World
from scaler.methods.base import Method
from scaler.strategies.loss_scale import LossScale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Piece:
    """What this process holds of one named tensor: a contiguous flat range.

    Attributes:
        data: 1-D view of the local values; writing to it changes the state.
        start: index of `data[0]` in the flattened whole tensor.
        shape: shape of the whole tensor.
        copy, copies: how many ranks hold this same range, and which of them this one is: they share its writing.
    """

    data: Tensor
    start: int
    shape: tuple[int, ...]
    copy: int
    copies: int


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimiser step: the gradient norm before clipping, and whether the step was taken."""

    grad_norm: float
    taken: bool


class Strategy:
    """Base of `ddp` and `fsdp2`; `settings` is the recipe's strategy section with every "auto" resolved."""

    name: ClassVar[str]
    sharded: ClassVar[bool]

    def __init__(
        self, settings: Any, *, world: World, device: torch.device, clip_norm: float | None, deterministic: bool
    ) -> None:
        self.settings, self.world, self.device = settings, world, device
        self.clip_norm, self.deterministic = clip_norm, deterministic
        self.dtype = DTYPES[settings.precision]
        self.loss_scale = LossScale(enabled=settings.precision == "fp16")
        self.method: Method
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer

    # ------------------------------------------------------------------ set up

    def prepare(self, method: Method, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        """Wrap the method, then make its optimiser: the parameters to optimise are those after wrapping."""
        self.method = method.to(self.device)
        blocks = method.blocks()
        for block in blocks[: self._num_checkpointed(len(blocks))]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if self.settings.compile:
            for block in blocks:
                block.compile()
        self.module = self.wrap(method)
        self.optimizer = make_optimizer()
        self._create_optimizer_state()
        self.verify()

    def _num_checkpointed(self, num_blocks: int) -> int:
        wanted = self.settings.activation_checkpointing
        return {"none": 0, "blocks": num_blocks}.get(wanted, wanted)

    def wrap(self, method: Method) -> nn.Module:
        """The module whose call runs the method under this strategy."""
        raise NotImplementedError

    def verify(self) -> None:
        """Assert that what was asked for is what is engaged."""
        raise NotImplementedError

    def _create_optimizer_state(self) -> None:
        """Give every parameter its optimiser state now, so that a checkpoint can be loaded into it.

        A step with zero gradients at zero learning rate and decay changes no weight; the state is then zeroed.
        """
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    local_shard(value).zero_()

    # ------------------------------------------------------------------ one step

    def __call__(self, stage: str, *args: Any) -> Any:
        """Run a stage of the method through the wrapped module; `observe` and `combine` without gradient."""
        with torch.set_grad_enabled(stage == "learn"), self.autocast():
            return self.module(stage, *args)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed-precision region of this strategy's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged in the last one only."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Back-propagate (scaled under fp16)."""
        self.loss_scale.scale(loss).backward()

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip per module, take the optimiser step unless a gradient is not finite, and clear the gradients."""
        groups: dict[str, list[Tensor]] = defaultdict(list)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    groups[group["clip"]].append(local_shard(parameter.grad))
        squares = torch.stack([_sum_of_squares(gradients, self.device) for gradients in groups.values()])
        if self.sharded:
            self.world.sum_(squares)
        norms = squares.sqrt() / self.loss_scale.value
        total = float(norms.square().sum().sqrt())
        taken = total < float("inf")
        if taken:
            limit = float("inf") if self.clip_norm is None else self.clip_norm
            factors = (limit / (norms + 1e-6)).clamp(max=1.0) / self.loss_scale.value
            if self.clip_norm is not None or self.loss_scale.enabled:
                for gradients, factor in zip(groups.values(), factors, strict=True):
                    torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        self.loss_scale.update(finite=taken)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=total, taken=taken)

    @torch.no_grad()
    def lerp_(self, targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
        """targets += weight · (sources − targets), on local shards (the EMA of a teacher)."""
        torch._foreach_lerp_([local_shard(t) for t in targets], [local_shard(s) for s in sources], weight)

    # ------------------------------------------------------------------ state and report

    @torch.no_grad()
    def pieces(self) -> dict[str, Piece]:
        """Everything a checkpoint holds, by name: `method/…` and `optimizer/PARAMETER/KEY`.

        Names and shapes are those of the unwrapped method whatever the strategy.
        """
        found = {f"method/{name}": self._piece(tensor) for name, tensor in self.method.state_dict().items()}
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in self.optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        found[f"optimizer/{name}/{key}"] = self._piece(value)
        return found

    def _piece(self, tensor: Tensor) -> Piece:
        """The flat range of `tensor` on this rank.

        FSDP2 cuts dimension 0 into chunks of ⌈d0/w⌉ rows, the last ones shorter or empty, so a local part is contiguous
        in the flattened whole.
        """
        if not isinstance(tensor, DTensor):
            assert tensor.is_contiguous(), "state must be contiguous"
            return Piece(tensor.detach().view(-1), 0, tuple(tensor.shape), copy=self.world.rank, copies=self.world.size)
        mesh, local = tensor.device_mesh, tensor.to_local()
        assert mesh.ndim == 1 and tensor.placements[0].is_shard(0), (mesh, tensor.placements)
        rows = tensor.shape[0]
        first = min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))
        return Piece(local.view(-1), first * (tensor.numel() // rows), tuple(tensor.shape), copy=0, copies=1)

    def report(self) -> dict[str, Any]:
        """What was engaged: strategy, ranks, precision, optimiser, and how much of the model is on this rank."""
        parameters = list(self.method.parameters())
        return {
            "strategy": self.name,
            "ranks": self.world.size,
            "device": str(self.device),
            "precision": self.settings.precision,
            "optimizer": type(self.optimizer).__name__,
            "activation_checkpointing": self.settings.activation_checkpointing,
            "compile": self.settings.compile,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters_on_rank_0": sum(local_shard(p).numel() for p in parameters),
            "sharded_tensors": sum(isinstance(p, DTensor) for p in parameters),
        }


def local_shard(tensor: Tensor) -> Tensor:
    """The values on this rank: the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    filled = [t for t in tensors if t.numel()]  # a rank may hold an empty shard
    if not filled:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(filled)).to(device).square().sum()

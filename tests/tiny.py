"""A small method with an EMA teacher and sizes that divide by nothing, for tests of strategies and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Method
from scaler.optimizers import build_optimizer, set_hyper
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import Strategy, strategy_class


class Block(nn.Module):
    """Residual MLP of width 41."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(41, 67), nn.Linear(67, 41), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks and a head of width 7."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(41, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tiny(Method):
    """Regress the EMA teacher plus a fixed signal; `images` [m, 41] come as they are."""

    def __init__(self) -> None:
        super().__init__(None, image_size=1, world=World())
        self.student, self.teacher = Net(), Net()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(5))

    def observes(self, num_micro_batches: int) -> bool:
        return False

    def learn(self, batch: Batch, target: Any, hyper: Hyper) -> dict[str, Any]:
        x = batch["images"]
        with torch.no_grad():
            goal = self.teacher(x) + x[:, :7].sin()
        loss = (self.student(x) - goal).square().mean()
        return {"loss": loss, "metrics": {"loss": loss.detach()}}

    def parameter_groups(self, optim: Any) -> list[dict[str, Any]]:
        decayed = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        return [
            {
                "params": [p for n, p in decayed if ("weight" in n) == matrix],
                "names": [n for n, p in decayed if ("weight" in n) == matrix],
                "lr_scale": 1.0,
                "weight_decay_scale": float(matrix),
                "clip": "student",
                "adapt": matrix,
            }
            for matrix in (True, False)
        ]

    def blocks(self) -> list[nn.Module]:
        return [*self.student.blocks, *self.teacher.blocks]

    @torch.no_grad()
    def after_step(self, hyper: Hyper, lerp_: Callable[[Sequence[Tensor], Sequence[Tensor], float], None]) -> None:
        lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.1)


def tiny_strategy(
    name: str, world: World, *, optimizer: str = "adamw", deterministic: bool = True, **settings: Any
) -> Strategy:
    """The tiny method under a strategy, built from seed 0, with clipping that is active."""
    torch.manual_seed(0)
    values = StrategySettings(name=name, **{"precision": "fp32", **settings})
    strategy = strategy_class(name)(
        values, world=world, device=torch.device("cpu"), clip_norm=0.3, deterministic=deterministic
    )
    optim, method = Optim(name=optimizer, lr=1e-2, weight_decay=0.05), Tiny()
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    return strategy


def tiny_steps(strategy: Strategy, world: World, *, first: int, count: int, micro_batches: int = 1) -> list[float]:
    """Train on a global batch of 12 random rows per step; returns the losses."""
    losses = []
    for step in range(first, first + count):
        rows = torch.randn(12, 41, generator=torch.Generator().manual_seed(step))
        local = rows.chunk(world.size)[world.rank].chunk(micro_batches)
        set_hyper(strategy.optimizer, {"lr": 1e-2, "weight_decay": 0.05})
        total = torch.zeros(())
        for i, x in enumerate(local):
            with strategy.accumulate(last=i == len(local) - 1):
                out = strategy("learn", {"images": x}, None, {})
                strategy.backward(out["loss"] / len(local))
            total += out["metrics"]["loss"] / len(local)
        result = strategy.step()
        assert result.taken and result.grad_norm > 0.3, "clipping must be active in these tests"
        strategy.method.after_step({}, strategy.lerp_)
        losses.append(float(world.sum_(total) / world.size))
    return losses

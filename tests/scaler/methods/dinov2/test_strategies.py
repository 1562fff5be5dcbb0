"""DINOv2 under the strategies: sharded and accumulated runs follow the curve of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaler.collectives import World
from scaler.optimizers import build_optimizer, set_hyper
from scaler.recipe import Optim, StrategySettings
from scaler.strategies import strategy_class
from tests.distributed.helper import run_distributed
from tests.long import only_long
from tests.scaler.methods.dinov2.tiny import micro_batches, tiny_method

STEPS = 6


def losses(world: World, name: str, changes: dict[str, Any], settings: dict[str, Any]) -> list[float]:
    """Train a few steps on a global batch of 16 in micro-batches of 4; returns the losses and the last grad norm."""
    method = tiny_method(world, **changes)
    optim = Optim(lr=2e-3, weight_decay=0.1, layer_decay=0.9, patch_embed_lr_scale=0.2, clip_norm=0.5)
    values = StrategySettings(name=name, **{"precision": "fp32", **settings})
    strategy = strategy_class(name)(
        values, world=world, device=torch.device("cpu"), clip_norm=optim.clip_norm, deterministic=True
    )
    strategy.prepare(method, lambda: build_optimizer(optim, method.parameter_groups(optim)))
    per_rank = 16 // world.size
    start, rows = per_rank * world.rank, []
    for step in range(STEPS):
        hyper = {"momentum": 0.9, "teacher_temperature": 0.06, "gram_weight": 2.0, "gram_follows": float(step == 2)}
        lr = 2e-3
        set_hyper(strategy.optimizer, {"lr": lr, "last_layer_lr": lr if step else 0.0, "weight_decay": 0.1})
        batches = micro_batches(method, list(range(start, start + per_rank + 1, 4)), step=step)
        targets = strategy("combine", [strategy("observe", batch, hyper) for batch in batches], hyper)
        total = torch.zeros(())
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            with strategy.accumulate(last=i == len(batches) - 1):
                out = strategy("learn", batch, target, hyper)
                strategy.backward(out["loss"] / len(batches))
            total += out["metrics"]["loss"] / len(batches)
        result = strategy.step()
        assert result.taken and result.grad_norm > 0.5, "clipping must be active here"
        method.after_step(hyper, strategy.lerp_)
        rows += [float(world.sum_(total) / world.size), float(result.grad_norm)]
    return rows


@pytest.mark.parametrize("centering", [pytest.param("sinkhorn", marks=only_long), "softmax"])
def test_ddp_and_fsdp2_follow_one_process(centering: str) -> None:
    changes = {"centering": centering, "separate_heads": centering == "softmax"}
    expected = losses(World(), "ddp", changes, {})
    assert expected[0] != expected[-2]
    for name, settings in (("ddp", {}), ("fsdp2", {"activation_checkpointing": "blocks"})):
        for actual in run_distributed(losses, 2, name, changes, settings):
            assert actual == pytest.approx(expected, rel=1e-4)


GRAM = {"gram_weight": 2.0, "gram_start": "1 steps", "gram_size_factor": 2}


def many(world: World, runs: list[tuple[str, dict[str, Any]]]) -> list[list[float]]:
    return [losses(world, name, GRAM, settings) for name, settings in runs]


def test_gram_anchoring_follows_one_process_also_where_its_teacher_is_cut() -> None:
    expected = losses(World(), "ddp", GRAM, {})
    assert expected != losses(World(), "ddp", {}, {})
    runs = [(name, {"activation_checkpointing": "blocks"}) for name in ("fsdp2", "zero3")]
    for curves in run_distributed(many, 2, runs):
        for actual in curves:
            assert actual == pytest.approx(expected, rel=1e-4)


def test_fsdp2_in_bf16_stays_near() -> None:
    expected = losses(World(), "ddp", {}, {})
    for actual in run_distributed(losses, 2, "fsdp2", {}, {"precision": "bf16"}):
        assert actual[::2] == pytest.approx(expected[::2], rel=0.03)

"""Planned against measured memory and traffic of real gloo processes, by strategy.

    python -m tests.scaler.plan.matrix                      # ViT-S and ViT-B, SimCLR and DINOv2: about 20 minutes, 6 GB

What is measured are live tensors: see `scaler.plan.measure`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from scaler.collectives import World
from scaler.layout import Layout
from scaler.plan.measure import measure_step
from scaler.plan.planner import Prediction, predict
from scaler.recipe import Recipe, load_recipe
from scaler.strategies import STRATEGIES
from scaler.strategies.launcher import resolve_strategy
from tests.distributed.helper import run_distributed

FP32 = "strategy.precision=fp32"
SIMCLR = ("data.image_size=96", FP32)  # small images, since a CPU computes them
DINOV2 = ("data.image_size=96", "method.local_size=48", "method.group_size=2", "method.num_prototypes=8192", FP32)
Case = tuple[str, Layout, Sequence[str]]  # recipe, layout, overrides
CASES: dict[str, Case] = {
    "SimCLR, ViT-S/16": ("simclr/vits16_in1k", Layout(2, 8, 1), SIMCLR),
    "SimCLR, ViT-B/16": ("simclr/vitb16_in1k", Layout(2, 4, 1), SIMCLR),
    "DINOv2, ViT-S/16": ("dinov2/vits16_in1k", Layout(2, 4, 1), DINOV2),
    "DINOv2, ViT-B/16": ("dinov2/vitb16_in1k", Layout(2, 2, 1), DINOV2),
}


def recipe_of(name: str, layout: Layout, overrides: Sequence[str], strategy: str) -> Recipe:
    size = layout.ranks * layout.micro_batch_size * layout.num_micro_batches
    words = [
        f"data.global_batch_size={size}",
        f"strategy.micro_batch_size={layout.micro_batch_size}",
        "data.shards=none",
    ]
    return load_recipe(name, overrides=[*words, f"strategy.name={strategy}", *overrides])


def measure(world: World, name: str, layout: Layout, overrides: Sequence[str], strategies: Sequence[str]) -> list[Any]:
    found = []
    for strategy in strategies:
        recipe = recipe_of(name, layout, overrides, strategy)
        settings = resolve_strategy(recipe.strategy)
        found.append(measure_step(recipe, settings, layout, world=world, device=torch.device("cpu")))
    return found


def plan_all(
    name: str, layout: Layout, overrides: Sequence[str], strategies: Sequence[str] = tuple(STRATEGIES)
) -> list[Prediction]:
    """What is planned for each strategy."""
    recipes = [recipe_of(name, layout, overrides, strategy) for strategy in strategies]
    return [predict(recipe, resolve_strategy(recipe.strategy), layout, device="cpu") for recipe in recipes]


def compare(
    name: str, layout: Layout, overrides: Sequence[str], strategies: Sequence[str] = tuple(STRATEGIES)
) -> dict[str, tuple[Prediction, dict[str, Any]]]:
    """Strategy → what was planned and what was measured."""
    measured = run_distributed(measure, layout.ranks, name, layout, overrides, strategies, timeout=1500)[0]
    planned = plan_all(name, layout, overrides, strategies)
    return dict(zip(strategies, zip(planned, measured, strict=True), strict=True))


def main() -> None:
    chosen = [case for case in CASES if not sys.argv[1:] or any(word in case for word in sys.argv[1:])]
    print("| | strategy | planned MB | measured | | fullest | planned to send MB | sent |")
    print("|---|---|---|---|---|---|---|---|")
    for case in chosen:
        name, layout, overrides = CASES[case]
        found: dict[str, Any] = {}
        for together in (("ddp", "fsdp2"), ("zero1",), ("zero2",), ("zero3",)):  # DeepSpeed never lets go
            found |= compare(name, layout, overrides, together)
        for strategy, (planned, real) in found.items():
            more = 100 * (planned.memory.peak / real["peak"] - 1)
            print(
                f"| {case} | {strategy} | {planned.memory.peak / 1e6:.0f} | {real['peak'] / 1e6:.0f} | {more:+.1f} % "
                f"| {planned.memory.when} | {planned.sent / 1e6:.0f} | {real['sent'] / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

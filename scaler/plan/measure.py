"""What a recipe's step really takes in this process and its peers, to be held against the plan.

    torchrun --standalone --nproc-per-node 2 -m scaler.cli plan dinov2/demo --measure strategy.name=fsdp2

A few real steps on random images under the recipe's strategy. On a GPU its allocator says what was allocated at most;
on a CPU every live tensor is counted (`scaler.plan.live`), the strategy's and those of torch's and DeepSpeed's own.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.layout import Layout, batch_layout
from scaler.optimizers import build_optimizer
from scaler.plan.live import LiveBytes
from scaler.plan.planner import possible_layouts, predict
from scaler.plan.trace import meta_method
from scaler.recipe import Recipe
from scaler.strategies import strategy_class
from scaler.strategies.launcher import resolve_strategy
from scaler.strategies.processes import join, meet
from scaler.train import build_method

_STEPS = 3  # the first makes buffers, and DeepSpeed's prefetching learns from the second


def measure_step(
    recipe: Recipe, settings: Any, layout: Layout, *, world: World, device: torch.device
) -> dict[str, Any]:
    """Train a few steps on random images.

    Args:
        recipe: what is trained; nothing is written.
        settings: its strategy section without "auto".
        layout: of the batch over the ranks.
        world: that is joined already.
        device: of this process.

    Returns:
        `peak`, the most bytes at any moment of a step on the fullest rank; `phases`, the same by phase; `held`, between
        steps; `parts`, what `Strategy.memory` says of the fullest rank; `sent`, bytes a rank sends in a step by ring
        collectives, as these were really called.
    """
    memory, traffic = LiveBytes(), Traffic(world.size)
    cuda = device.type == "cuda"
    with memory:
        method = build_method(recipe, world=world)
        strategy = strategy_class(settings.name)(
            settings, world=world, device=device, clip_norm=recipe.optim.clip_norm, deterministic=False
        )
        strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
        count = layout.num_micro_batches
        batches = [
            noise(method, layout.micro_batch_size, world=world, device=device, number=i, count=count)
            for i in range(count)
        ]
        stepper = Stepper(recipe, method, strategy, world=world, batches=batches)
        for _ in range(_STEPS - 1):
            stepper.step()
        gc.collect()
        phases: Counter[str] = Counter()
        phase = ""

        def at(name: str) -> None:
            nonlocal phase
            if phase:
                most = torch.cuda.max_memory_allocated(device) if cuda else memory.peak
                phases[phase] = max(phases[phase], most)
            phase, memory.peak = name, memory.live
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)

        at("augment")
        with traffic:
            stepper.step(at)
        held = torch.cuda.memory_allocated(device) if cuda else memory.live
    found = world.gather_objects(
        {"peak": max(phases.values()), "phases": dict(phases), "held": held, "parts": strategy.memory()}
    )
    return {**max(found, key=lambda rank: rank["peak"]), "sent": traffic.sent}


def compare_here(recipe: Recipe) -> dict[str, Any]:
    """Measure the recipe's strategy in this process and its peers, in at most two micro-batches, and hold it against
    the plan.

    Returns:
        On every rank: what was run (`strategy`, `ranks`, `micro_batch_size`, …), `planned` and `measured`, each with
        `peak`, `when`, `parts` and `sent`, and `difference`, planned over measured peak less one.

    Raises:
        ValueError: no micro-batch that the method takes.
    """
    meeting = meet()
    world, device = join(meeting, ranks=meeting.size)
    try:
        settings = resolve_strategy(recipe.strategy)
        method = meta_method(recipe, world=World())
        layouts = possible_layouts(method, recipe.data.global_batch_size, ranks=world.size)
        micro = settings.micro_batch_size or layouts[0].micro_batch_size
        count = min(
            2, batch_layout(recipe.data.global_batch_size, micro_batch_size=micro, ranks=world.size).num_micro_batches
        )
        size = micro * count * world.size
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"global_batch_size": size})})
        layout = Layout(world.size, micro, count)
        method.check_layout(num_micro_batches=count, micro_batch_size=micro)
        real = measure_step(recipe, settings, layout, world=world, device=device)
        planned = predict(recipe, settings, layout, device=device.type)
        return {
            "method": recipe.method.name,
            "backbone": recipe.method.backbone,
            "strategy": settings.name,
            "precision": settings.precision,
            "activation_checkpointing": settings.activation_checkpointing,
            "ranks": world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "micro_batch_size": micro,
            "num_micro_batches": count,
            "planned": {
                "peak": planned.memory.peak,
                "when": planned.memory.when,
                "parts": planned.memory.parts,
                "sent": planned.sent,
            },
            "measured": {
                "peak": real["peak"],
                "when": max(real["phases"], key=real["phases"].__getitem__),
                "parts": real["parts"],
                "sent": real["sent"],
            },
            "difference": planned.memory.peak / real["peak"] - 1,
        }
    finally:
        if world.size == 1:  # with others, one that fails must not wait for them
            dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Bytes that a rank sends in the collectives of the default group, each taken as a ring."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "c10d":
            name = str(func).split(".")[1].strip("_")
            if name in _TIMES:
                size = max(_nbytes(args[0]), _nbytes(args[1]) if len(args) > 1 else 0)
                self.sent += round(_TIMES[name] * size * (self.ranks - 1) / self.ranks)
        return func(*args, **(kwargs or {}))


# How often a ring sends (n - 1)/n of the whole: Patarasuk & Yuan 2009.
_TIMES = {"allreduce": 2, "allgather_base": 1, "reduce_scatter_base": 1, "allgather": 1, "reduce_scatter": 1}


def _nbytes(tree: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tree) if isinstance(t, Tensor))

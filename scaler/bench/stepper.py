"""Training steps outside a run, on random images, for measurements of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from scaler.beside import Beside
from scaler.collectives import World
from scaler.methods.base import Batch, Method
from scaler.optimizers import set_hyper
from scaler.recipe import Recipe
from scaler.step import Metrics, training_step
from scaler.strategies import StepResult, Strategy
from scaler.timetable import Timetable

_NUM_SAMPLES = 1_281_167  # images of an epoch, for schedules in epochs


class Stepper:
    """Steps on the same micro-batches, as in `scaler.loop` but for what belongs to a run (data, log, checkpoints)."""

    def __init__(
        self, recipe: Recipe, method: Method, strategy: Strategy, *, world: World, batches: Sequence[Batch]
    ) -> None:
        self.recipe, self.method, self.strategy, self.world, self.batches = recipe, method, strategy, world, batches
        self.number, self.beside = 0, Beside(strategy.device)
        self.timetable = Timetable(recipe, num_samples=_NUM_SAMPLES)

    def step(self, at: Callable[[str], None] = lambda phase: None) -> tuple[list[Metrics], StepResult]:
        """One step; `at` is told what begins: the phases of `training_step`, and at last end."""
        hyper = self.timetable.hyper(self.method, self.number)
        set_hyper(self.strategy.optimizer, hyper)
        outcome = training_step(
            self.method, self.strategy, self.batches, hyper, seed=0, step=self.number, beside=self.beside, at=at
        )
        self.number += 1
        at("end")
        return outcome


def noise(method: Method, size: int, *, world: World, device: torch.device, number: int = 0, count: int = 1) -> Batch:
    """What the loader would give this rank as micro-batch `number` of `count`, of random pixels on the device."""
    generator = torch.Generator().manual_seed(world.rank * count + number)
    first = (world.rank * count + number) * size
    ids = torch.arange(first, first + size)
    views = {
        view.name: _pixels((view.count, size, 3, view.size, view.size), device, generator) for view in method.views
    }
    ready = {}
    if device.type == "cuda" and torch.cuda.is_available():
        ready["ready"] = torch.cuda.Event()
        ready["ready"].record()
    return {
        **ready,
        "views": views,
        "ids": ids,
        "epochs": torch.zeros_like(ids),
        "positions": ids,
        "labels": torch.zeros_like(ids),
        "rejected": [],
        "global_batch_size": size * world.size * count,
        "image_number": 0,
    }


def _pixels(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.uint8, device=device)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)

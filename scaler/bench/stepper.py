"""Steps of the training loop on random images that lie on the device, for measurements of time and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from scaler.collectives import World
from scaler.loop import reseed
from scaler.methods.base import Batch, Method
from scaler.optimizers import set_hyper
from scaler.recipe import Recipe
from scaler.strategies import Strategy
from scaler.timetable import Timetable

_NUM_SAMPLES = 1_281_167  # images of an epoch, for schedules in epochs


class Stepper:
    """Steps on the same micro-batches, as in `scaler.loop` but for what belongs to a run (data, log, checkpoints)."""

    def __init__(
        self, recipe: Recipe, method: Method, strategy: Strategy, *, world: World, batches: Sequence[Batch]
    ) -> None:
        self.recipe, self.method, self.strategy, self.world, self.batches = recipe, method, strategy, world, batches
        self.number = 0
        self.timetable = Timetable(recipe, num_samples=_NUM_SAMPLES)

    def step(self, at: Callable[[str], None] = lambda phase: None) -> None:
        """One step; `at` is told what begins: observe, combine, forward, backward, update, and at last end."""
        hyper = self.timetable.hyper(self.method, self.number)
        set_hyper(self.strategy.optimizer, hyper)
        count = len(self.batches)

        @functools.lru_cache(maxsize=1)  # one augmented micro-batch at a time
        def prepare(i: int) -> Batch:
            return self.method.augment(self.batches[i], seed=0, step=self.number)

        targets: list[Any] = [None] * count
        if self.method.observes(count):
            at("observe")
            observations = []
            for i in range(count):
                reseed(0, self.number, self.world.rank, i)
                observations.append(self.strategy("observe", prepare(i), hyper))
            at("combine")
            targets = self.strategy("combine", observations, hyper)
            del observations
        for i, target in enumerate(targets):
            reseed(0, self.number, self.world.rank, i)
            with self.strategy.accumulate(last=i == count - 1):
                at("forward")
                loss = self.strategy("learn", prepare(i), target, hyper)["loss"] / count
                at("backward")
                self.strategy.backward(loss)
                del loss
        del targets, target
        at("update")
        if self.strategy.step().taken:
            self.method.after_step(hyper, self.strategy.lerp_)
        self.number += 1
        at("end")


def noise(method: Method, size: int, *, world: World, device: torch.device, number: int = 0, count: int = 1) -> Batch:
    """What the loader would give this rank as micro-batch `number` of `count`, of random pixels on the device."""
    generator = torch.Generator().manual_seed(world.rank * count + number)
    first = (world.rank * count + number) * size
    ids = torch.arange(first, first + size)
    views = {
        view.name: _pixels((view.count, size, 3, view.size, view.size), device, generator) for view in method.views
    }
    return {
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

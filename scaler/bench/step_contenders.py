"""Who takes turns in `scaler bench step`: our step, also in one pass per crop size, and the reference's."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from scaler.bench.parts import NAMES, Parts
from scaler.bench.references.registry import REFERENCES
from scaler.bench.stepper import Stepper
from scaler.collectives import World
from scaler.layout import Layout
from scaler.methods.base import Batch
from scaler.optimizers import build_optimizer
from scaler.plan.live import LiveBytes
from scaler.recipe import Recipe
from scaler.strategies import strategy_class
from scaler.train import build_method

OURS, SEPARATE, REFERENCE = "scaler", "separate passes", "reference"
_QUIET = 3  # steps in a row in which nothing is compiled end the warm-up
_LONGEST_WARM_UP = 15  # steps

At = Callable[[str], None]
Source = Iterator[list[Batch]]


class Contender:
    """Whose steps are timed.

    Attributes:
        images: of this rank in a step.
        parts: the marks of its steps.
        measured: seconds by part of every timed step.
        peak: most bytes at any moment of a step.
        made_of: what it is, where that is not plain; None: our own.
        warm_up_seconds: of its first steps, beyond what as many later ones take: compiling, tuning, buffers.
    """

    def __init__(
        self,
        run: Callable[[At], Any],
        parts: Parts,
        *,
        images: int,
        device: torch.device,
        made_of: str | None = None,
    ) -> None:
        self._run, self.parts, self.images, self._device, self.made_of = run, parts, images, device, made_of
        self.measured: list[dict[str, float]] = []
        self.peak: int | None = None
        self.warm_up_seconds, self._count = 0.0, 1

    def step(self) -> None:
        """One step; a GPU may still be at it."""
        self._run(self.parts.at)

    def warm_up(self, world: World, *, seconds: float, steps: int | None) -> None:
        """Steps until nothing more is compiled; how long they take says how many make a block of so many seconds."""
        times: list[float] = []
        quiet = 0
        while world.broadcast_object(quiet < _QUIET and len(times) < _LONGEST_WARM_UP):
            graphs, began = counters["stats"]["unique_graphs"], time.perf_counter()
            self.step()
            self._wait()
            times.append(time.perf_counter() - began)
            quiet = quiet + 1 if counters["stats"]["unique_graphs"] == graphs else 0
        steady = min(times[-_QUIET:])
        self.warm_up_seconds = sum(times) - len(times) * steady
        self._count = world.broadcast_object(steps or max(1, round(seconds / steady)))

    def block(self) -> int:
        """Some steps, back to back, until the device has done them; how many images they were."""
        for _ in range(self._count):
            self.step()
        self._wait()
        self.measured += self.parts.read()
        return self._count * self.images

    def times(self) -> dict[str, Any]:
        """Of the measured steps: the median, the middle half, and the median of every part, in seconds."""
        totals = [sum(step.values()) for step in self.measured]
        quartiles = statistics.quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
        return {
            "images": self.images,
            "steps": len(totals),
            "step_seconds": statistics.median(totals),
            "middle_half_seconds": [quartiles[0], quartiles[2]],
            "parts": {
                name: statistics.median(step[name] for step in self.measured)
                for name in NAMES.values()
                if name in self.measured[0]
            },
        }

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def make_ready(
    make: Callable[[Source], Contender],
    source: Source,
    *,
    world: World,
    device: torch.device,
    seconds: float,
    steps: int | None,
    compiled: bool,
) -> Contender:
    """Made, warmed up, and its memory known: with the least that it holds between steps, no other contender's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        contender = make(source)
        contender.warm_up(world, seconds=seconds, steps=steps)
        torch.cuda.reset_peak_memory_stats(device)
        contender.step()
        torch.cuda.synchronize(device)
        contender.peak = torch.cuda.max_memory_allocated(device) - before
    elif compiled:  # whose code makes its tensors unseen
        contender = make(source)
        contender.warm_up(world, seconds=seconds, steps=steps)
    else:
        with LiveBytes() as memory:
            contender = make(source)
            contender.step()
            gc.collect()
            memory.peak = memory.live
            contender.step()
        contender.peak = memory.peak
        contender.warm_up(world, seconds=seconds, steps=steps)
    contender.parts.read()
    return contender


def make_ours(
    recipe: Recipe,
    settings: Any,
    layout: Layout,
    source: Source,
    *,
    world: World,
    device: torch.device,
    separate: bool = False,
) -> Contender:
    """Our step, of a run with this (resolved) strategy; `separate`: DINOv2's with one pass per crop size."""
    method = build_method(recipe, world=world)
    if separate:
        separate_(method)
    parts = Parts(device)
    parts.follow(method)
    strategy = strategy_class(settings.name)(
        settings, world=world, device=device, clip_norm=recipe.optim.clip_norm, deterministic=False
    )
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
    stepper = Stepper(recipe, method, strategy, world=world, batches=[])

    def run(at: At) -> None:
        at("data")
        stepper.batches = next(source)
        stepper.step(at)

    return Contender(run, parts, images=layout.micro_batch_size * layout.num_micro_batches, device=device)


def make_reference(
    recipe: Recipe, settings: Any, layout: Layout, source: Source, *, world: World, device: torch.device
) -> Contender:
    """The step of the method's reference; `why_no_reference` says for which recipes there is one."""
    kind = REFERENCES[recipe.method.name]
    reference = kind(recipe, precision=settings.precision, device=device, compiled=bool(settings.compile))
    run = partial(reference.step, source)
    return Contender(run, Parts(device), images=layout.micro_batch_size, device=device, made_of=reference.made_of)


def is_compiled(name: str, recipe: Recipe, settings: Any) -> bool:
    """Whether any code of this contender is compiled, which makes its tensors unseen."""
    return bool(settings.compile) and (name != REFERENCE or REFERENCES[recipe.method.name].compiles)


def separate_(method: Any) -> None:
    """Let the student of ours run one pass for each crop size, as the reference does, instead of one for all."""
    backbone = method.student.backbone
    packed = backbone.forward

    def forward(crops: Any, *, masks: Any = None, keep: Any = None) -> Any:
        masks = masks or [None] * len(crops)
        keep = keep or [None] * len(crops)
        return [
            packed([x], masks=[mask], keep=None if rows is None else [rows])[0]
            for x, mask, rows in zip(crops, masks, keep, strict=True)
        ]

    backbone.forward = forward

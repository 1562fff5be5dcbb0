"""What saving in the background costs the training: windows with and without a checkpoint, interleaved in one run.

    scaler bench checkpoint simclr/vits16_in1k --batch 8 data.image_size=112
    torchrun --standalone --nproc-per-node 2 -m scaler.cli bench checkpoint simclr/vits16_in1k

The method, the strategy and the optimiser are those of the recipe, the images are noise that lies in memory, so that no
loader blurs the picture. A window is a number of steps that take as long as the time between two checkpoints; every
other window begins with one. Both kinds see the same drift of the machine: they go round as with, without, without,
with.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scaler.bench.stepper import Stepper, noise
from scaler.checkpoint import Checkpointer
from scaler.collectives import World
from scaler.methods.base import Batch, Method
from scaler.optimizers import build_optimizer
from scaler.recipe import Recipe, load_recipe
from scaler.strategies import Strategy, strategy_class
from scaler.strategies.launcher import resolve_strategy
from scaler.strategies.processes import join, meet
from scaler.train import build_method

_WARM_UP = 3  # steps before anything is measured
_TIMED = 3  # steps that say how many fit into a window


@dataclass(frozen=True)
class Window:
    """One stretch of steps on rank 0, in seconds.

    Attributes:
        saved: whether it began with a checkpoint.
        wall: from its beginning to the end of its last step and of its checkpoint.
        cpu: of all threads of the process.
        steps: each step's time.
        stall: what the training's own thread spent on the checkpoint.
        written: until the checkpoint was complete.
    """

    saved: bool
    wall: float
    cpu: float
    steps: list[float]
    stall: float
    written: float


def measure(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    batch: int,
    minutes: float,
    pairs: int,
    place: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train with and without checkpoints in this process and its peers; rank 0's answer counts.

    Args:
        recipe: path or short name; its global batch becomes `batch` images for each process.
        overrides: `key=value` words.
        minutes: between two checkpoints.
        pairs: windows of each kind.
        place: path or URL for the checkpoints; None: a temporary folder.

    Returns:
        The layout, the step times of both kinds, and what checkpoints cost as fractions of the time without.

    Raises:
        ValueError: recipe and machine do not fit together, or checkpoints cannot be written there.
    """
    meeting = meet()
    values = [f"data.global_batch_size={batch * meeting.size}", "strategy.micro_batch_size=null", *overrides]
    checked = load_recipe(recipe, overrides=values)
    world, device = join(meeting, ranks=meeting.size)
    try:
        with tempfile.TemporaryDirectory(prefix="scaler-bench-") as folder:
            place = world.broadcast_object(place or folder)
            return _measure(checked, minutes=minutes, pairs=pairs, place=place, world=world, device=device, say=say)
    finally:
        if world.size == 1:  # with others, one that fails must not wait for them
            dist.destroy_process_group()


def _measure(
    recipe: Recipe,
    *,
    minutes: float,
    pairs: int,
    place: str,
    world: World,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    settings = resolve_strategy(recipe.strategy)
    method = build_method(recipe, world=world)
    size = recipe.data.global_batch_size // world.size
    method.check_layout(num_micro_batches=1, micro_batch_size=size)
    strategy = strategy_class(settings.name)(
        settings, world=world, device=device, clip_norm=recipe.optim.clip_norm, deterministic=False
    )
    strategy.prepare(method, lambda: build_optimizer(recipe.optim, method.parameter_groups(recipe.optim)))
    checkpointer = Checkpointer(Path(), world=world, keep_last=1, folder=place)
    batch_of_noise = noise(method, size, world=world, device=device)
    stepper = Trainer(recipe, method, strategy, world=world, device=device, batch=batch_of_noise)
    warm = [stepper.timed() for _ in range(_WARM_UP + _TIMED)][_WARM_UP:]
    count = world.broadcast_object(max(1, round(60 * minutes / statistics.median(warm))))
    stepper.window(1, checkpointer)  # the first save makes the buffers
    windows = []
    for number in range(2 * pairs):
        windows.append(stepper.window(count, checkpointer if number % 4 in (0, 3) else None))
        kind = "with   " if windows[-1].saved else "without"
        say(f"window {number + 1} of {2 * pairs}, {kind} a checkpoint: {count} steps, {windows[-1].wall:.2f} s")
    world.barrier()  # nobody removes the folder before the last one is done with it
    return {
        "method": recipe.method.name,
        "parameters": strategy.report()["parameters"],
        "strategy": settings.name,
        "ranks": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "place": place,
        "minutes": minutes,
        "bytes_of_rank_0": sum(p.data.numel() * p.data.itemsize // p.copies for p in strategy.pieces().values()),
        **summarize(windows),
    }


def summarize(windows: list[Window]) -> dict[str, Any]:
    """Step times and costs of interleaved windows of the same number of steps.

    `cost` is the sum over windows with a checkpoint against the sum without; `cost_by_pair` shows how sure that is.
    """
    saved, plain = ([w for w in windows if w.saved is kind] for kind in (True, False))
    by_pair = [a.wall / b.wall - 1 for a, b in zip(saved, plain, strict=True)]
    return {
        "steps_in_window": len(windows[0].steps),
        "windows": len(windows),
        "step_seconds": {
            "with": statistics.median(t for w in saved for t in w.steps),
            "without": statistics.median(t for w in plain for t in w.steps),
        },
        "cost": sum(w.wall for w in saved) / sum(w.wall for w in plain) - 1,
        "cost_by_pair": by_pair,
        "cpu_cost": sum(w.cpu for w in saved) / sum(w.cpu for w in plain) - 1,
        "stall_seconds": statistics.median(w.stall for w in saved),
        "stall_cost": sum(w.stall for w in saved) / sum(w.wall for w in plain),
        "written_after_seconds": statistics.median(w.written for w in saved),
        "raw": [dataclasses.asdict(w) for w in windows],
    }


def as_rows(result: dict[str, Any]) -> dict[str, str]:
    """What `measure` found, for people."""
    times, pairs = result["step_seconds"], ", ".join(f"{100 * cost:+.2f}" for cost in result["cost_by_pair"])
    return {
        "training": f"{result['method']}, {result['parameters'] / 1e6:.1f} M parameters, {result['strategy']}, "
        f"{result['ranks']} ranks on {result['device']} ({result['threads']} threads each)",
        "checkpoint": f"{result['bytes_of_rank_0'] / 1e6:.0f} MB of rank 0 every {result['minutes']:g} minutes",
        "its place": result["place"],
        "step with, without": f"{times['with']:.4f} s, {times['without']:.4f} s (medians)",
        "complete after": f"{result['written_after_seconds']:.2f} s",
        "training stood still": f"{result['stall_seconds']:.3f} s ({100 * result['stall_cost']:.2f} %)",
        "cost in time": f"{100 * result['cost']:.2f} % (by pairs of stretches: {pairs})",
        "cost in processor time": f"{100 * result['cpu_cost']:.2f} %",
    }


class Trainer(Stepper):
    """Steps on one micro-batch, with their times taken."""

    def __init__(
        self, recipe: Recipe, method: Method, strategy: Strategy, *, world: World, device: torch.device, batch: Batch
    ) -> None:
        super().__init__(recipe, method, strategy, world=world, batches=[batch])
        self.device = device

    def timed(self) -> float:
        """The seconds of one step; it reads the norm of the gradient, so a GPU is done with most of it."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def window(self, count: int, checkpointer: Checkpointer | None) -> Window:
        """`count` steps, after a checkpoint if there is a checkpointer."""
        self.world.barrier()
        self._synchronize()
        start, cpu, steps = time.perf_counter(), time.process_time(), []
        stall = written = 0.0
        if checkpointer is not None:
            checkpointer.save(step=self.number, pieces=self.strategy.pieces(), info={})
            stall = time.perf_counter() - start
        for _ in range(count):
            steps.append(self.timed())
            if checkpointer is not None and not written and not checkpointer.saving:
                written = time.perf_counter() - start
        self._synchronize()
        if checkpointer is not None:
            waited = time.perf_counter()
            checkpointer.wait()
            stall += time.perf_counter() - waited
            written = written or time.perf_counter() - start
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Window(checkpointer is not None, wall, cpu, steps, stall, written)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

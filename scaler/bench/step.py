"""The training step on this machine: its time, by part, its share of what the hardware can do, and its memory.

    scaler bench step dinov2/vits16_in1k --images 8 method.group_size=8
    scaler bench step dinov2/vitl16_in1k --images 64 --compare
    scaler bench step dinov2/vitl16_in1k --vary strategy.compile=false,true --vary strategy.name=ddp,fsdp2

The method, strategy and optimiser are those of the recipe and the step is that of a run (`scaler.step`), on images of
noise that lie on the device, or with `data="real"` on those of the recipe's shards. Steps run back to back, and the
device is waited for at the end of a block of them. Whoever is compared takes turns, in one process.

On one H200, about 8 minutes in all, each its own dated file:

    R=scaler/bench/results/$(date +%F)-h200-
    scaler bench step dinov2/vitl16_in1k --images 64 --compare strategy.compile=true --rounds 3 \
        --vary strategy.activation_checkpointing=none,selective --out ${R}vitl16.json
    scaler bench step dinov2/vits16_in1k --images 128 --vary strategy.compile=false,true --out ${R}vits16.json
    scaler bench step dinov2/vitg14_in1k --images 32 method.group_size=32 strategy.compile=true --rounds 3 \
        strategy.activation_checkpointing=selective --out ${R}vitg14.json
    scaler bench step dinov2/vitl16_in1k --images 64 strategy.compile=true --trace vitl16.json.gz \
        --out ${R}vitl16-trace.json
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Group
from rich.table import Table
from torch._dynamo.utils import counters

from scaler.bench import trace
from scaler.bench.flops import best_matmul_rate, model_flops
from scaler.bench.parts import NAMES, Parts
from scaler.bench.reference import Reference, separate_, why_no_reference
from scaler.bench.rounds import interleave, rate, ratio
from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.data import open_data
from scaler.environment import environment
from scaler.layout import Layout, batch_layout
from scaler.methods.base import Batch, Method
from scaler.optimizers import build_optimizer
from scaler.pauses import short_pauses
from scaler.plan.live import LiveBytes
from scaler.prefetch import on_device
from scaler.recipe import Recipe, load_recipe
from scaler.strategies import strategy_class
from scaler.strategies.base import DTYPES
from scaler.strategies.launcher import resolve_strategy
from scaler.strategies.processes import join, meet
from scaler.train import build_method, make_deterministic

OURS, SEPARATE, REFERENCE = "scaler", "separate passes", "reference"
_QUIET = 3  # steps in a row in which nothing is compiled end the warm-up
_LONGEST_WARM_UP = 15  # steps

At = Callable[[str], None]
Source = Iterator[list[Batch]]
Say = Callable[[str], None]


def measure(
    name: str,
    *,
    overrides: Sequence[str] = (),
    images: int | None = None,
    data: str = "synthetic",
    vary: Sequence[str] = (),
    compare: bool = False,
    trace_to: Path | None = None,
    seconds: float = 2.0,
    rounds: int = 5,
    steps: int | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure a recipe's step in this process and its peers; rank 0's answer counts.

    Args:
        name: of the recipe, its path or short name.
        overrides: `key=value` words.
        images: of a rank's one micro-batch; None: the recipe's micro-batch.
        data: synthetic, or real: from the recipe's shards.
        vary: `key=value,value,…` words; every combination of their values is measured, one after the other.
        compare: with our own step in one pass per crop size, and with `scaler.bench.reference`.
        trace_to: file for the profiler's trace of one step.
        seconds: of each contender in a round.
        rounds: turns of each contender.
        steps: of each contender in a round, instead of `seconds`.

    Returns:
        When and where it was measured, and `rows`: each with its `name`, `variant`, and what `_row` says, or `failed`,
        why there is nothing to say.

    Raises:
        ValueError: wrong use, or nothing at all could be measured.
    """
    if data not in ("synthetic", "real"):
        raise ValueError(f"no data {data!r}; there are synthetic and real")
    variants = list(combinations(vary))
    if trace_to is not None and len(variants) > 1:
        raise ValueError("a trace is of one step: leave out --vary, or --trace")
    meeting = meet()
    world, device = join(meeting, ranks=meeting.size)
    make_deterministic(False)
    bench = _Bench(world, device, images, data, compare, trace_to, seconds, rounds, steps, say)
    rows: list[dict[str, Any]] = []
    recipe: Recipe | None = None
    try:
        for variant in variants:
            words = [*overrides, *(f"{key}={value}" for key, value in variant.items())]
            if len(variants) > 1:
                say(" ".join(words[len(overrides) :]))
            try:
                recipe = bench.recipe(name, words)
                found = bench.rows(recipe)
            except Exception as error:  # out of memory, unsupported: a row that says so
                if len(variants) == 1 and not isinstance(error, torch.OutOfMemoryError):
                    raise
                found = [{"name": OURS, "failed": _reason(error, say=say)}]
            rows += [{"variant": variant, **row} for row in found]
            torch.compiler.reset()  # the next variant has its own
            _free(device)
    finally:
        if world.size == 1:  # with others, one that fails must not wait for them
            dist.destroy_process_group()
    if all("failed" in row for row in rows):
        raise ValueError(f"nothing could be measured: {rows[0]['failed']}")
    assert recipe is not None
    machine = environment()
    del machine["host"]
    return {
        "date": datetime.date.today().isoformat(),
        **machine,
        "command": shlex.join(["scaler", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": world.size,
        "data": data,
        "rounds": rounds,
        "seconds": seconds,
        "recipe": {
            **recipe.model_dump(mode="json", include={"method", "data", "optim"}),
            "strategy": resolve_strategy(recipe.strategy).model_dump(mode="json"),
        },
        "rows": rows,
    }


def combinations(vary: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every combination of the values of `key=value,value,…` words.

    Raises:
        ValueError: a word of another form.
    """
    choices = []
    for word in vary:
        key, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"--vary {word!r} is not KEY=VALUE,VALUE, for example strategy.compile=false,true")
        choices.append([(key, value) for value in values.split(",")])
    for chosen in itertools.product(*choices):
        yield dict(chosen)


# ---------------------------------------------------------------------- one recipe


@dataclass
class _Bench:
    """What stays the same from one variant to the next; see `measure`."""

    world: World
    device: torch.device
    images: int | None
    data: str
    compare: bool
    trace_to: Path | None
    seconds: float
    rounds: int
    steps: int | None
    say: Say
    flops: dict[Any, int] = field(default_factory=dict)

    def recipe(self, name: str, words: Sequence[str]) -> Recipe:
        """One micro-batch a rank, unless the words say otherwise."""
        shards = None if self.data == "real" else "synthetic"
        images = self.images
        if images is None:
            asked = load_recipe(name, overrides=words, shards=shards)
            images = asked.strategy.micro_batch_size or asked.data.global_batch_size // self.world.size
        size = [f"data.global_batch_size={images * self.world.size}", "strategy.micro_batch_size=null"]
        return load_recipe(name, overrides=[*size, *words], shards=shards)

    def rows(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Ours, and with `compare` the others."""
        settings = resolve_strategy(recipe.strategy)
        size = recipe.data.global_batch_size
        layout = batch_layout(size, micro_batch_size=settings.micro_batch_size, ranks=self.world.size)
        dtype = DTYPES[settings.precision]
        with torch.device("meta"):
            method = build_method(recipe, world=self.world)
        method.check_layout(num_micro_batches=layout.num_micro_batches, micro_batch_size=layout.micro_batch_size)
        matmul = partial(best_matmul_rate, self.device, dtype, seconds=min(self.seconds, 0.5))
        rates = [matmul()]
        failed: dict[str, str] = {}
        with self._source(recipe, method, layout) as source:
            ready: dict[str, Contender] = {}
            for name, make in self._makers(recipe, settings, layout, failed).items():
                self.say(f"warming up {name}")
                try:
                    ready[name] = self._ready(make, source, compiled=bool(settings.compile) and name != REFERENCE)
                except Exception as error:
                    if not self.compare:
                        raise
                    failed[name] = _reason(error, say=self.say)
                _free(self.device)
            if not ready:
                return [{"name": name, "failed": reason} for name, reason in failed.items()]
            timers = {name: contender.block for name, contender in ready.items()}
            with short_pauses() as settle:  # as the loop does
                settle()
                blocks = interleave(timers, seconds=0.0, rounds=self.rounds, say=self.say)
            rates.append(matmul())
            profiled = None
            if OURS in ready and (self.trace_to is not None or self.world.size > 1):
                profiled = trace.profile_step(ready[OURS].step, self.device, file=self.trace_to)
        flops = layout.num_micro_batches * self._flops(recipe, layout)
        rows_skip = getattr(recipe.method, "drop_path", 0.0) and recipe.method.backbone.startswith(("vit", "deit"))
        whole = layout.num_micro_batches * self._flops(_without_drop_path(recipe), layout) if rows_skip else flops
        rows = []
        for name, contender in ready.items():
            per_second = rate(blocks[name], "wall") / contender.images
            row = {
                "name": name,
                **_times(contender),
                "images_per_second": rate(blocks[name], "wall") * self.world.size,
                "model_flops": flops,
                "mfu": flops * per_second / max(rates),
                "mfu_all_rows": whole * per_second / max(rates),
                "matmul_flops": max(rates),
                "peak_bytes": contender.peak,
                "warm_up_seconds": contender.warm_up_seconds,
            }
            if name != OURS and OURS in ready:
                row["ours_times_as_fast"] = ratio(blocks[OURS], blocks[name], "wall")
                if self.device.type == "cpu":  # which other programs on the machine do not change
                    row["in_processor_time"] = ratio(blocks[OURS], blocks[name], "cpu")
                mine = ready[OURS].peak
                row["our_share_of_memory"] = mine / contender.peak if mine and contender.peak else None
            rows.append(row)
        if profiled is not None:
            rows[0] |= {"profile": profiled, "trace": None if self.trace_to is None else self.trace_to.name}
        return rows + [{"name": name, "failed": reason} for name, reason in failed.items()]

    def _flops(self, recipe: Recipe, layout: Layout) -> int:
        key = (recipe.method, recipe.data.image_size, layout.micro_batch_size)
        if key not in self.flops:
            self.flops[key] = model_flops(recipe, micro_batch_size=layout.micro_batch_size)
        return self.flops[key]

    def _makers(
        self, recipe: Recipe, settings: Any, layout: Layout, failed: dict[str, str]
    ) -> dict[str, Callable[[Source], Contender]]:
        """How to make each contender; why one cannot be made goes into `failed`."""
        ours = partial(_make_ours, recipe, settings, layout, self)
        makers: dict[str, Callable[[Source], Contender]] = {OURS: ours}
        if not self.compare:
            return makers
        reason = why_no_reference(
            recipe,
            ranks=self.world.size,
            num_micro_batches=layout.num_micro_batches,
            precision=settings.precision,
        )
        if recipe.method.name == "dinov2":
            makers[SEPARATE] = partial(ours, separate=True)
        if reason is None:
            makers[REFERENCE] = partial(_make_reference, recipe, settings, layout, self)
        else:
            failed[REFERENCE] = reason
        return makers

    def _ready(self, make: Callable[[Source], Contender], source: Source, *, compiled: bool) -> Contender:
        """Made, warmed up, and its memory known: with the least that it holds between steps, no other contender's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            contender = make(source)
            contender.warm_up(self.world, seconds=self.seconds, steps=self.steps)
            torch.cuda.reset_peak_memory_stats(self.device)
            contender.step()
            torch.cuda.synchronize(self.device)
            contender.peak = torch.cuda.max_memory_allocated(self.device) - before
        elif compiled:  # whose code makes its tensors unseen
            contender = make(source)
            contender.warm_up(self.world, seconds=self.seconds, steps=self.steps)
        else:
            with LiveBytes() as memory:
                contender = make(source)
                contender.step()
                gc.collect()
                memory.peak = memory.live
                contender.step()
            contender.peak = memory.peak
            contender.warm_up(self.world, seconds=self.seconds, steps=self.steps)
        contender.parts.read()
        return contender

    @contextlib.contextmanager
    def _source(self, recipe: Recipe, method: Method, layout: Layout) -> Iterator[Source]:
        """This rank's micro-batches, step after step, without end."""
        count = layout.num_micro_batches
        if self.data == "synthetic":
            options: dict[str, Any] = {"world": self.world, "device": self.device, "count": count}
            yield itertools.repeat([noise(method, layout.micro_batch_size, number=i, **options) for i in range(count)])
            return
        size = recipe.data.global_batch_size
        loader = open_data(recipe).loader(
            method.views, batch_size=size, layout=layout, world=self.world, start=0, stop=_LONG * size
        )
        batches = on_device(iter(loader), self.device)
        with contextlib.closing(batches):  # type: ignore[type-var]
            yield iter(lambda: list(itertools.islice(batches, count)), [])


_LONG = 1 << 30  # steps


def _without_drop_path(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"drop_path": 0.0})})


def _times(contender: Contender) -> dict[str, Any]:
    """Of the measured steps: the median, the middle half, and the median of every part, in seconds."""
    totals = [sum(step.values()) for step in contender.measured]
    quartiles = statistics.quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
    return {
        "images": contender.images,
        "steps": len(totals),
        "step_seconds": statistics.median(totals),
        "middle_half_seconds": [quartiles[0], quartiles[2]],
        "parts": {
            name: statistics.median(step[name] for step in contender.measured)
            for name in NAMES.values()
            if name in contender.measured[0]
        },
    }


# ---------------------------------------------------------------------- contenders


class Contender:
    """Whose steps are timed.

    Attributes:
        images: of this rank in a step.
        parts: the marks of its steps.
        measured: seconds by part of every timed step.
        peak: most bytes at any moment of a step.
        warm_up_seconds: of its first steps, beyond what as many later ones take: compiling, tuning, buffers.
    """

    def __init__(self, run: Callable[[At], Any], parts: Parts, *, images: int, device: torch.device) -> None:
        self._run, self.parts, self.images, self._device = run, parts, images, device
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

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _make_ours(
    recipe: Recipe, settings: Any, layout: Layout, bench: _Bench, source: Source, *, separate: bool = False
) -> Contender:
    world, device = bench.world, bench.device
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


def _make_reference(recipe: Recipe, settings: Any, layout: Layout, bench: _Bench, source: Source) -> Contender:
    reference = Reference(recipe, precision=settings.precision, device=bench.device)
    run = partial(reference.step, source)
    return Contender(run, Parts(bench.device), images=layout.micro_batch_size, device=bench.device)


def _free(device: torch.device) -> None:
    """Let go of what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: Exception, *, say: Say) -> str:
    """In a line; where it may be a fault of ours, `say` is told more. What it held on to is let go of."""
    if not isinstance(error, ValueError | torch.OutOfMemoryError):
        say("".join(traceback.format_exception(error)))
    error.__traceback__ = None
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


# ---------------------------------------------------------------------- for people


def as_table(result: Mapping[str, Any]) -> Group:
    """A row a contender and variant, then a column each with its time by part."""
    s = result["recipe"]["method"]
    where = result["device"] if result["device"] != "cpu" else f"cpu, {result['threads']} threads"
    ranks = f"{result['ranks']} rank{'s' if result['ranks'] > 1 else ''}"
    settings, varied = result["recipe"]["strategy"], result["rows"][0]["variant"]
    same = " ".join(settings[key] for key in ("name", "precision") if f"strategy.{key}" not in varied)
    title = f"{s['name']}, {s['backbone']}, {same}, {ranks} on {where}, {result['data']} data"
    steps, parts = Table(title=title, title_justify="left"), Table(title="ms by part (medians)", title_justify="left")
    steps.add_column("\n".join([f"{key}," for key in varied] + ["step"]), overflow="fold")
    parts.add_column("part")
    for column in ("ms", "images/s", "MFU", "all rows", "peak GB", "warm-up s"):
        steps.add_column(column, justify="right")
    measured = []
    for number, row in enumerate(result["rows"], start=1):
        name = f"{number}: " + ", ".join([*row["variant"].values(), row["name"]])
        if "failed" in row:
            steps.add_row(name, "failed", style="dim")
            continue
        low, high = row["middle_half_seconds"]
        steps.add_row(
            name,
            f"{1000 * row['step_seconds']:,.1f} ±{500 * (high - low):,.1f}",
            f"{row['images_per_second']:,.1f}",
            f"{100 * row['mfu']:.1f} %",
            f"{100 * row['mfu_all_rows']:.1f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.2f}",
            f"{row['warm_up_seconds']:.1f}",
        )
        parts.add_column(str(number), justify="right")
        measured.append(row["parts"])
    for part in NAMES.values():
        parts.add_row(part, *(f"{1000 * row[part]:,.1f}" if part in row else "" for row in measured))
    return Group(steps, parts)


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What it means in words."""
    rates = [row["matmul_flops"] for row in result["rows"] if "matmul_flops" in row]
    precision = result["recipe"]["strategy"]["precision"]
    yield (
        f"MFU: of {max(rates) / 1e12:,.2f} TFLOP/s, this machine's own rate in large matrix products ({precision}); "
        "all rows: as if those that drop path skips were computed too, which is how published figures count"
    )
    for number, row in enumerate(result["rows"], start=1):
        if "failed" in row:
            yield f"{number}, {row['name']}: {row['failed']}"
        if "ours_times_as_fast" in row:
            share = row["our_share_of_memory"]
            memory = "" if share is None else f", {100 * share:.0f} % of its memory"
            cpu = f" ({row['in_processor_time']:.2f} in processor time)" if "in_processor_time" in row else ""
            yield f"ours, against {number}, {row['name']}: {row['ours_times_as_fast']:.2f} times as fast{cpu}{memory}"
        if "profile" in row:
            yield from trace.as_lines(row["profile"], file=row["trace"])

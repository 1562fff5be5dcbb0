"""The training step on this machine: its time, by part, its share of what the hardware can do, and its memory.

    scaler bench step dinov2/vits16_in1k --images 8 method.group_size=8
    scaler bench step dinov2/vitl16_in1k --images 64 --compare
    scaler bench step dinov2/vitl16_in1k --vary strategy.compile=false,true --vary strategy.name=ddp,fsdp2

The method, strategy and optimiser are those of the recipe and the step is that of a run (`scaler.step`), on images of
noise that lie on the device, or with `data="real"` on those of the recipe's shards. Steps run back to back, and the
device is waited for at the end of a block of them. Whoever is compared takes turns, in one process.
`--compare` is with the step as others write it (`scaler.bench.references`): supervised training with timm's script.

On one H200, about 15 minutes in all (an estimate), each its own dated file:

    R=scaler/bench/results/$(date +%F)-h200-
    scaler bench step dinov2/vitl16_in1k --images 64 --compare strategy.compile=true --rounds 3 \
        --vary strategy.activation_checkpointing=none,selective --out ${R}vitl16.json
    scaler bench step dinov2/vits16_in1k --images 128 --vary strategy.compile=false,true --out ${R}vits16.json
    scaler bench step dinov2/vitg14_in1k --images 32 method.group_size=32 strategy.compile=true --rounds 3 \
        strategy.activation_checkpointing=selective --out ${R}vitg14.json
    scaler bench step dinov2/vitl16_in1k --images 64 strategy.compile=true --trace vitl16.json.gz \
        --out ${R}vitl16-trace.json
    scaler bench step simclr/vitb16_in1k --images 256 --compare --rounds 3 --out ${R}simclr-vitb16.json
    scaler bench step simclr/vitb16_in1k --images 128 --compare --rounds 3 method.backbone=vit_large_patch16_224 \
        --out ${R}simclr-vitl16.json
    scaler bench step simclr/resnet50_in1k --images 256 --rounds 3 strategy.activation_checkpointing=none \
        --out ${R}simclr-resnet50.json
    scaler bench step supervised/resnet50_in1k --images 256 --compare --rounds 5 \
        --vary strategy.compile=false,true --out ${R}resnet50.json

The recipes of these last four have bf16 and strategy.compile=true, with which the reference compiles too. What they are
to show: ViT-B/16 an MFU of 45 % or more, ViT-L/16 550 images/s or more (an image is two views), ResNet-50 at least as
fast as timm's script.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scaler.bench import trace
from scaler.bench.flops import best_matmul_rate, model_flops
from scaler.bench.references.registry import why_no_reference
from scaler.bench.rounds import interleave, rate, ratio
from scaler.bench.step_contenders import (
    OURS,
    REFERENCE,
    SEPARATE,
    Contender,
    Source,
    is_compiled,
    make_ours,
    make_ready,
    make_reference,
)
from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.data import open_data
from scaler.environment import environment
from scaler.layout import Layout, batch_layout
from scaler.methods.base import Method
from scaler.pauses import short_pauses
from scaler.prefetch import on_device
from scaler.recipe import Recipe, load_recipe
from scaler.strategies.base import DTYPES
from scaler.strategies.launcher import resolve_strategy
from scaler.strategies.processes import join, meet
from scaler.train import build_method, make_deterministic

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
        compare: with the method's reference (`scaler.bench.references`), DINOv2 also with our own step in one pass per
            crop size.
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
                    ready[name] = make_ready(
                        make,
                        source,
                        world=self.world,
                        device=self.device,
                        seconds=self.seconds,
                        steps=self.steps,
                        compiled=is_compiled(name, recipe, settings),
                    )
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
                **contender.times(),
                "images_per_second": rate(blocks[name], "wall") * self.world.size,
                "model_flops": flops,
                "mfu": flops * per_second / max(rates),
                "mfu_all_rows": whole * per_second / max(rates),
                "matmul_flops": max(rates),
                "peak_bytes": contender.peak,
                "warm_up_seconds": contender.warm_up_seconds,
                "made_of": contender.made_of,
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
        where: dict[str, Any] = {"world": self.world, "device": self.device}
        ours = partial(make_ours, recipe, settings, layout, **where)
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
            makers[REFERENCE] = partial(make_reference, recipe, settings, layout, **where)
        else:
            failed[REFERENCE] = reason
        return makers

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

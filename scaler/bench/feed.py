"""Whether the way from shards to the device keeps up with the training step, with so many cores, beside stock loading.

    scaler bench feed dinov2/vits16_in1k --images 128
    scaler bench feed simclr/resnet50_in1k data.shards=shards/train --cores 8 --workers 2,4,7

Measured, in images/s, by turns, each block of loading with workers of its own that are past their start:

    step        what the step wants: ours, on images of noise that lie on the device
    augment     the device half of the augmentation alone
    loading     the recipe's loader, from shards in the page cache until its pixels have come to the device, by number
                of workers; with pictures decoded in the workers, and where there is nvJPEG on the GPU
    training    the step fed by that loader: with the fewest workers that suffice, and with the most; and what part of
                the time it waited
    stock       torchvision's ImageFolder, PIL and DataLoader with all of the augmentation in the same numbers of
                workers; the same step, which then augments nothing (DINOv2's masks and mixup's partners stay the same)

`data.shards=…` gives the pictures; without it a set of JPEGs of 500 x 375 pixels and 110 KB is made. On one H200, a few
minutes each (data wait of at most 3 % with 4 cores for ViT-L/16 and with 16 for ViT-S/16 is what is to be shown):

    R=scaler/bench/results/$(date +%F)-h200-feed-
    scaler bench feed dinov2/vitl16_in1k --images 64 --cores 4 --workers 1,2,3 --out ${R}vitl16.json
    scaler bench feed dinov2/vits16_in1k --images 128 --cores 16 strategy.compile=true --out ${R}vits16.json
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from scaler.bench.contenders import STOCK, Augmentation, stock_chain
from scaler.bench.fed import Fed, Row, advise, curve, row_rate
from scaler.bench.loader import prepare
from scaler.bench.loop import prepared
from scaler.bench.peers import Files
from scaler.bench.rounds import Block, cpu_seconds
from scaler.bench.stepper import Stepper, noise
from scaler.collectives import World
from scaler.data import open_data
from scaler.environment import environment
from scaler.layout import batch_layout
from scaler.methods.base import Batch
from scaler.pauses import short_pauses
from scaler.prefetch import on_device
from scaler.recipe import Recipe, load_recipe
from scaler.supply import worker_room, workers_needed
from scaler.throughput import Throughput
from scaler.train import make_deterministic
from shards.device_decode import why_no_gpu_decoding

DECODES = ("cpu", "gpu")
_PREFETCH = 2  # batches that a worker keeps ready (`shards.loader`)
_QUIET, _LONGEST_WARM_UP = 3, 15  # steps in a row in which nothing is compiled end the warm-up; at most so many
_LONG = 1 << 40  # images: the loader never ends

Say = Callable[[str], None]
Batches = contextlib.AbstractContextManager[Iterator[Batch]]


def measure(
    name: str,
    *,
    overrides: Sequence[str] = (),
    images: int | None = None,
    made: int = 2000,
    cores: int | None = None,
    workers: Sequence[int] = (),
    seconds: float = 2.0,
    rounds: int = 3,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure how a recipe's step is fed on this process's device; see the module's text.

    Args:
        name: of the recipe, its path or short name.
        overrides: `key=value` words; `data.shards=…` gives the pictures.
        images: of a step, one micro-batch; None: the recipe's micro-batch.
        made: pictures that are made, or at most taken of the shards.
        cores: that this process and its workers may use; None: all that they may now.
        workers: numbers of them; none: powers of two up to the cores, and one less than these.
        seconds: of a block, at least.
        rounds: turns of each.

    Returns:
        When and where it was measured, `rows` (part, name, decode, workers, images_per_second, images_per_cpu_second,
        blocks, `data_wait` of those that train, `device_seconds` an image of decoding on the device, or `missing`: why
        there is nothing to say), and `advice`, what `advise` makes of them.

    Raises:
        ValueError: wrong use, or a recipe that cannot be trained here.
    """
    with _on(cores) as num_cores, tempfile.TemporaryDirectory(prefix="scaler-bench-") as scratch:
        numbers = sorted({*workers} or {1 << k for k in range(num_cores.bit_length())} | {worker_room(num_cores)})
        if min(numbers) < 1:
            raise ValueError(f"--workers {','.join(map(str, workers))}: a number of loader processes is at least 1")
        source = next((word.partition("=")[2] for word in overrides if word.startswith("data.shards=")), None)
        recipe = _recipe(name, overrides, images=images)
        make_deterministic(False)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        files = prepare(source, Path(scratch), images=made, say=say)
        bench = _Bench(recipe, files, device, seconds=seconds, rounds=rounds, say=say)
        rows = bench.rows(numbers, num_cores=num_cores)
        sizes, threads = [path.stat().st_size for path in files.paths()[0]], torch.get_num_threads()
    machine = environment()
    del machine["host"]
    return {
        "date": datetime.date.today().isoformat(),
        **machine,
        "command": shlex.join(["scaler", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": num_cores,
        "threads": threads,
        "source": source or "made",
        "pictures": len(sizes),
        "mean_bytes": statistics.mean(sizes),
        "images": bench.size,
        "seconds": seconds,
        "rounds": rounds,
        "recipe": {"name": name, **recipe.model_dump(mode="json", include={"method", "data", "strategy"})},
        "rows": [asdict(row) for row in rows],
        "advice": advise(rows, num_cores=num_cores),
    }


@contextlib.contextmanager
def _on(cores: int | None) -> Iterator[int]:
    """Let this process, all of its threads and the children it will have use only so many cores; how many these are.

    Raises:
        ValueError: there are not as many.
    """
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if cores is None:
        yield len(before)
        return
    if not 1 <= cores <= len(before):
        raise ValueError(f"--cores {cores}: this process may use 1 to {len(before)}")
    _confine(sorted(before)[:cores])
    torch.set_num_threads(min(threads, cores))
    try:
        yield cores
    finally:
        torch.set_num_threads(threads)
        _confine(before)


def _confine(cores: Sequence[int] | set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # threads inherit from the one that starts them, and some run already
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def _recipe(name: str, overrides: Sequence[str], *, images: int | None) -> Recipe:
    """A step of one micro-batch in one process."""
    if images is None:
        asked = load_recipe(name, overrides=overrides, shards="none")
        images = asked.strategy.micro_batch_size or asked.data.global_batch_size
    size = [f"data.global_batch_size={images}", "strategy.micro_batch_size=null", "data.reader=indexed"]
    return load_recipe(name, overrides=[*size, *overrides], shards="none")


# ---------------------------------------------------------------------- measuring


class _Bench:
    """One recipe on one device."""

    def __init__(
        self, recipe: Recipe, files: Files, device: torch.device, *, seconds: float, rounds: int, say: Say
    ) -> None:
        self.recipe, self.files, self.device = recipe, files, device
        self.seconds, self.rounds, self.say = seconds, rounds, say
        self.size = recipe.data.global_batch_size
        self.no_gpu_decoding = why_no_gpu_decoding(device)
        say("warming up the step")
        self.method, strategy = prepared(recipe, device)
        self.stepper = Stepper(recipe, self.method, strategy, world=World(), batches=[])
        self.noise = noise(self.method, self.size, world=World(), device=device)
        quiet = 0
        for _ in range(_LONGEST_WARM_UP):
            graphs = counters["stats"]["unique_graphs"]
            self._step(self.noise)
            quiet = quiet + 1 if counters["stats"]["unique_graphs"] == graphs else 0
            if quiet == _QUIET:
                break
        self._wait()

    def rows(self, numbers: Sequence[int], *, num_cores: int) -> list[Row]:
        """All of them; see the module's text."""
        step, augment = Row("step", "scaler"), Row("augment", "scaler")
        turns: dict[str, tuple[Row, Callable[[], Fed]]] = {
            "step": (step, partial(self._repeat, lambda: self._step(self.noise))),
            "augment": (augment, partial(self._repeat, lambda: self.method.augment(self.noise, seed=0, step=0))),
        }
        absent = []
        for decode in DECODES:
            if why := self._why_not(decode):
                absent.append(Row("loading", "scaler", decode, missing=why))
                continue
            for number in numbers:
                row = Row("loading", "scaler", decode, number)
                turns[f"{decode} {number}"] = (row, partial(self._load, partial(self._ours, decode, number), number))
        self._take_turns(turns)
        loading = [row for row, _ in turns.values()]

        turns = {"step": turns["step"]}
        wanted = row_rate(step)
        fewest: list[int] = []
        for decode in (decode for decode in DECODES if not self._why_not(decode)):
            needed = workers_needed(wanted, curve(loading, decode))
            pair = sorted({min(needed, max(numbers)), max(numbers)})
            fewest += pair
            for number in pair:
                row = Row("training", "scaler", decode, number)
                turns[f"{decode} {number}"] = (row, partial(self._train, partial(self._ours, decode, number), number))
        if why := self._no_stock():
            absent.append(Row("training", STOCK, missing=why))
        else:
            for number in sorted(set(fewest)):
                stock = partial(self._stock, number)
                alone, fed = Row("loading", STOCK, "cpu", number), Row("training", STOCK, "cpu", number)
                turns[f"stock {number}"] = (alone, partial(self._load, stock, number))
                turns[f"stock {number} training"] = (fed, partial(self._train, stock, number, augmented=True))
        self._take_turns(turns)
        return [*loading, *(row for row, _ in turns.values() if row is not step), *absent]

    def _take_turns(self, turns: Mapping[str, tuple[Row, Callable[[], Fed]]]) -> None:
        with short_pauses() as settle:  # as the loop does
            settle()
            for number in range(self.rounds):
                self.say(f"round {number + 1} of {self.rounds}")
                for row, turn in turns.values():
                    row.take(turn())

    def _why_not(self, decode: str) -> str | None:
        """Why pictures cannot be decoded in this way here; None: they can."""
        if decode == "gpu" and self.no_gpu_decoding is not None:
            return f"needs a GPU with nvJPEG: {self.no_gpu_decoding}"
        return None

    def _no_stock(self) -> str | None:
        colors = Augmentation.of(self.recipe.method, image_size=self.recipe.data.image_size).colors
        odd = [view.name for view in self.method.views if view.name not in colors]
        return f"stock transforms have no view {odd[0]!r}" if odd else None

    # ------------------------------------------------------------------ blocks

    def _repeat(self, work: Callable[[], Any]) -> Fed:
        """The same again and again, until the device has done it."""
        work()
        self._wait()
        clock = _Clock()
        while clock.wall() < self.seconds or not clock.count:
            work()
            clock.count += self.size
            if self.device.type == "cpu" or clock.count % (8 * self.size) == 0:
                self._wait()
        self._wait()
        return Fed(clock.block())

    def _load(self, batches: Callable[[], Batches], num_workers: int) -> Fed:
        """Loading alone, until the pixels have come to the device. Workers that began together end together, so what
        comes is counted in rounds of all of them."""
        with batches() as source:
            for _ in range(num_workers):
                next(source)
            self._wait()
            clock, decoding = _Clock(), []
            while clock.wall() < self.seconds or not clock.count:
                for batch in itertools.islice(source, num_workers):
                    clock.count += self.size
                    decoding += [batch["device_decode"]] if "device_decode" in batch else []
                self._wait()
            block = clock.block()
            seconds = sum(first.elapsed_time(last) / 1000 for first, last in decoding)
            return Fed(block, device_seconds=seconds / block.count if decoding else None)

    def _train(self, batches: Callable[[], Batches], num_workers: int, *, augmented: bool = False) -> Fed:
        """The step on what is loaded meanwhile, after what was ready when it began. `augmented`: it comes so."""
        with batches() as source, _augmented(self.method, self.noise) if augmented else contextlib.nullcontext():
            for _ in range(_PREFETCH * num_workers):
                self._step(next(source))
            self._wait()
            clock, meter = _Clock(), Throughput()
            while clock.wall() < self.seconds or not clock.count:
                for _ in range(num_workers):
                    with meter.waiting():
                        batch = next(source)
                    self._step(batch)
                    clock.count += self.size
                    meter.add(self.size)
            self._wait()
            waited = meter.read()["data_wait"]
            return Fed(clock.block(), wait=waited)

    def _step(self, batch: Batch) -> None:
        self.stepper.batches = [batch]
        self.stepper.step()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ who loads

    @contextlib.contextmanager
    def _ours(self, decode: str, num_workers: int) -> Iterator[Iterator[Batch]]:
        words = {"shards": str(self.files.shards), "num_workers": num_workers, "decode": decode}
        recipe = self.recipe.model_copy(update={"data": self.recipe.data.model_copy(update=words)})
        layout = batch_layout(self.size, micro_batch_size=None, ranks=1)
        loader = open_data(recipe).loader(
            self.method.views, batch_size=self.size, layout=layout, world=World(), start=0, stop=_LONG
        )
        with contextlib.closing(on_device(iter(loader), self.device, say=self.say)) as batches:  # type: ignore[type-var]
            yield batches

    @contextlib.contextmanager
    def _stock(self, num_workers: int) -> Iterator[Iterator[Batch]]:
        """ImageFolder and PIL as people write them; pictures are drawn with replacement, so that no epoch ends."""
        augmentation = Augmentation.of(self.recipe.method, image_size=self.recipe.data.image_size)
        transform = stock_chain(augmentation, transforms, geometry=True, colors=True)
        folder = datasets.ImageFolder(str(self.files.folder), transform=transform)
        loader = DataLoader(
            folder,
            batch_size=self.size,
            sampler=RandomSampler(folder, replacement=True, num_samples=_LONG),
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
        )
        iterator = iter(loader)

        def moved() -> Iterator[Batch]:
            for views, _ in iterator:
                yield {"floats": [view.to(self.device, non_blocking=True) for view in views]}

        try:
            yield moved()
        finally:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Clock:
    """Counts, and tells how long since it was made."""

    def __init__(self) -> None:
        self.count, self._cpu, self._began = 0, cpu_seconds(), time.perf_counter()

    def wall(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began

    def block(self) -> Block:
        """What was counted, in the time until now."""
        wall = self.wall()
        return Block(self.count, cpu_seconds() - self._cpu, wall)


@contextlib.contextmanager
def _augmented(method: Any, batch: Batch) -> Iterator[None]:
    """Let a method take `floats`, views that come coloured and normalised, in the order of its views and their copies;
    whatever else its augmentation makes is made once, of `batch`."""
    names = [view.name for view in method.views for _ in range(view.count)]
    template = method.augment(batch, seed=0, step=0)

    def augment(batch: Batch, *, seed: int, step: int) -> Batch:
        floats: list[Tensor] = batch["floats"]
        if "images" in template:
            return {**template, "images": _like(torch.cat(floats), template["images"])}
        kinds = [[x for name, x in zip(names, floats, strict=True) if (name == "local") == local] for local in (0, 1)]
        crops = [torch.cat(kind) for kind in kinds if kind]
        return {**template, "crops": [_like(x, like) for x, like in zip(crops, template["crops"], strict=True)]}

    method.augment = augment
    try:
        yield
    finally:
        del method.augment


def _like(x: Tensor, other: Tensor) -> Tensor:
    """In its dtype, and channels last if it is so."""
    last = not other.is_contiguous() and other.is_contiguous(memory_format=torch.channels_last)
    return x.to(other.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)

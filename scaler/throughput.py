"""How fast a run goes, what it waits for, and what would help.

    meter = Throughput()
    with meter.waiting():
        batch = next(loader)
    meter.add_stages(batch)                                  # of the loader's worker: read, decode, resize
    training_step(…, at=lambda phase: meter.at(phase, device))
    meter.add(256)                                           # a step of so many images
    row = meter.read()
    if waited(row, supply) > 0.2:
        print(diagnose(row, supply))

Stage times are seconds of this process per step; those of the workers are summed over its workers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scaler.supply import delivered, gpu_decoding_pays, worker_room, workers_needed
from shards.resize import cut, cut_with_torch

_WORKER_STAGES = {"read": "reading", "decode": "decoding", "resize": "cropping and resizing"}
_PHASES = frozenset({"augment"})  # of a step, whose time is told; it is over when the next one begins
_BESIDE = ("transfer", "device_decode")  # done by the GPU beside the step, for a later one
_FULL = 0.8  # of a step: what the GPU does beside it and takes longer is what the step waits for
_SMALLER = "store smaller images (scaler convert --resize 256)"
_DEVICE_STAGES = {
    "device_decode": (
        "decoding on the GPU",
        f"{_SMALLER}, or decode in workers where there are cores for them (data.decode=cpu)",
        _FULL,
    ),
    "transfer": (
        "the copy to the GPU",
        "see that its link has the full width (nvidia-smi -q), or cut fewer or smaller views",
        _FULL,
    ),
    "augment": (
        "the colour operations on the GPU",
        "larger micro-batches (strategy.micro_batch_size) do them in fewer, larger kernels",
        0.0,
    ),
}
_HEADROOM = 1.25  # a loader that is faster than the step by so much is not what the step waits for


def _event() -> torch.cuda.Event:
    """One that the current stream has just recorded."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Throughput:
    """Wall-clock meter: images per second, the fraction of time spent waiting for data, and seconds by stage."""

    def __init__(self) -> None:
        self._images, self._steps, self._waited, self._since = 0, 0, 0.0, time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: tuple[str, torch.cuda.Event | float] | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the `with` as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the `with` out of everything."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def at(self, phase: str, device: torch.device) -> None:
        """Told what phase of a step begins, count how long those of `_PHASES` last: on the current stream of a GPU, or
        in the CPU's time.

        Nothing waits for the device: its times are read when they are known.
        """
        if self._open is not None:
            name, mark = self._open
            self._open = None
            if isinstance(mark, float):
                self._seconds[name] += time.perf_counter() - mark
            else:
                self._events.append((name, mark, _event()))
        if phase in _PHASES:
            self._open = (phase, _event() if device.type == "cuda" else time.perf_counter())

    def add_stages(self, batch: Mapping[str, Any]) -> None:
        """Count what a micro-batch brings along: the `seconds` of its worker by stage, and from a GPU two events around
        its copy there (`transfer`) and, where it decodes, around that (`device_decode`)."""
        for name, value in batch["seconds"].items():
            self._seconds[name] += value
        for name in _BESIDE:
            if name in batch:
                self._events.append((name, *batch[name]))

    def add(self, images: int) -> None:
        """Count a step of so many images as done."""
        self._images += images
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Since the last read: `images_per_second`, `data_wait` (0 to 1), and where there were steps `seconds/step` and
        `seconds/STAGE`, both per step; starts the next interval."""
        events, self._events = self._events, []
        for name, first, last in events:
            if last.query():
                self._seconds[name] += first.elapsed_time(last) / 1000
            else:  # the device has not come so far: counted next time
                self._events.append((name, first, last))
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        out = {"images_per_second": self._images / elapsed, "data_wait": min(self._waited / elapsed, 1.0)}
        if self._steps:
            out["seconds/step"] = elapsed / self._steps
            out |= {f"seconds/{name}": value / self._steps for name, value in self._seconds.items()}
        self._images, self._steps, self._waited, self._since = 0, 0, 0.0, now
        self._seconds.clear()
        return out


@dataclass(frozen=True)
class Supply:
    """What feeds a training process.

    Attributes:
        num_workers: loader processes of each training process.
        processes: training processes on this machine.
        cores: of this machine, for all of them; those that this process may use.
        remote: whether the shards come over a network.
        gpu: whether colour operations run on a device of their own.
        decode: where pictures are decoded and cut: cpu (in the workers) or gpu.
    """

    num_workers: int
    processes: int
    remote: bool
    gpu: bool
    decode: str = "cpu"
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


def average(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The columns that `read` gives over several rows of `metrics.jsonl`, as if they had been one."""
    steps = [row.get("seconds/step") or 1.0 for row in rows]
    names = [name for name in rows[-1] if name.startswith("seconds/")]
    columns = {name: [row.get(name) or 0.0 for row in rows] for name in ("images_per_second", "data_wait", *names)}
    return {
        name: float(np.average(values, weights=None if name in names else steps)) for name, values in columns.items()
    }


def waited(row: Mapping[str, Any], supply: Supply) -> float:
    """The fraction of the time that went into getting data instead of training on them.

    On a GPU the colour operations count too, and the copy to it and decoding on it where they fill the step: they run
    beside the training, which waits only for what is longer.
    """
    step = row.get("seconds/step")
    if not supply.gpu or not step:
        return row["data_wait"]
    augment, *beside = ((row.get(f"seconds/{name}") or 0.0) / step for name in ("augment", *_BESIDE))
    return max(row["data_wait"] + augment, *(share for share in beside if share > _FULL), 0.0)


def diagnose(row: Mapping[str, Any], supply: Supply) -> str:
    """Which stage a run that waits for data is limited by, with numbers, and what to change; one line.

    `row` is one of `metrics.jsonl`, or the average of some.
    """
    stages = {name: row.get(f"seconds/{name}") or 0.0 for name in _WORKER_STAGES}
    work, step = sum(stages.values()), row.get("seconds/step") or 0.0
    if work < 1e-9 or not step:
        return f"{_more_workers(supply, wanted=None)}, or put the shards on a faster disk"
    wait = row["data_wait"] * step
    for name, (what, remedy, least) in _DEVICE_STAGES.items() if supply.gpu else ():
        if (seconds := row.get(f"seconds/{name}") or 0.0) > max(wait, least * step):
            return f"the limit is {what}, {1000 * seconds:.0f} ms of a step of {1000 * step:.0f} ms: {remedy}"
    own = max(step - wait, 1e-3 * step, 1e-9)  # the step without its waiting
    images = row["images_per_second"] * step
    now = max(supply.num_workers, 1)
    measured, wanted = {now: images * now / work}, images / own
    if supply.num_workers and measured[now] > _HEADROOM * wanted:
        return (
            f"the workers could deliver {measured[now]:.0f} images/s, the step wants {wanted:.0f}, so the limit is the "
            "way from them to here: leave the training process a core of its own (lower data.num_workers where all "
            f"{supply.cores} cores are busy), and look for other programs on this machine"
        )
    shares = ", ".join(f"{seconds / work:.0%} {_WORKER_STAGES[name]}" for name, seconds in _sorted(stages))
    who = f"a worker spends {shares}: {supply.num_workers} a process deliver"
    if not supply.num_workers:
        who = f"the training process itself does the loading, {shares}: it delivers"
    limit = _sorted(stages)[0][0]
    network = supply.remote and limit == "read"
    remedies = [_more_workers(supply, wanted=workers_needed(wanted, measured), idle=network), _relief(limit, supply)]
    if limit != "read" and supply.gpu and supply.decode == "cpu":
        most = max(now, worker_room(supply.cores, processes=supply.processes))
        reading = images * most / max(stages["read"], 1e-9)  # all that is left to the workers
        pays = gpu_decoding_pays(wanted, by_cpu=delivered(most, measured), by_gpu=reading, device_seconds=0.0)
        remedies.insert(0 if pays else 1, "decode on the GPU (data.decode=gpu)")
    if network:
        remedies.reverse()
    return f"{who} {measured[now]:.0f} images/s, the step wants {wanted:.0f}: {', or '.join(remedies)}"


def _more_workers(supply: Supply, *, wanted: int | None, idle: bool = False) -> str:
    """Advice on `data.num_workers`; `idle`: they wait for a network and do not need a core each."""
    room = worker_room(supply.cores, processes=supply.processes)
    machine = f"{supply.cores} cores here, {supply.processes} process{'es' * (supply.processes > 1)}"
    if wanted is None:
        return f"raise data.num_workers (now {supply.num_workers}; {machine})"
    if idle or wanted <= room:
        return f"raise data.num_workers from {supply.num_workers} to {max(wanted, supply.num_workers + 1)} ({machine})"
    if supply.num_workers < room:
        return f"raise data.num_workers from {supply.num_workers} to {room} ({machine}; {wanted} would be needed)"
    return f"use a machine with more cores for each process ({machine}; {wanted} workers a process would be needed)"


def _relief(limit: str, supply: Supply) -> str:
    """How the work of a stage becomes less."""
    if limit == "read":
        if supply.remote:
            return "give whole shards room on a local disk (data.cache_size, data.cache_dir)"
        return "put the shards on a faster disk or into the page cache"
    if limit == "decode":
        return (
            _SMALLER
            if supply.decode == "cpu"
            else "store upright baseline JPEGs, which the GPU decodes (scaler convert --resize 512)"
        )
    if cut is cut_with_torch:
        return "install with a C compiler: without it views are cut by a slower path"
    return "cut fewer or smaller views"


def _sorted(stages: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(stages.items(), key=lambda item: -item[1])

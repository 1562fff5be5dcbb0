"""What `scaler bench feed` has measured, and what that means for a recipe: pure functions of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from scaler.bench.contenders import STOCK
from scaler.bench.rounds import Block, rate
from scaler.supply import delivered, fed, gpu_decoding_pays, worker_room, workers_needed

_WAIT = 0.03  # of the time: a step that waits less for its data is fed


@dataclass(frozen=True)
class Fed:
    """A block, the part of its time that the step waited, and the device's seconds of decoding an image."""

    block: Block
    wait: float | None = None
    device_seconds: float | None = None


@dataclass
class Row:
    """What was measured; see `measure`."""

    part: str
    name: str
    decode: str | None = None
    workers: int | None = None
    images_per_second: float | None = None
    images_per_cpu_second: float | None = None
    data_wait: float | None = None
    device_seconds: float | None = None
    missing: str | None = None
    blocks: list[Block] = field(default_factory=list)

    def take(self, found: Fed) -> None:
        """One more block."""
        self.blocks.append(found.block)
        self.images_per_second, self.images_per_cpu_second = rate(self.blocks, "wall"), rate(self.blocks, "cpu")
        if found.wait is not None:
            self._waits.append(found.wait)
            self.data_wait = statistics.median(self._waits)
        if found.device_seconds is not None:
            self._device.append(found.device_seconds)
            self.device_seconds = statistics.median(self._device)

    def __post_init__(self) -> None:
        self._waits: list[float] = []
        self._device: list[float] = []


def row_rate(row: Row) -> float:
    """Images/s of a row that was measured."""
    assert row.images_per_second is not None, "measured"
    return row.images_per_second


def curve(rows: Sequence[Row], decode: str, *, name: str = "scaler") -> dict[int, float]:
    """Images/s of loading alone by number of workers."""
    return {
        row.workers: row_rate(row)
        for row in rows
        if (row.part, row.name, row.decode) == ("loading", name, decode) and row.workers and not row.missing
    }


def advise(rows: Sequence[Row], *, num_cores: int) -> dict[str, Any]:
    """What the rows mean for a recipe, one GPU and so many cores.

    Returns:
        `wanted` images/s; `cores` of a GPU, its training process included, and `workers`, both by way of loading (cpu,
        gpu, stock; those that were measured); `delivered`, images/s by way with the cores at hand; `gpu_decoding_pays`;
        `decode` and `num_workers`, what to set.
    """
    wanted, room = row_rate(next(row for row in rows if row.part == "step")), worker_room(num_cores)
    curves = {"cpu": curve(rows, "cpu"), "gpu": curve(rows, "gpu"), "stock": curve(rows, "cpu", name=STOCK)}
    # More workers than there are cores beside the training process say nothing about more cores.
    curves = {
        way: {n: rate for n, rate in curve.items() if n <= max(room, min(curve))}
        for way, curve in curves.items()
        if curve
    }
    needed = {way: workers_needed(wanted, found) for way, found in curves.items()}
    by_room = {way: delivered(room, found) for way, found in curves.items()}
    pays = "gpu" in curves and gpu_decoding_pays(
        wanted,
        by_cpu=by_room["cpu"],
        by_gpu=by_room["gpu"],
        device_seconds=_cost(rows, wanted=wanted, by_gpu=curves["gpu"]),
    )
    decode = "gpu" if pays else "cpu"
    return {
        "wanted": wanted,
        "workers": needed,
        "cores": {way: number + 1 for way, number in needed.items()},
        "delivered": by_room,
        "gpu_decoding_pays": pays,
        "decode": decode,
        "num_workers": min(needed[decode], room),
    }


def _cost(rows: Sequence[Row], *, wanted: float, by_gpu: Mapping[int, float]) -> float:
    """Seconds of the step that decoding an image on the device takes: how much longer it was than without, or, where
    that is less, how long the device was at it."""
    found = [row.device_seconds for row in rows if row.device_seconds is not None]
    for row in rows:
        if (row.part, row.decode) == ("training", "gpu") and row.workers:
            without = fed(wanted, by_workers=delivered(row.workers, by_gpu))
            found.append(max(0.0, 1 / row_rate(row) - 1 / without))
    return min(found, default=0.0)


def as_table(result: Mapping[str, Any]) -> Table:
    """A row for each that was measured."""
    recipe = result["recipe"]
    where = f"{result['cores']} core{'s' * (result['cores'] > 1)}"
    title = (
        f"{recipe['name']} on {result['device']}, {where}, {result['images']} images a step of "
        f"{result['pictures']} JPEGs of {result['mean_bytes'] / 1000:.0f} KB"
    )
    table = Table(title=title, title_justify="left")
    for name in ("part", "by", "decode"):
        table.add_column(name, no_wrap=True)
    for name in ("workers", "images/s", "/ CPU-s", "data wait"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        name, workers = row["name"].removeprefix("torchvision "), "" if row["workers"] is None else str(row["workers"])
        labels = [row["part"], name, row["decode"] or "", workers]
        if row["missing"]:  # `as_lines` tells why
            table.add_row(*labels, "missing", style="dim")
            continue
        rates = (f"{row[name]:,.0f}" for name in ("images_per_second", "images_per_cpu_second"))
        wait = "" if row["data_wait"] is None else f"{100 * row['data_wait']:.1f} %"
        table.add_row(*labels, *rates, wait)
    return table


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean, a line each."""
    advice, cores = result["advice"], result["cores"]
    names = {"cpu": "data.decode=cpu", "gpu": "data.decode=gpu", "stock": STOCK}
    needed = ", ".join(f"{count} by {names[way]}" for way, count in advice["cores"].items())
    yield f"the step wants {advice['wanted']:,.0f} images/s; cores that takes, one for the training process: {needed}"
    by_cpu = advice["delivered"]["cpu"]
    for row in result["rows"]:
        if row["missing"]:
            yield ", ".join(filter(None, (row["part"], row["name"], row["decode"]))) + f": {row['missing']}"
    if "gpu" not in advice["delivered"]:
        yield "whether decoding on the GPU pays was not measured"
    elif advice["gpu_decoding_pays"]:
        yield (
            f"decoding on the GPU pays here: workers on {cores} cores deliver {by_cpu:,.0f} images/s, and waiting for "
            "them costs the step more than decoding would"
        )
    elif by_cpu >= advice["wanted"]:
        yield f"decoding on the GPU does not pay here: workers on {cores} cores deliver {by_cpu:,.0f} images/s"
    else:
        yield "decoding on the GPU does not pay here: it would cost the step more than waiting for the workers does"
    for row in result["rows"]:
        if row["data_wait"] is not None and row["workers"] is not None:
            held = "fed" if row["data_wait"] <= _WAIT else "held up"
            yield (
                f"{row['name']}, {row['workers']} worker{'s' * (row['workers'] > 1)}, decode {row['decode']}: {held}, "
                f"data wait {row['data_wait']:.1%}, {row['images_per_second'] / advice['wanted']:.0%} of what the step "
                "wants"
            )
    short = advice["workers"][advice["decode"]] > advice["num_workers"]
    lack = f" (too few: {advice['workers'][advice['decode']]} would be needed, and cores for them)" * short
    yield f"recommended: data.num_workers={advice['num_workers']} data.decode={advice['decode']}{lack}"

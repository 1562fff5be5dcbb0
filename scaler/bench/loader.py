"""Images per second through our loader and through others, interleaved in one run on one core.

    scaler bench loader shards/train --views dinov2
    scaler bench loader --parts worker,raw --json

What is measured, in parts:

    everything   files or shards → batches of coloured and normalised float views, all on the CPU
    worker       what our loader's workers do: → batches of uint8 views; colours follow on the training device
    colours      uint8 views → normalised floats alone
    decode       JPEG → pixels alone: the anchor, since no loader that decodes the whole picture can be faster
    raw          samples as they are stored, without decoding

One thread, a warm page cache, the same files for all. The figure of a loader is images per second of processor time of
the whole process, children included, so that it can be multiplied by the number of cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from scaler.bench.contenders import (
    COLOURS_OURS,
    COLOURS_STOCK,
    GEOMETRY,
    KERNEL,
    LIBRARY,
    SHUFFLED,
    STOCK,
    Augmentation,
    Contender,
    contenders,
)
from scaler.bench.images import make_folder
from scaler.bench.peers import PEERS, SAMPLES, Files
from scaler.bench.rounds import Block, interleave, rate, ratio
from shards.convert import convert
from shards.folder import scan_folder
from shards.index import INDEX_NAME, ShardIndex
from shards.places import Url, locate
from shards.reader import SampleReader

PARTS = ("everything", "worker", "colours", "decode", "raw")
MADE = {"num_bytes": 110_000, "width": 500, "height": 375}  # about what ImageNet's files are
_STOCK, _GEOMETRY = f"everything: {STOCK}", f"worker: {GEOMETRY}"


def measure(
    source: str | None,
    *,
    views: str = "simclr",
    parts: Sequence[str] = PARTS,
    peers: Sequence[str] = tuple(PEERS),
    seconds: float = 1.0,
    rounds: int = 5,
    images: int = 3000,
    appetite: float = 250.0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure on a folder of images, a folder or URL of shards, or a made set (None); see the module's text.

    Args:
        views: `simclr`, `dinov2` or a recipe.
        peers: of `PEERS`, those that are tried.
        seconds: of one block; a round is one block of each contender.
        images: so many of the source's, or so many are made.
        appetite: images per second that one GPU wants.

    Returns:
        `rows` (part, name, images_per_cpu_second, images_per_second, `times` the rate of `times_of`, every block; of
        ours microseconds an image by stage; or `missing`), `ratios` that matter most, `gpus` that all cores can feed,
        and what was measured where.

    Raises:
        ValueError: an unknown part, peer or recipe, or a source without images.
    """
    for kind, chosen, known in (("part", parts, PARTS), ("peer", peers, tuple(PEERS))):
        if unknown := sorted(set(chosen) - set(known)):
            raise ValueError(f"no {kind} {unknown[0]!r}; there are {', '.join(known)}")
    augmentation, threads = Augmentation.find(views), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="scaler-bench-") as scratch:
            files = prepare(source, Path(scratch), images=images, say=say)
            rows = [row for row in contenders(files, augmentation, peers=peers) if row.part in parts]
            for row in rows:
                say(f"warming up: {row.key}")
                row.warm_up()
            steps = {row.key: partial(next, row.steps) for row in rows if row.steps is not None}
            blocks = interleave(steps, seconds=seconds, rounds=rounds, say=say)
            sizes = [path.stat().st_size for path in files.paths()[0]]
            return {
                "source": source or "made",
                "images": len(sizes),
                "mean_bytes": statistics.mean(sizes),
                "views": views,
                "cut": [dataclasses.asdict(view) for view in augmentation.views],
                "seconds": seconds,
                "rounds": rounds,
                "cores": _cores(),
                "processor": _processor(),
                "versions": _versions(),
                "rows": [_row(row, blocks) for row in rows],
                "ratios": _ratios(blocks),
                "gpus": _gpus(blocks, appetite=appetite),
            }
    finally:
        torch.set_num_threads(threads)


def prepare(source: str | None, scratch: Path, *, images: int, say: Callable[[str], None]) -> Files:
    """A sample of the source (None: made), spread evenly over it, as a folder of class folders and as shards; all of it
    is in the page cache."""
    files = Files(scratch / "images", scratch / "shards", scratch)
    if source is None:
        say(f"making {images} pictures")
        make_folder(files.folder, num_images=images, **MADE)
    elif isinstance(locate(source), Url) or (Path(source) / INDEX_NAME).exists():
        index = ShardIndex.load(source)
        with contextlib.closing(SampleReader(index)) as reader:
            for i in _spread(index.num_samples, images):
                entry = index.entry(i)
                path = files.folder / f"{entry.label + 1:06d}" / f"{i:09d}.{entry.extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(reader.read(entry))
    else:
        found = scan_folder(Path(source), labels=None)
        for i in _spread(len(found.paths), images):
            path = Path(source).resolve() / found.paths[i]
            link = files.folder / f"{found.labels[i] + 1:06d}" / f"{i:09d}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    convert(files.folder, files.shards, labels=True, workers=1)
    for path in [*files.paths()[0], *files.shards.iterdir()]:  # into the page cache
        path.read_bytes()
    return files


def _spread(size: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(int)).tolist()


def _row(contender: Contender, blocks: dict[str, list[Block]]) -> dict[str, Any]:
    row: dict[str, Any] = {"part": contender.part, "name": contender.name}
    if contender.missing:
        return row | {"missing": contender.missing}
    mine, base = blocks[contender.key], _baseline(contender.part, blocks)
    row |= {
        "images_per_cpu_second": rate(mine, "cpu"),
        "images_per_second": rate(mine, "wall"),
        "times": ratio(mine, blocks[base], "cpu") if base else None,
        "times_of": base,
        "blocks": [dataclasses.asdict(block) for block in mine],
    }
    if contender.images:
        row["microseconds"] = {k: 1e6 * v / contender.images for k, v in contender.seconds.items()}
    return row


def _baseline(part: str, blocks: dict[str, list[Block]]) -> str | None:
    """What a part is compared with: stock loading, stock colours, or litdata's raw samples; None: not measured."""
    wanted = {"colours": [f"colours: {COLOURS_STOCK}"], "raw": [f"raw: litdata{SHUFFLED}", "raw: tarfile, in order"]}
    return next((key for key in wanted.get(part, [_STOCK]) if key in blocks), None)


def _ratios(blocks: dict[str, list[Block]]) -> dict[str, float]:
    """The comparisons that matter most, by processor time."""
    pairs = {
        f"worker, {name}, against {other}": (f"worker: {name}", key)
        for name in (KERNEL, LIBRARY)
        for other, key in ((STOCK, _STOCK), (GEOMETRY, _GEOMETRY))
    }
    pairs |= {f"everything, {name}, against {STOCK}": (f"everything: {name}", _STOCK) for name in (KERNEL, LIBRARY)}
    pairs["colours, by batch against image by image"] = (f"colours: {COLOURS_OURS}", f"colours: {COLOURS_STOCK}")
    pairs |= {
        f"raw, against {peer}{order}": (f"raw: scaler{order}", f"raw: {peer}{order}")
        for peer in ("tarfile", *SAMPLES)
        for order in (SHUFFLED, ", in order")
    }
    return {name: ratio(blocks[a], blocks[b], "cpu") for name, (a, b) in pairs.items() if a in blocks and b in blocks}


def _gpus(blocks: dict[str, list[Block]], *, appetite: float) -> dict[str, float]:
    """How many GPUs of an appetite (images/s) all cores can feed, by stock loading and by ours."""
    fed = {"appetite": appetite}
    for name, keys in {"stock": [_STOCK], "scaler": [f"worker: {KERNEL}", f"worker: {LIBRARY}"]}.items():
        for key in [key for key in keys if key in blocks][:1]:
            fed[name] = rate(blocks[key], "cpu") * _cores() / appetite
    return fed


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "pillow", "simplejpeg", "webdataset", "litdata", "mosaicml-streaming"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    """Its name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---------------------------------------------------------------------- for people


def as_table(result: dict[str, Any]) -> Table:
    """The rows of `measure`'s result."""
    title = f"{result['images']} images of {result['mean_bytes'] / 1000:.0f} KB, views of {result['views']}, one core"
    table = Table(title=title, title_justify="left")
    for name in ("part", "loader"):
        table.add_column(name)
    for name in ("images / CPU-s", "images / s", "times"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        if "missing" in row:
            table.add_row(row["part"], row["name"], row["missing"], style="dim")
            continue
        times = "" if row["times"] is None else f"{row['times']:.2f}"
        rates = (f"{row[name]:,.0f}" for name in ("images_per_cpu_second", "images_per_second"))
        table.add_row(row["part"], row["name"], *rates, times)
    return table


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """What the figures mean, a line each."""
    bases: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row.get("times_of") and row["part"] not in bases.setdefault(row["times_of"], []):
            bases[row["times_of"]].append(row["part"])
    for base, parts in bases.items():
        yield f"times, {' and '.join(parts)}: of {base}"
    for row in result["rows"]:
        if "microseconds" in row:
            stages = ", ".join(f"{name} {value:.0f}" for name, value in row["microseconds"].items())
            yield f"{row['part']}, {row['name']}, microseconds an image: {stages}"
    for name, value in result["ratios"].items():
        yield f"{name}: {value:.2f} times"
    gpus = result["gpus"]
    fed = " and ".join(
        f"{gpus[key]:.1f} by {what}"
        for key, what in (("stock", "stock loading"), ("scaler", "scaler's workers (colours on the GPU)"))
        if key in gpus
    )
    if fed:
        yield f"{result['cores']} cores feed so many GPUs that want {gpus['appetite']:g} images/s: {fed}"

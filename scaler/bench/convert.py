"""Files per second from a folder of images into shards: ours and those of others, interleaved in one run.

    scaler bench convert photos/train
    scaler bench convert --small 20000 --large 3000 --json

Bytes are kept by all of them. The files lie in the page cache; what is written goes to a temporary folder and is
removed after each turn, untimed. Ours alone reads the headers of the images, hashes shards, indexes samples, and waits
for the disk (fsync); GNU tar writes the images only, without their classes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from scaler.bench.images import make_folder
from scaler.bench.peers import Files, why_missing, write_litdata, write_mds, write_tarfile, write_webdataset
from scaler.bench.rounds import Block, Clock, interleave, rate, ratio
from shards.convert import convert
from shards.folder import scan_folder

OURS, STOCK = "scaler convert", "webdataset ShardWriter"
PEERS = ("webdataset", "mosaicml-streaming", "litdata")
SMALL = {"num_bytes": 6_700, "width": 96, "height": 72}
LARGE = {"num_bytes": 110_000, "width": 500, "height": 375}


@dataclass
class Contender:
    """One row: `write` fills a folder. `missing`: why it cannot. `output`: bytes that it wrote."""

    name: str
    processes: int
    write: Callable[[Path], Any]
    fsync: bool = False
    missing: str | None = None
    output: int = 0

    @property
    def key(self) -> str:
        return f"{self.name}, {self.processes} process{'es' * (self.processes > 1)}"


def measure(
    source: str | None,
    *,
    small: int = 20_000,
    large: int = 3_000,
    processes: int | None = None,
    rounds: int = 3,
    peers: Sequence[str] = PEERS,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Convert a folder of images, or (None) a made one of `small` files of 6.7 KB and one of `large` of 110 KB (0: not
    this one), each with one process and with `processes` (None: as many as cores).

    Returns:
        `sets`, each with its files and bytes, `rows` (name, processes, files_per_second, mb_per_second of wall time,
        cpu_seconds, output_over_input, fsync, `times` the rate of webdataset's ShardWriter, every block; or `missing`)
        and `ratios`.

    Raises:
        ValueError: an unknown peer, or a folder without images.
    """
    if unknown := sorted(set(peers) - set(PEERS)):
        raise ValueError(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    many = processes or len(os.sched_getaffinity(0))
    sets = {}
    with tempfile.TemporaryDirectory(prefix="scaler-bench-") as scratch:
        made = {"small": (small, SMALL), "large": (large, LARGE)}
        wanted = {name: Path(scratch) / name for name, (count, _) in made.items() if count}
        for name, folder in wanted.items() if source is None else [("yours", Path(source))]:
            if source is None:
                count, form = made[name]
                say(f"making {count} pictures of {form['num_bytes'] / 1000:g} KB")
                make_folder(folder, num_images=count, **form)
            files = Files(folder, folder, Path(scratch))
            sets[name] = _measure(files, many=many, rounds=rounds, peers=peers, say=say)
    return {"source": source or "made", "rounds": rounds, "cores": len(os.sched_getaffinity(0)), "sets": sets}


def _measure(
    files: Files, *, many: int, rounds: int, peers: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    found = scan_folder(files.folder, labels=None)
    size = 0
    for path in found.paths:  # into the page cache
        size += len((files.folder / path).read_bytes())
    rows = list(_contenders(files, many=many, peers=peers))
    destination = files.scratch / "out"

    def step(row: Contender) -> int:
        row.write(destination)
        return len(found.paths)

    def clean(key: str) -> None:
        row = next(row for row in rows if row.key == key)
        row.output = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
        shutil.rmtree(destination)

    steps = {row.key: partial(step, row) for row in rows if not row.missing}
    blocks = interleave(steps, seconds=0.0, rounds=rounds, say=say, after=clean)
    return {
        "files": len(found.paths),
        "bytes": size,
        "rows": [_row(row, blocks, size=size, count=len(found.paths)) for row in rows],
        "ratios": _ratios(blocks, many=many),
    }


def _contenders(files: Files, *, many: int, peers: Sequence[str]) -> Iterator[Contender]:
    for count in sorted({1, many}):
        yield Contender(OURS, count, partial(convert, files.folder, workers=count), fsync=True)
    missing = {peer: why_missing(peer) for peer in peers}
    if "webdataset" in peers:
        yield Contender(STOCK, 1, partial(write_webdataset, files), missing=missing["webdataset"])
    yield Contender("Python tarfile", 1, partial(write_tarfile, files))
    yield Contender("GNU tar", 1, partial(_gnu_tar, files), missing=None if _has_gnu_tar() else "not installed")
    if "mosaicml-streaming" in peers:
        yield Contender("MDSWriter", 1, partial(write_mds, files), missing=missing["mosaicml-streaming"])
    for count in sorted({1, many}) if "litdata" in peers else ():
        yield Contender(
            "litdata optimize", count, partial(write_litdata, files, workers=count), missing=missing["litdata"]
        )


def _gnu_tar(files: Files, destination: Path) -> None:
    destination.mkdir()
    subprocess.run(["tar", "--format=ustar", "-cf", destination / "s.tar", "-C", files.folder, "."], check=True)


def _has_gnu_tar() -> bool:
    if shutil.which("tar") is None:
        return False
    return b"GNU tar" in subprocess.run(["tar", "--version"], capture_output=True).stdout


def _row(row: Contender, blocks: dict[str, list[Block]], *, size: int, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {"name": row.name, "processes": row.processes}
    if row.missing:
        return values | {"missing": row.missing}
    mine, stock = blocks[row.key], blocks.get(f"{STOCK}, 1 process")
    per_second = rate(mine, "wall")
    return values | {
        "files_per_second": per_second,
        "mb_per_second": per_second * size / count / 1e6,
        "cpu_seconds": count / rate(mine, "cpu"),
        "output_over_input": row.output / size,
        "fsync": row.fsync,
        "times": ratio(mine, stock, "wall") if stock else None,
        "blocks": [asdict(block) for block in mine],
    }


def _ratios(blocks: dict[str, list[Block]], *, many: int) -> dict[str, float]:
    """The comparisons that matter most, by wall time, and by processor time, which the disk has no part in."""
    one, several, stock = f"{OURS}, 1 process", f"{OURS}, {many} processes", f"{STOCK}, 1 process"
    wanted: list[tuple[str, str, str, Clock]] = [
        (f"one process, against {STOCK}", one, stock, "wall"),
        (f"one process, against {STOCK}, processor time", one, stock, "cpu"),
        (f"{many} processes against one", several, one, "wall"),
    ]
    return {name: ratio(blocks[a], blocks[b], clock) for name, a, b, clock in wanted if {a, b} <= blocks.keys()}


# ---------------------------------------------------------------------- for people


def as_table(result: dict[str, Any]) -> Group:
    """A table a set."""
    return Group(*(_table(name, found) for name, found in result["sets"].items()))


def _table(name: str, found: dict[str, Any]) -> Table:
    title = f"{name}: {found['files']} files of {found['bytes'] / found['files'] / 1000:.1f} KB"
    table = Table(title=title, title_justify="left")
    for column in ("by", "processes"):
        table.add_column(column)
    for column in ("files / s", "MB / s", "CPU s", "out / in", "times", "fsync"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        head = (row["name"], str(row["processes"]))
        if "missing" in row:
            table.add_row(*head, row["missing"], style="dim")
            continue
        times = "" if row["times"] is None else f"{row['times']:.2f}"
        rates = f"{row['files_per_second']:,.0f}", f"{row['mb_per_second']:,.0f}", f"{row['cpu_seconds']:.2f}"
        table.add_row(*head, *rates, f"{row['output_over_input']:.2f}", times, "yes" if row["fsync"] else "no")
    return table


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """What the figures mean, a line each."""
    yield f"times: of {STOCK}, by wall time; fsync: whether it waits until the disk has everything"
    for name, found in result["sets"].items():
        for what, value in found["ratios"].items():
            yield f"{name}: {what}: {value:.2f} times"

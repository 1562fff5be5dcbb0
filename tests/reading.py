"""Processes that read shards as the ranks of a training do; `python -m tests.reading` is one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from shards.cache import ShardCache
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import SampleOrder

ROOT = Path(__file__).parents[1]
STOP = 480  # images


def make_loader(index: ShardIndex, *, rank: int, ranks: int, ranks_per_node: int, workers: int) -> ShardLoader:
    """Four lanes, batches of 16."""
    return ShardLoader(
        index,
        SampleOrder(index.shard_sizes, seed=1, lanes=4, shuffle_window=10),
        views=[View("a", 24)],
        seed=0,
        global_batch_size=16,
        micro_batch_size=16 // ranks,
        rank=rank,
        world_size=ranks,
        ranks_per_node=ranks_per_node,
        num_workers=workers,
        stop=STOP,
    )


def lines(loader: ShardLoader) -> Iterator[str]:
    """Of each micro-batch its image number, the ids and the crc32 of the pixels."""
    for batch in loader:
        pixels = zlib.crc32(batch["views"]["a"].numpy().tobytes())
        yield " ".join(map(str, [batch["image_number"], *batch["ids"].tolist(), pixels]))
    yield "end"


def start_reading(
    where: object,
    cache: Path,
    *,
    bound: int = 1 << 30,
    rank: int = 0,
    ranks: int = 1,
    ranks_per_node: int = 1,
    workers: int = 0,
    pause: float = 0.02,
    prefix: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """Start a rank; `prefix` are words before its command. It waits `pause` seconds after each micro-batch."""
    arguments = (where, cache, bound, rank, ranks, ranks_per_node, workers, pause)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.reading", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"SCALER_REMOTE_SECONDS": "20", **os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_to_end(process: subprocess.Popen[str], folder: Path, *, rank: int = 0, ranks: int = 1) -> str:
    """What it warned of; its stream is that of the local folder."""
    out, err = process.communicate(timeout=120)
    loader = make_loader(ShardIndex.load(folder), rank=rank, ranks=ranks, ranks_per_node=1, workers=0)
    assert out.splitlines() == list(lines(loader)), err
    assert "Traceback" not in err, err
    return err


def used_bytes(folder: Path) -> int:
    """Bytes on the disk of a folder and the files in it."""
    total = 0
    for path in [folder, *folder.glob("*")]:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.name))
    return found


if __name__ == "__main__":
    where, cache, bound, rank, ranks, ranks_per_node, workers, pause = sys.argv[1:]
    index = ShardIndex.load(where, cache=ShardCache(cache, max_bytes=int(bound)))
    for line in lines(
        make_loader(index, rank=int(rank), ranks=int(ranks), ranks_per_node=int(ranks_per_node), workers=int(workers))
    ):
        print(line, flush=True)
        time.sleep(float(pause))

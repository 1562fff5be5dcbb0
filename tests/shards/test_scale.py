"""A million samples cost what ten thousand do: to start anywhere in them, and in memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.decode import View
from shards.index import ShardIndex, ShardRecord
from shards.loader import ShardLoader
from shards.offsets import ENDING, pack_columns
from shards.order import SampleOrder
from tests.images import encode_image, make_pixels

PER_SHARD = 2000
SMALL, LARGE = 10_000, 1_000_000


def make_shards(folder: Path, num_samples: int) -> Path:
    """Shards that hold one and the same picture `num_samples` times, each under a key of its own, on a few bytes."""
    folder.mkdir()
    picture = encode_image(make_pixels(40, 40, seed=0))
    sha256, crc32, records = hashlib.sha256(picture).hexdigest(), zlib.crc32(picture), []
    for number in range(num_samples // PER_SHARD):
        name = f"shard-{number:06d}"
        (folder / f"{name}.tar").write_bytes(picture)
        offsets = pack_columns(
            keys=[f"n01440764_{number:06d}_{i:06d}" for i in range(PER_SHARD)],
            extensions=["jpg"] * PER_SHARD,
            offsets=[0] * PER_SHARD,
            sizes=[len(picture)] * PER_SHARD,
            labels=[i % 2 for i in range(PER_SHARD)],
            sources=[f"photos/n01440764_{number:06d}_{i:06d}.jpg" for i in range(PER_SHARD)],
            crc32=[crc32] * PER_SHARD,
            shard_name=f"{name}.tar",
            num_bytes=len(picture),
            sha256=sha256,
            skipped=[],
        )
        (folder / f"{name}{ENDING}").write_bytes(offsets)
        records.append(ShardRecord(f"{name}.tar", len(picture), PER_SHARD, sha256))
    ShardIndex(folder, shards=records, class_names=["a", "b"]).save()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = tmp_path_factory.mktemp("data")
    return {size: make_shards(base / str(size), size) for size in (SMALL, LARGE)}


def loader(folder: Path, **options: int) -> ShardLoader:
    index = ShardIndex.load(folder)
    order = SampleOrder(index.shard_sizes, seed=0, lanes=64, shuffle_window=2048)
    return ShardLoader(
        index, order, views=[View("a", 16)], seed=0, global_batch_size=64, micro_batch_size=64, **options
    )


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def test_a_start_at_the_end_costs_what_a_start_at_the_beginning_costs(folders: dict[int, Path]) -> None:
    def first_batch(start: int) -> float:
        return seconds(lambda: next(iter(loader(folders[LARGE], start=start))))

    first_batch(0)  # imports
    rounds = [(first_batch(0), first_batch(LARGE * 9 // 10)) for _ in range(5)]
    more = min(late for _, late in rounds) - min(early for early, _ in rounds)
    assert more < 0.03, f"{1000 * more:.0f} ms of the processor more"


_READ = """
import sys
import psutil
from pathlib import Path
from tests.shards.test_scale import loader

batches = iter(loader(Path(sys.argv[1])))
for _ in range(300):
    next(batches)
print(psutil.Process().memory_info().rss)
"""


def test_memory_does_not_grow_with_the_samples(folders: dict[int, Path]) -> None:
    """19,200 samples are read of either, in batches that come from all lanes."""

    def memory(size: int) -> int:
        command = [sys.executable, "-c", _READ, str(folders[size])]
        return int(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
        )

    more = memory(LARGE) - memory(SMALL)
    assert more < 30e6, f"{more / 1e6:.0f} MB more"

"""Damaged shards, images and index files through `index`, `verify` and the loaders.

Whatever the damage: nothing but one-line `ValueError`s, no hang, bounded memory, and no image that is left out without
a word. 150 cases by default, 2,000 with SCALER_TEST_LONG=1.
"""

from __future__ import annotations

import functools
import io
import resource
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.decode import View
from shards.image_header import MAX_IMAGE_BYTES
from shards.index import ShardIndex
from shards.indexing import build_index
from shards.loader import ShardLoader, evaluation_batches
from shards.order import SampleOrder
from shards.reader import SampleReader
from shards.stream import StreamLoader
from shards.tar import BLOCK
from shards.verify import verify
from tests.images import encode_image, make_pixels
from tests.long import LONG

NUM_CASES = 2000 if LONG else 150
NUM_IMAGES = 10
MAX_PIXELS = 300_000  # 0.9 MB decoded
MAX_SECONDS = 10.0  # for a case, on a busy machine
MAX_GROWTH = 200 << 20  # bytes, over all cases
VIEW = View("whole", 16, kind="center")
NAME = "s.tar"

Generator = np.random.Generator
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@functools.cache
def images() -> list[tuple[str, bytes]]:
    """(key and ending, bytes) of ten small pictures."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(NUM_IMAGES):
        ending = ("jpg", "png", "webp")[i % 3]
        width, height = generator.integers(24, 65, size=2).tolist()
        data = encode_image(make_pixels(width, height, seed=i), format="jpeg" if ending == "jpg" else ending)
        made.append((f"class/é{i}{'x' * 120 * (i % 4 == 1)}.{ending}", data))
    return made


def pack(contents: list[tuple[str, bytes]], format: int) -> bytes:
    """A tar of the images, each with its `cls`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for i, (name, data) in enumerate(contents):
            for member, content in ((name, data), (f"{name.rpartition('.')[0]}.cls", b"%d" % (i % 3))):
                if format == tarfile.USTAR_FORMAT:
                    member = member.replace("x" * 20, "x")
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------- damage


def flip(content: bytearray, draw: Generator) -> None:
    for at in draw.integers(0, len(content), size=draw.integers(1, 20)):
        content[at] ^= 1 << int(draw.integers(8))


def cut(content: bytearray, draw: Generator) -> None:
    del content[int(draw.integers(0, len(content))) :]


def erase(content: bytearray, draw: Generator) -> None:
    start = int(draw.integers(0, len(content)))
    size = min(int(draw.integers(1, 4000)), len(content) - start)
    content[start : start + size] = bytes(size)


def edit_header(content: bytearray, draw: Generator) -> None:
    at = _header(content, draw) + int(draw.choice([0, 124, 135, 148, 156, 257, 345, int(draw.integers(BLOCK))]))
    content[at] = int(draw.integers(256))


def forge_header(content: bytearray, draw: Generator) -> None:
    """Another size, kind or name, and the checksum that goes with it."""
    at = _header(content, draw)
    field, values = [
        (124, [b"00000000000\0", b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12, b"%011o\0" % 512]),
        (156, [b"L", b"x", b"g", b"S", b"5", b"2", b"V", b"\0", b"7", b"?"]),
        (
            0,
            [
                b"x.jpg\0",
                b"\0",
                b"a.cls\0",
                b"/etc/passwd\0",
                b"../../x.jpg\0",
                b"__a__/x.jpg\0",
                b".jpg\0",
                b"\xff.jpg\0",
            ],
        ),
    ][int(draw.integers(3))]
    value = values[int(draw.integers(len(values)))]
    content[at + field : at + field + len(value)] = value
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])


def splice(content: bytearray, draw: Generator) -> None:
    """Blocks taken out, put in, or put over others."""
    blocks = len(content) // BLOCK
    start, size, at = (int(draw.integers(0, high)) * BLOCK for high in (blocks, 8, blocks))
    piece = content[start : start + size]
    [
        lambda: content.__delitem__(slice(start, start + size)),
        lambda: content.__setitem__(slice(at, at), piece),
        lambda: content.__setitem__(slice(at, at + len(piece)), piece),
    ][int(draw.integers(3))]()


def _header(content: bytearray, draw: Generator) -> int:
    found = [at for at in range(0, len(content) - BLOCK, BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    return found[int(draw.integers(len(found)))]


# Damage that tar's checksums show, or that leaves members where they were; the rest a forger could do as well.
SHOWING = [flip, cut, erase, edit_header]
SHARD_DAMAGE = [*SHOWING, forge_header, splice]


# --------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Made:
    """What the loader gives of an undamaged shard."""

    folder: Path
    views: dict[str, torch.Tensor]  # by key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """The images as a shard in each tar format, indexed."""
    shards = []
    for format in FORMATS:
        folder = tmp_path_factory.mktemp("shard")
        (folder / NAME).write_bytes(pack(images(), format))
        index = build_index(folder, workers=1)
        keys = index.keys(range(NUM_IMAGES))
        shards.append(Made(folder, dict(zip(keys, load(index).views, strict=True))))
    return shards


@dataclass
class Loaded:
    views: torch.Tensor  # uint8 [n, 3, size, size], in index order
    labels: list[int]
    rejected: set[int]


def load(index: ShardIndex) -> Loaded:
    """One epoch of training and one of evaluation; both must say the same."""
    size = index.num_samples
    order = SampleOrder(index.shard_sizes, seed=0, lanes=1, shuffle_window=4)
    loader = ShardLoader(
        index,
        order,
        views=[VIEW],
        seed=0,
        global_batch_size=size,
        micro_batch_size=size,
        stop=size,
        max_pixels=MAX_PIXELS,
    )
    (batch,) = loader
    (evaluated,) = evaluation_batches(index, view=VIEW, batch_size=size, max_pixels=MAX_PIXELS)
    assert sorted(batch["ids"].tolist()) == list(range(size))
    rejected = {row["id"] for row in batch["rejected"]}
    assert rejected == {row["id"] for row in evaluated["rejected"]}
    assert all("\n" not in row["reason"] for row in batch["rejected"])
    position = {id: row for row, id in enumerate(batch["ids"].tolist())}
    rows = [position[id] for id in range(size)]
    for id in set(range(size)) - rejected:
        assert torch.equal(batch["views"]["whole"][0, position[id]], evaluated["images"][id])
    return Loaded(batch["views"]["whole"][0, rows], evaluated["labels"].tolist(), rejected)


def stream(path: Path) -> list[object]:
    """Twenty images straight from the shard."""
    sizes = {"global_batch_size": 20, "micro_batch_size": 20, "stop": 20}
    return list(StreamLoader([str(path)], views=[VIEW], seed=0, max_pixels=MAX_PIXELS, **sizes))


@contextmanager
def bounded() -> Iterator[None]:
    started, before = time.monotonic(), _peak()
    yield
    assert time.monotonic() - started < MAX_SECONDS
    assert _peak() - before < MAX_GROWTH


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def attempt(action: Callable[[], object]) -> object | None:
    """What the action returns, or None when it ends as errors of the user's making must."""
    try:
        return action()
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and len(str(error)) < 3000, error
        assert "s.tar" in str(error) or "s.offsets" in str(error) or "index.json" in str(error), error
        return None


@pytest.mark.parametrize("part", range(10))
def test_damaged_shards(made: list[Made], tmp_path: Path, part: int) -> None:
    for case in range(part, NUM_CASES, 10):
        draw = np.random.default_rng([1, case])
        before, damage = made[case % len(made)], SHARD_DAMAGE[int(draw.integers(len(SHARD_DAMAGE)))]
        original = (before.folder / NAME).read_bytes()
        content = bytearray(original)
        damage(content, draw)
        with bounded():
            check_indexed_anew(bytes(content), before, tmp_path / f"anew{case}", complete=damage in SHOWING)
            check_against_index(bytes(content), before, tmp_path / f"known{case}", same=bytes(content) == original)


def check_indexed_anew(content: bytes, before: Made, folder: Path, *, complete: bool) -> None:
    """Whoever has no index yet: an error, or every image is there or named."""
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    index = attempt(lambda: build_index(folder, workers=1))
    streamed = attempt(lambda: stream(folder / NAME))
    if not isinstance(index, ShardIndex):
        assert streamed is None or not complete, "a stream has left out what an index would not"
        return
    assert [report.problems for report in verify(folder, workers=1)] == [[]]
    crcs = {index.entry(id).crc32 for id in range(len(index))}
    named = {*index.keys(range(len(index))), *(what for what, _ in index.skipped())}
    lost = [key for key, crc32 in crc32s(before.folder).items() if crc32 not in crcs and key not in named]
    if complete and lost:  # a name and its image were changed at once
        assert len(index) + len(index.skipped()) >= NUM_IMAGES, lost
    attempt(lambda: load(index))


def check_against_index(content: bytes, before: Made, folder: Path, *, same: bool) -> None:
    """Whoever has the index: verify names the shard, and the loader gives what was indexed or says what it does not."""
    folder.mkdir()
    for file in before.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / NAME).write_bytes(content)
    (report,) = verify(folder, workers=1, decode=True, max_pixels=MAX_PIXELS)
    assert bool(report.problems) != same and all("\n" not in line for line in report.problems)
    index = ShardIndex.load(folder)
    loaded = attempt(lambda: load(index))
    if not isinstance(loaded, Loaded):
        return
    reader = SampleReader(index)
    for id in range(NUM_IMAGES):
        entry = index.entry(id)
        right = torch.equal(loaded.views[id], before.views[entry.key])
        intact = zlib.crc32(reader.read(entry)) == entry.crc32
        assert right or not intact, f"{entry.key} came wrong from bytes that are right"
        assert id not in loaded.rejected, "an image of a damaged shard is an error, not a bad picture"


@functools.cache
def crc32s(folder: Path) -> dict[str, int]:
    index = ShardIndex.load(folder)
    return {entry.key: entry.crc32 for entry in map(index.entry, range(len(index)))}


@pytest.mark.parametrize("part", range(5))
def test_damaged_images(tmp_path: Path, part: int) -> None:
    """Images that were damaged before they were packed: each is delivered or rejected by name, the others as ever."""
    for case in range(part, NUM_CASES // 2, 5):
        draw = np.random.default_rng([2, case])
        contents, changed = list(images()), set(draw.choice(NUM_IMAGES, size=3, replace=False).tolist())
        for i in changed:
            content = bytearray(contents[i][1])
            [flip, cut, erase][int(draw.integers(3))](content, draw)
            contents[i] = (contents[i][0], bytes(content))
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / NAME).write_bytes(pack(contents, FORMATS[case % 3]))
        with bounded():
            index = build_index(folder, workers=1)
            assert len(index) == NUM_IMAGES
            loaded = load(index)
            assert loaded.labels == [i % 3 for i in range(NUM_IMAGES)]
            assert loaded.rejected <= changed
            (report,) = verify(folder, workers=1, decode=True, max_pixels=MAX_PIXELS)
            assert len(report.problems) == len(loaded.rejected), report.problems


@pytest.mark.parametrize("name", ["s.offsets", "index.json"])
def test_damaged_index_files(made: list[Made], tmp_path: Path, name: str) -> None:
    for case in range(NUM_CASES // 10):
        draw = np.random.default_rng([3, case])
        before, folder = made[case % len(made)], tmp_path / str(case)
        folder.mkdir()
        for file in before.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        content = bytearray((folder / name).read_bytes())
        [flip, cut, erase][int(draw.integers(3))](content, draw)
        (folder / name).write_bytes(content)
        with bounded():
            reports = attempt(lambda folder=folder: verify(folder, workers=1))
            loaded = attempt(lambda folder=folder: load(ShardIndex.load(folder)))
            if isinstance(loaded, Loaded):  # the damage was one of spaces, or was seen by nobody
                assert isinstance(reports, list) and not any(report.problems for report in reports)
                assert all(map(torch.equal, loaded.views, before.views.values()))


def test_bounds_are_bounds() -> None:
    assert MAX_PIXELS * 3 < MAX_GROWTH < MAX_IMAGE_BYTES

"""Reading many files at once by the compiled part: the same bytes, crc32 and errors as one by one in Python."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import sources
from shards.convert import convert
from shards.folder import scan_folder
from shards.image_header import inspect
from tests.images import encode_image, make_image_folder, make_pixels

compiled = pytest.mark.skipif(sources._files is None, reason="shards/_files.c is not compiled here")


@compiled
@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=8), st.integers(0, 7))
def test_files_and_their_crc32(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], gap: int) -> None:
    folder = tmp_path_factory.mktemp("files")
    for i, content in enumerate(contents):
        (folder / f"é{i}.jpg").write_bytes(content)
    found = scan_folder(folder, labels=None)
    begins = np.cumsum([gap, *(len(content) + gap for content in contents[:-1])])
    room = memoryview(bytearray(int(found.sizes.sum()) + gap * (len(contents) + 1)))
    numbers = list(range(len(contents)))
    crc32, sound = found.read_many(numbers, room, begins, found.sizes, max_pixels=100)
    assert crc32 == [zlib.crc32(content) for content in contents] and len(sound) == len(contents)
    for begin, content in zip(begins, contents, strict=True):
        assert room[begin : begin + len(content)] == content


@compiled
@pytest.mark.parametrize("change", ["grown", "shrunk", "gone", "empty", "a pipe", "unreadable name"])
def test_it_stops_before_what_is_not_as_listed(tmp_path: Path, change: str) -> None:
    files = make_image_folder(tmp_path, num_images=5, classes=0)
    if change == "empty":
        files[3].write_bytes(b"")
    found = scan_folder(tmp_path, labels=None)
    size = int(found.sizes[3])
    if change in ("grown", "shrunk"):
        os.truncate(files[3], size + (1 if change == "grown" else -1))
    elif change == "gone":
        files[3].unlink()
    elif change == "a pipe":
        files[3].unlink()
        os.mkfifo(files[3])
    elif change == "unreadable name":
        found.paths[3] = "x" * 300
    begins = np.append(0, found.sizes[:-1].cumsum())
    room = memoryview(bytearray(int(found.sizes.sum())))
    crc32, sound = found.read_many(range(5), room, begins, found.sizes, max_pixels=10**8)
    assert len(crc32) == 3 and sound == [True] * 3
    if change != "empty":
        with pytest.raises(ValueError, match=r"changed since|not a regular file|File name too long"):
            found.read(3, room[:size])


JPEG = encode_image(make_pixels(40, 30, seed=1))
HEADER = JPEG.index(b"\xff\xda")


@compiled
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER), st.integers(0, 255)), max_size=3), st.sampled_from([200, 10**8]))
def test_what_it_takes_for_sound_is_sound(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], max_pixels: int
) -> None:
    """Headers with some bytes changed, and cut off after them: never sound where Python's inspection refuses."""
    data = bytearray(JPEG)
    for position, value in changes:
        data[position] = value
    variants = [bytes(data), bytes(data[: changes[0][0]]) if changes else JPEG]
    folder = tmp_path_factory.mktemp("files")
    for i, content in enumerate(variants):
        (folder / f"{i}.jpg").write_bytes(content)
    found = scan_folder(folder, labels=None)
    begins = np.append(0, found.sizes[:-1].cumsum())
    room = memoryview(bytearray(int(found.sizes.sum())))
    _, sound = found.read_many([0, 1], room, begins, found.sizes, max_pixels=max_pixels)
    assert sound[:1] == [True] or changes or max_pixels < 1200
    for content, is_sound in zip(variants, sound, strict=False):
        if is_sound:
            assert inspect(content, max_pixels=max_pixels).format == "jpeg"


@compiled
def test_positions_outside_of_the_buffer_are_refused(tmp_path: Path) -> None:
    make_image_folder(tmp_path, num_images=2, classes=0)
    found = scan_folder(tmp_path, labels=None)
    for begins in ([0, 10**9], [-1, 0], [0, 2**62], [0]):
        with pytest.raises(ValueError, match="do not fit"):
            room = memoryview(bytearray(5000))
            found.read_many([0, 1], room, np.array(begins, dtype=np.int64), found.sizes, max_pixels=10**8)


@pytest.mark.parametrize("path", ["compiled", "python"])
def test_files_are_looked_at(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "python":
        monkeypatch.setattr(sources, "_files", None)
    elif sources._files is None:
        pytest.skip("shards/_files.c is not compiled here")
    (tmp_path / "é.jpg").write_bytes(b"12345")
    os.utime(tmp_path / "é.jpg", ns=(1, 1_700_000_000_123_456_789))
    (tmp_path / "link.jpg").symlink_to("é.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    strange = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / strange).write_bytes(b"")
    names = ["é.jpg", "link.jpg", "broken.jpg", "pipe.jpg", "gone.jpg", strange]
    sizes, times = sources.look_at_files(tmp_path, names)
    assert sizes.tolist() == [5, 5, -1, -1, -1, 0]
    assert times.tolist()[:5] == [1_700_000_000_123_456_789] * 2 + [0] * 3 and times[5] > 0


def test_without_the_compiled_part_the_shards_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(tmp_path / "src", num_images=40, format="mixed")
    (tmp_path / "src/class_0/bad.jpg").write_text("text")
    reports = [convert(tmp_path / "src", tmp_path / "1", shard_size="20KB", workers=1)]
    monkeypatch.setattr(sources, "_files", None)
    reports.append(convert(tmp_path / "src", tmp_path / "2", shard_size="20KB", workers=1))
    assert reports[0] == reports[1] and len(reports[0].rejected) == 1
    for file in (tmp_path / "1").glob("shard*"):
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()

"""Tars written through aligned buffers: equal to what Python's tarfile makes, whatever the members' sizes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import archive
from shards.archive import label_members, ustar_headers, writing_archive
from shards.keys import split_name
from shards.places import folder_at, locate
from shards.tar import ustar_header

Factory = pytest.TempPathFactory
NAMES = st.text("ab/é_-. ", min_size=1, max_size=120).filter(lambda name: split_name(name.encode()) is not None)


@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, (1 << 33) - 1)), min_size=1, max_size=20))
def test_headers_of_many_are_those_of_each(members: list[tuple[str, int]]) -> None:
    sizes = np.array([size for _, size in members], dtype=np.int64)
    rows = ustar_headers([name.encode() for name, _ in members], sizes)
    assert [row.tobytes() for row in rows] == [ustar_header(name, size=size) for name, size in members]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
def test_label_members_are_read_by_tarfile(labels: list[int]) -> None:
    rows = label_members([b"key%d" % i for i in range(len(labels))], np.array(labels, dtype=np.int64))
    with tarfile.open(fileobj=io.BytesIO(rows.tobytes() + bytes(1024))) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert found == {f"key{i}.cls": b"%d" % label for i, label in enumerate(labels)}


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 40_000), max_size=12), buffer=st.sampled_from([4096, 8192, 1 << 16]))
@pytest.mark.parametrize("place", ["local", "memory"])
def test_members_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, place: str, sizes: list[int], buffer: int
) -> None:
    """Members larger and smaller than the buffers, abandoned room between them; read back with its sha256."""
    folder = tmp_path_factory.mktemp("archive")
    target = folder / "a.tar" if place == "local" else locate(f"memory://{folder.name}/a.tar")
    contents = {f"m{i}": bytes([i + 1]) * size for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_BUFFER_BYTES", buffer)
        patch.setattr(archive, "_idle", [])
        with writing_archive(target) as tar:
            for name, content in contents.items():
                room = tar.room(3 * len(content) + 7)
                room[:] = b"x" * len(room)  # rejected: never advanced
                tar.add(name, content)
            num_bytes, sha256 = tar.finish()
    written = folder_at(target.parent).read("a.tar")
    assert (len(written), hashlib.sha256(written).hexdigest()) == (num_bytes, sha256)
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == contents


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fill_and_fail() -> None:
        with writing_archive(tmp_path / "a.tar") as tar:
            tar.add("m", bytes(5_000_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_the_writing_thread_meets_is_raised(tmp_path: Path) -> None:
    def refuse(piece: memoryview) -> None:
        raise OSError(5, "Input/output error")

    tar = archive.Archive(refuse)
    with pytest.raises(OSError, match="Input/output error"):
        for _ in range(20):
            tar.add("m", bytes(1_000_000))
        tar.finish()
    tar.close()


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alignment that the disk does not take: the same bytes go through the page cache."""
    monkeypatch.setattr(archive, "_ALIGNMENT", 8)
    monkeypatch.setattr(archive, "_idle", [])
    with writing_archive(tmp_path / "a.tar") as tar:
        for i in range(9):
            tar.add(f"m{i}", bytes([i]) * 300_001)
        num_bytes, sha256 = tar.finish()
    written = (tmp_path / "a.tar").read_bytes()
    assert (len(written), hashlib.sha256(written).hexdigest()) == (num_bytes, sha256)

"""Shards straight to and from an S3 server: killed and continued, and what stands where when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.convert import convert
from shards.index import ShardIndex
from shards.places import folder_at, locate
from tests.http import FaultyServer, faulty_server, flip_byte
from tests.images import make_image_folder
from tests.s3 import BUCKET, forbidden


@pytest.fixture
def where(server: str, tmp_path: Path) -> str:
    return f"{BUCKET}/{tmp_path.name}"


def local_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".json"
    } | {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("index.json")}


def remote_files(url: str) -> dict[str, bytes]:
    folder = folder_at(locate(url))
    return {name: folder.read(name) for name in folder.sizes() if name != "convert.json"}


def test_the_same_bytes_as_on_a_disk(where: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=40)
    (tmp_path / "src/class_0/bad.jpg").write_text("text")
    for options in ({}, {"val_fraction": 0.25, "json_member": True}):
        url = f"{where}/{len(options)}"
        local = convert(tmp_path / "src", tmp_path / url[-1], shard_size="20KB", workers=1, **options)
        remote = convert(tmp_path / "src", url, shard_size="20KB", workers=2, **options)
        assert remote == local and remote.rejected[0][0] == "class_0/bad.jpg"
        assert remote_files(url) == local_files(tmp_path / url[-1])
    again = convert(tmp_path / "src", url, shard_size="20KB", workers=2, **options)
    assert again.num_skipped_finished == again.num_shards and again.rejected == remote.rejected
    with pytest.raises(ValueError, match=r"begun with other options \(seed 0 → 1\)"):
        convert(tmp_path / "src", url, shard_size="20KB", workers=1, seed=1, **options)
    back = convert(f"{where}/0", tmp_path / "back", workers=2, shuffle=False)  # and from there
    assert back.num_samples == 40 and back.class_names == local.class_names


def test_killed_and_continued(where: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=120, size=24)
    convert(tmp_path / "src", tmp_path / "whole", shard_size="3KB", workers=2)
    program = (
        "import sys; from shards.convert import convert\nconvert(sys.argv[1], sys.argv[2], shard_size='3KB', workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "src", where], start_new_session=True)
    folder = folder_at(locate(where))
    end = time.monotonic() + 60
    while sum(name.endswith(".offsets") for name in folder.sizes()) < 8:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    sizes = folder.sizes()
    assert "index.json" not in sizes, "the run had ended before it was killed"
    report = convert(tmp_path / "src", where, shard_size="3KB", workers=2)
    assert 8 <= report.num_skipped_finished < report.num_shards
    assert remote_files(where) == local_files(tmp_path / "whole")


def test_a_refusal_is_one_line(where: str, server: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "src", num_images=3)
    with forbidden(server), pytest.raises((ValueError, OSError)) as error:
        convert(tmp_path / "src", where, workers=1)
    assert "\n" not in str(error.value) and where in str(error.value)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FaultyServer]:
    make_image_folder(tmp_path / "src", num_images=30)
    convert(tmp_path / "src", tmp_path / "web", shard_size="30KB", workers=1)
    with faulty_server(tmp_path / "web") as server:
        yield server


def test_shards_of_a_web_server_that_fails(web: FaultyServer, tmp_path: Path) -> None:
    """Connections are cut and a byte arrives wrong, with offset files and without: the same images come out."""
    braces = f"{web.url}/shard-{{000000..{len(list((tmp_path / 'web').glob('*.tar'))) - 1:06d}}}.tar"
    wanted = sorted(path.read_bytes() for path in (tmp_path / "src").rglob("*.jpg"))
    entry = ShardIndex.load(tmp_path / "web").entry(3)
    web.cut_every = 7
    for indexed in (True, False):
        web.damage = flip_byte("shard-000000.tar", entry.offset + 9, times=2 if indexed else 0)
        out = tmp_path / f"out{indexed}"
        report = convert(braces, out, workers=2)
        assert report.num_samples == 30 and report.class_names == ["class_0", "class_1", "class_2"]
        index = ShardIndex.load(out)
        content = (out / index.shard_names[0]).read_bytes()
        entries = [index.entry(i) for i in range(30)]
        assert sorted(content[e.offset : e.offset + e.size] for e in entries) == wanted
        for path in (tmp_path / "web").glob("*.offsets"):
            path.unlink()


def test_a_damaged_shard_and_a_server_without_ranges_are_errors(web: FaultyServer, tmp_path: Path) -> None:
    entry = ShardIndex.load(tmp_path / "web").entry(3)
    web.damage = flip_byte("shard-000000.tar", entry.offset + 9, times=10**6)
    with pytest.raises(ValueError, match=r"shard http.*/shard-000000\.tar is damaged: .* copy it again"):
        convert(f"{web.url}/shard-{{000000..000000}}.tar", tmp_path / "out", workers=1)
    web.ranges = False
    with pytest.raises(ValueError, match="the server sends whole files where a part is asked for"):
        convert(f"{web.url}/shard-000000.tar", tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"shard-000099\.tar: not found"):
        convert(f"{web.url}/shard-000099.tar", tmp_path / "out", workers=1)

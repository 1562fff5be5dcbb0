"""Indexing and verifying shards where they lie: on an S3 server, and behind HTTP, where nothing can be written."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from shards.cache import ShardCache
from shards.decode import View
from shards.index import ShardIndex
from shards.indexing import build_index
from shards.loader import ShardLoader
from shards.order import SampleOrder
from shards.places import folder_at, locate
from shards.verify import verify
from tests.http import nginx
from tests.images import encode_image, make_pixels
from tests.s3 import BUCKET, forbidden
from tests.shards.test_index import write_tar


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Three shards of four labelled images."""
    for shard in range(3):
        members = {}
        for i in range(4):
            data = encode_image(make_pixels(20 + i, 20, seed=10 * shard + i))
            members |= {f"k{shard}{i}.jpg": data, f"k{shard}{i}.cls": b"%d" % (i % 2)}
        write_tar(tmp_path / f"shards/s-{shard}.tar", members)
    return tmp_path / "shards"


@pytest.fixture
def url(server: str, local: Path, tmp_path: Path) -> str:
    """The same shards on the server."""
    where = f"{BUCKET}/{tmp_path.name}"
    for file in local.iterdir():
        folder_at(locate(where)).write(file.name, file.read_bytes())
    return where


def files(where: str) -> dict[str, bytes]:
    folder = folder_at(locate(where))
    return {name: folder.read(name) for name in folder.sizes()}


def test_the_same_index_as_on_a_disk(local: Path, url: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here, there = build_index(local, workers=1), build_index(url, workers=2)
    assert there.fingerprint == here.fingerprint and there.class_names == here.class_names == ["0", "1"]
    assert files(url) == {file.name: file.read_bytes() for file in local.iterdir()}
    assert [(report.name, report.problems) for report in verify(url, workers=2, decode=True)] == [
        (f"s-{shard}.tar", []) for shard in range(3)
    ]


def test_shards_named_in_braces(local: Path, url: str) -> None:
    index = build_index(f"{url}/s-{{0..1}}.tar", workers=1)
    assert index.shard_names == ["s-0.tar", "s-1.tar"] and str(index.path) == url
    (stranger,) = [report for report in verify(url, workers=1) if report.problems]
    assert "s-2.tar is not listed in index.json; `scaler index" in stranger.problems[0]
    with pytest.raises(ValueError, match=r"s-7\.tar: not found"):
        build_index(f"{url}/s-{{2,7}}.tar", workers=1)
    with pytest.raises(ValueError, match=r"write for example train-\{0000\.\.0099\}\.tar"):
        build_index(f"{url}/s-{{2,7.tar", workers=1)
    assert build_index(f"{local}/s-{{0..1}}.tar", workers=1).shard_names == index.shard_names
    with pytest.raises(ValueError, match=r"cannot read shard .*s-7\.tar: No such file"):
        build_index(f"{local}/s-{{1,7}}.tar", workers=1)


def test_damage_there_is_named(url: str) -> None:
    build_index(url, workers=1)
    folder = folder_at(locate(url))
    content = bytearray(folder.read("s-1.tar"))
    content[600] ^= 1
    folder.write("s-1.tar", bytes(content))
    folder.remove(["s-0.tar", "s-2.offsets"])
    found = {report.name: " ".join(report.problems) for report in verify(url, workers=1) if report.problems}
    assert "s-0.tar is missing; copy it again" in found["s-0.tar"]
    assert "1 of 4 images are damaged" in found["s-1.tar"] and "its sha256 is" in found["s-1.tar"]
    assert "s-2.offsets cannot be read" in found["s-2.tar"] and "`scaler index" in found["s-2.tar"]
    assert "\n" not in "".join(found.values())
    folder.write("s-1.tar", bytes(content[:3000]))
    with pytest.raises(ValueError, match=rf"^shard {url}/s-1\.tar is cut off or damaged at byte \d+ .*; copy it again"):
        build_index(url, workers=1)


def test_refused_places_are_one_line(server: str, url: str) -> None:
    with forbidden(server), pytest.raises(ValueError, match=f"^cannot list the shards of {url}: .*refused") as error:
        build_index(url, workers=1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"^no \.tar files in {url}/nowhere"):
        build_index(f"{url}/nowhere", workers=1)


def test_behind_a_web_server(local: Path) -> None:
    """Verifying reads only; an index cannot be left there."""
    build_index(local, workers=1)
    for listing in ("", "autoindex on;"):
        with nginx(local, extra=listing) as server:
            assert [report.problems for report in verify(server.url, workers=2)] == [[]] * 3
            with pytest.raises(ValueError, match=r"cannot be written to; .*--out DIR"):
                build_index(server.url, workers=1)
    (local / "s-1.tar").unlink()
    with nginx(local) as server:
        (missing,) = [report for report in verify(server.url, workers=1) if report.problems]
        assert missing.name == "s-1.tar" and "is missing" in missing.problems[0]


def test_an_index_of_shards_elsewhere(local: Path, tmp_path: Path) -> None:
    """Shards that can only be read are indexed into a local folder, verified, and loaded from where they lie."""
    with nginx(local) as server:
        index = build_index(f"{server.url}/s-{{0..2}}.tar", out=tmp_path / "out", workers=2)
        assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".json"] + 3 * [".offsets"]
        assert not list(local.glob("*.offsets")) and index.fingerprint == build_index(local, workers=1).fingerprint
        assert [report.problems for report in verify(tmp_path / "out", workers=1)] == [[]] * 3
        loaded = []
        for path, cache in ((local, None), (tmp_path / "out", ShardCache(tmp_path / "cache"))):
            index = ShardIndex.load(path, cache=cache)
            order = SampleOrder(index.shard_sizes, seed=0, lanes=1, shuffle_window=4)
            loader = ShardLoader(
                index, order, views=[View("v", 8)], seed=0, global_batch_size=12, micro_batch_size=12, stop=24
            )
            loaded.append([batch["views"]["v"] for batch in loader])
        assert all(map(torch.equal, *loaded))
    build_index(local, out=tmp_path / "third", workers=1)
    assert ShardIndex.load(tmp_path / "third").shard_path(0) == local / "s-0.tar"

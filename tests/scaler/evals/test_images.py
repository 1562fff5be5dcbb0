"""Folders of images and shards open alike, and a folder is made into shards once until it changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from scaler.evals.images import open_images
from scaler.evals.store import Kept
from shards.convert import convert
from tests.images import make_image_folder


def test_a_folder_and_its_shards_are_the_same_images(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", num_images=12, classes=3, size=40)
    (tmp_path / "images" / "class_0" / "broken.png").write_bytes(b"not a picture")
    convert(tmp_path / "images", tmp_path / "shards", workers=1)
    shards = open_images(tmp_path / "shards")
    with pytest.warns(UserWarning, match="1 files in .*images are left out; the first, class_0/broken.png"):
        folder = open_images(tmp_path / "images", cache_dir=tmp_path / "cache")
    assert folder.class_names == shards.class_names == ["class_0", "class_1", "class_2"]
    sources = [folder.entry(i).source for i in range(12)]
    assert sources == sorted(sources)
    assert {(shards.entry(i).source, shards.entry(i).crc32) for i in range(12)} == {
        (folder.entry(i).source, folder.entry(i).crc32) for i in range(12)
    }


def test_a_folder_is_converted_anew_when_it_has_changed(tmp_path: Path) -> None:
    files = make_image_folder(tmp_path / "images", num_images=5, classes=0, size=40)

    def opened() -> tuple[Path, int]:
        index = open_images(str(tmp_path / "images"), cache_dir=tmp_path / "cache")
        assert index.class_names == []
        return Path(str(index.path)), index.num_samples

    first, count = opened()
    written = os.stat(first / "index.json").st_mtime_ns
    assert opened() == (first, count) and os.stat(first / "index.json").st_mtime_ns == written
    files[0].unlink()
    other, fewer = opened()
    assert other != first and (count, fewer) == (5, 4)


def test_what_is_neither_says_how_to_make_it_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing is no folder: make shards with `scaler convert"):
        open_images(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no images .* in "):
        open_images(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="scaler index"):
        open_images(tmp_path)


def test_what_was_not_used_for_longest_is_removed_beyond_the_bound(tmp_path: Path) -> None:
    kept, now = Kept(tmp_path, max_bytes=250), time.time()
    for name, hours in (("old", 5), ("older", 9), ("new", 0.5)):
        (kept.entry("features", name) / "part").write_bytes(bytes(100))
        os.utime(tmp_path / "features" / name, (now, now - 3600 * hours))
    kept.entry("features", "old")  # used again
    os.utime(tmp_path / "features" / "old", (now, now - 3600 * 5))
    assert kept.entry("images", "next").is_dir()
    assert {path.name for path in tmp_path.glob("*/*")} == {"old", "new", "next"}
    kept = Kept(tmp_path, max_bytes=0)
    kept.entry("images", "last")
    assert {path.name for path in tmp_path.glob("*/*")} == {"new", "next", "last"}, "what is in use stays"


def test_a_cache_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", num_images=2, classes=0, size=40)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot keep images in .*file: Not a directory; name another .*--cache-dir"):
        open_images(tmp_path / "images", cache_dir=tmp_path / "file")

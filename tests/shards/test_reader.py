"""Reading samples by position: few open files, and shards that change underneath."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.convert import convert
from shards.index import ShardIndex
from shards.reader import SampleReader
from tests.images import make_image_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_image_folder(folder, num_images=30)
    return folder


@pytest.fixture(scope="module")
def index(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    convert(source, folder, shard_size=15_000, workers=1)
    index = ShardIndex.load(folder)
    assert len(index.shard_names) > 4
    return index


def open_shards(folder: Path) -> int:
    """Tar files of a folder that this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            path = os.readlink(f"/proc/self/fd/{name}")
            found += path.endswith(".tar") and Path(path).parent == folder
    return found


def test_the_reader_keeps_few_files_open(index: ShardIndex, source: Path) -> None:
    reader = SampleReader(index, open_shards=2)
    assert isinstance(index.path, Path)
    folder = index.path.resolve()
    gc.collect()  # readers that other tests have left
    most = 0
    for id in np.random.default_rng(0).permutation(index.num_samples).tolist():
        entry = index.entry(id)
        assert reader.read(entry) == (source / entry.source).read_bytes()
        most = max(most, open_shards(folder))
    assert most == 2
    reader.close()
    assert open_shards(folder) == 0
    assert reader.read(index.entry(0))  # opens again


def test_a_reader_that_is_sent_elsewhere_leaves_its_files_behind(index: ShardIndex) -> None:
    reader = SampleReader(index)
    data = reader.read(index.entry(0))
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert copy.read(index.entry(0)) == data


def test_a_shard_that_shrinks_while_it_is_read_is_named(index: ShardIndex, tmp_path: Path) -> None:
    shutil.copytree(index.path, tmp_path / "copy")
    copy = ShardIndex.load(tmp_path / "copy")
    reader = SampleReader(copy)
    entries = [copy.entry(id) for id in range(copy.num_samples) if copy.entry(id).shard == 0]
    reader.read(entries[0])
    os.truncate(copy.shard_path(0), entries[-1].offset + 10)
    with pytest.raises(ValueError, match="cut off while it was in use") as error:
        reader.read(entries[-1])
    assert str(copy.shard_path(0)) in str(error.value)

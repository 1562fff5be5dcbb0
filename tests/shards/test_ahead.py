"""Fetching ahead: what is needed when, the window of shards, and the process that does it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.ahead import reading_ahead
from shards.cache import ShardCache
from shards.index import ShardIndex
from shards.loader import cached_set_bytes, rank_lanes
from shards.order import SampleOrder
from tests.http import faulty_server
from tests.machine import children, used_bytes
from tests.reading import Rank, small_shards, start_reading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("data"), num_images=240)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 3),
    window=st.integers(1, 9),
    data=st.data(),
)
def test_shard_needs_are_those_of_the_images(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    total = sum(sizes)
    lanes = data.draw(st.integers(1, min(total, 12)))
    first_lane = data.draw(st.integers(0, lanes - 1))
    mine = range(first_lane, data.draw(st.integers(first_lane + 1, lanes)))
    start = data.draw(st.integers(0, 3 * total))
    stop = start + data.draw(st.integers(1, 2 * total))
    order = SampleOrder(sizes, seed=seed, lanes=lanes, shuffle_window=window)
    needs = list(order.shard_needs(start, stop=stop, lanes=mine))
    assert [need.first for need in needs] == sorted(need.first for need in needs)
    assert needs == list(
        itertools.takewhile(lambda need: need.first < stop, order.shard_needs(start, stop=None, lanes=mine))
    )
    batch, used = order.batch(start, stop - start), set()
    shards = np.searchsorted(np.cumsum(sizes), batch.ids, side="right")
    for image, shard in zip(batch.images.tolist(), shards.tolist(), strict=True):
        if image % lanes in mine:
            fit = [k for k, need in enumerate(needs) if need.shard == shard and need.first <= image < need.past]
            assert fit
            used |= set(fit)
    assert all(k in used for k, need in enumerate(needs) if start <= need.first and need.past <= stop), "none too many"


@settings(deadline=None)
@given(
    ranks=st.integers(1, 5), per_rank=st.integers(1, 40), lanes=st.integers(1, 60), start=st.integers(0, 500),
    rank=st.integers(0, 4),
)  # fmt: skip
def test_the_lanes_of_a_rank(ranks: int, per_rank: int, lanes: int, start: int, rank: int) -> None:
    rank, size = rank % ranks, ranks * per_rank
    order = SampleOrder([100], seed=0, lanes=lanes, shuffle_window=3)
    batch = order.batch(start, size, slice_=(rank * per_rank, (rank + 1) * per_rank))
    found, used = rank_lanes(order, size, rank=rank, world_size=ranks), set((batch.images % lanes).tolist())
    assert used <= set(found)
    if size % lanes == 0:
        assert used == set(found)


def fetched(folder: Path, cache: Path, *, share: int, ahead: int, turn: int) -> list[int]:
    """The turns of the shards that come into the cache when a training in one lane has come to shard `turn`."""
    with faulty_server(folder) as server:
        index = ShardIndex.load(server.url, cache=ShardCache(cache))
        order = SampleOrder(index.shard_sizes, seed=0, lanes=1, shuffle_window=1)
        needs = partial(order.shard_needs, 0, stop=index.num_samples, lanes=range(1))
        turns = list(needs())
        with reading_ahead(index, needs, start=turns[turn].first, share=share, ahead=ahead):
            found, since, deadline = 0, time.monotonic(), time.monotonic() + 20
            while time.monotonic() < min(since + (1 if found else 20), deadline):
                if (now := len(list(cache.glob("*.tar")))) != found:
                    found, since = now, time.monotonic()
                time.sleep(0.02)
        return [i for i, need in enumerate(turns) if cache.joinpath(index.shard_cache_name(need.shard)).exists()]


def test_it_fetches_what_is_needed_next_and_no_further(folder: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    assert fetched(folder, tmp_path / "a", share=1 << 30, ahead=3, turn=0) == [0, 1, 2, 3]
    assert fetched(folder, tmp_path / "b", share=1 << 30, ahead=2, turn=4) == [4, 5, 6]
    assert fetched(folder, tmp_path / "c", share=2 * size, ahead=9, turn=1) == [1, 2]
    assert fetched(folder, tmp_path / "d", share=0, ahead=9, turn=0) == [0], "one shard in any case"


def test_ranks_share_a_small_cache_and_are_killed(folder: Path, tmp_path: Path) -> None:
    """Two ranks, room for three shards: du never sees more; a rank is killed with SIGKILL, its reader goes with it."""
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    offsets = sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("*.offsets"))
    cache, bound = tmp_path / "cache", 3 * size + offsets + 20_000
    with faulty_server(folder) as server:
        server.cut_every = 7
        options = {"bound": bound, "ranks": 2, "ranks_per_node": 2}
        ranks = [start_reading(server.url, cache, rank=i, workers=i, **options) for i in range(2)]
        victim: Rank | None = start_reading(server.url, cache, **options)
        most, deadline, helpers = 0, time.monotonic() + 60, list[int]()
        while any(rank.running() for rank in ranks) and time.monotonic() < deadline:
            if cache.exists():
                most = max(most, used_bytes(cache))
            if victim is not None and most > size + offsets and (helpers := children(victim.pid)):
                victim.kill()
                victim = None
            time.sleep(0.005)
        for i, rank in enumerate(ranks):
            rank.read_to_end(folder, rank=i, ranks=2)
    assert victim is None and size + offsets < most <= bound
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_text() for pid in helpers):
        assert time.monotonic() < deadline, "what a killed rank started has ended"
        time.sleep(0.1)


def test_a_shard_larger_than_the_cache_is_read_by_range(folder: Path, tmp_path: Path) -> None:
    with faulty_server(folder) as server:
        warned = start_reading(server.url, tmp_path / "cache", bound=30_000).read_to_end(folder)
    assert "does not fit into the cache (bound 30000 bytes" in warned and "raise data.cache_size" in warned
    assert used_bytes(tmp_path / "cache") <= 30_000


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a small disk is mounted as root")
@pytest.mark.parametrize(("size", "words"), [("160k", None), ("30k", "does not fit into the cache")])
def test_a_small_disk_is_no_end(folder: Path, tmp_path: Path, size: str, words: str | None) -> None:
    """The bound is a gigabyte, but the disk holds two shards, or none."""
    mount = f'mkdir -p "$0" && mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, str(tmp_path / "disk"))
    with faulty_server(folder) as server:
        warned = start_reading(server.url, tmp_path / "disk", prefix=prefix).read_to_end(folder)
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
        whole = {request.path for request in server.requests if sizes.get(request.path) == request.sent}
    assert (words or "") in warned and ("warning" in warned) == (words is not None)
    assert len(whole) > 5 if words is None else not whole


def test_a_cache_that_cannot_be_is_no_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with faulty_server(folder) as server:
        warned = start_reading(server.url, tmp_path / "file" / "cache").read_to_end(folder)
    assert f"cannot write to the cache {tmp_path / 'file' / 'cache'} (Not a directory)" in warned


def test_the_process_that_fetches_may_die(folder: Path, tmp_path: Path) -> None:
    with faulty_server(folder) as server:
        server.delay = 0.2  # or all may be read by the time that it is killed
        process = start_reading(server.url, tmp_path / "cache")
        while not children(process.pid):
            assert process.running()
            time.sleep(0.05)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        server.delay = 0.0
        assert "the process that fetches shards ahead has ended (-9)" in process.read_to_end(folder)


def test_what_a_node_must_keep(folder: Path) -> None:
    index = ShardIndex.load(folder)
    order = SampleOrder(index.shard_sizes, seed=0, lanes=2, shuffle_window=1)
    one = cached_set_bytes(index, order, num_nodes=1)
    assert 4 * index.num_bytes / len(index.shard_names) < one < 5 * index.num_bytes / len(index.shard_names)
    assert cached_set_bytes(index, order, num_nodes=2) == pytest.approx(one / 2, abs=1)
    wide = SampleOrder(index.shard_sizes, seed=0, lanes=64, shuffle_window=100)
    assert cached_set_bytes(index, wide, num_nodes=1) == index.num_bytes

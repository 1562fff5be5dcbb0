"""The node's cache: its bound, who goes first, and processes that are killed at any moment."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.cache import Download, Refusal, ShardCache, default_folder
from tests.long import LONG
from tests.machine import used_bytes

BLOCK = 4096


def content(number: int, *, blocks: int = 10) -> bytes:
    return bytes([number]) * (blocks * BLOCK)


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() + ".tar"


def fill(cache: ShardCache, data: bytes) -> None:
    reserved = cache.reserve(name_of(data), len(data))
    assert isinstance(reserved, Download), reserved
    with reserved:
        reserved.restart()
        reserved.write(data)
        reserved.finish().release()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """Room for three files of ten blocks."""
    return ShardCache(tmp_path / "cache", max_bytes=35 * BLOCK)


def test_files_are_read_and_the_one_used_longest_ago_goes_first(cache: ShardCache) -> None:
    data = [content(i) for i in range(5)]
    names = [name_of(d) for d in data]
    assert cache.read(names[0], 0, 10) is None and cache.find(names[0]) is None and cache.hold(names[0]) is None
    for i in range(3):
        fill(cache, data[i])
        os.utime(cache.folder / names[i], (i, i))
    assert cache.reserve(names[1], len(data[1])) is Refusal.THERE
    assert cache.read(names[0], 5, 7) == data[0][5:12]  # used: now the youngest
    assert cache.read(names[0], len(data[0]) - 2, 7) == data[0][:2]
    fill(cache, data[3])
    assert [cache.find(name) is not None for name in names] == [True, False, True, True, False]
    cache.remove(names[2])
    cache.remove(names[2])
    fill(cache, data[4])
    assert [cache.find(name) is not None for name in names] == [True, False, False, True, True]
    assert cache.put(names[4], data[4]) == cache.folder / names[4]


def test_what_is_held_stays_and_what_does_not_fit_is_refused_bytes(cache: ShardCache) -> None:
    data = [content(i) for i in range(4)]
    for d in data[:3]:
        fill(cache, d)
    holds = [cache.hold(name_of(d)) for d in data[:3]]
    assert all(holds)
    name = name_of(data[3])
    assert cache.reserve(name, len(data[3])) is Refusal.FULL and cache.put(name, data[3]) is None
    assert cache.reserve("0" * 64 + ".tar", 1 << 40) is Refusal.TOO_LARGE
    assert all(cache.find(name_of(d)) for d in data[:3]), "nothing is removed for what does not fit all the same"
    holds[1].release()
    fill(cache, data[3])
    assert [cache.find(name_of(d)) is not None for d in data] == [True, False, True, True]


def test_a_download_is_reserved_seen_and_gone_on_with(cache: ShardCache) -> None:
    data, other = content(1), content(2, blocks=28)
    name = name_of(data)
    first = cache.reserve(name, len(data))
    assert isinstance(first, Download) and first.size == 0
    first.write(data[:5000])
    assert cache.read(name, 0, 10) is None, "it does not count before it is complete"
    assert cache.read_partial(name, len(data), 4990, 10) == data[4990:5000]
    assert cache.read_partial(name, len(data), 4990, 11) is None
    assert cache.reserve(name, len(data)) is Refusal.BUSY
    assert cache.reserve(name_of(other), len(other)) is Refusal.FULL, "its whole size is reserved"
    with first:
        pass  # its process ends
    again = cache.reserve(name, len(data))
    assert isinstance(again, Download) and again.size == 5000 and b"".join(again.content()) == data[:5000]
    again.write(data[5000:])
    again.finish().release()
    assert cache.read(name, 0, len(data)) == data and len(list(cache.folder.iterdir())) == 2  # and the lock
    fill(cache, other)


def test_what_a_killed_download_left_makes_room_and_does_not_stay(cache: ShardCache) -> None:
    data, other = content(1), content(2)
    for d in (data, content(3)):
        reserved = cache.reserve(name_of(d), len(d))
        with reserved:
            reserved.write(d[:100])
    fill(cache, other)
    fill(cache, content(4, blocks=13))
    assert cache.find(name_of(other)) and len(list(cache.folder.glob("*.partial"))) == 1, "unfinished ones go first"
    left = next(cache.folder.glob("*.partial"))
    os.utime(left, (time.time() - 3600,) * 2)
    cache.trim()
    assert not left.exists() and cache.find(name_of(other))


def test_offset_files_stay_while_they_are_mapped(cache: ShardCache) -> None:
    old, new = (f"{digit * 64}.offsets" for digit in "01")
    for name in (old, new):
        assert cache.put(name, bytes(5 * BLOCK))
    for i in range(3):
        fill(cache, content(i))
    assert cache.find(old) and cache.find(new) and len(list(cache.folder.glob("*.tar"))) == 2
    os.utime(cache.folder / old, (time.time() - 3600,) * 2)
    fill(cache, content(3, blocks=14))
    assert not cache.folder.joinpath(old).exists() and cache.find(new)


def test_a_lowered_bound_and_a_stranger_s_files(cache: ShardCache) -> None:
    for i in range(3):
        fill(cache, content(i))
    (cache.folder / "notes.txt").write_text("mine")
    ShardCache(cache.folder, max_bytes=20 * BLOCK).trim()
    assert used_bytes(cache.folder) <= 20 * BLOCK and len(list(cache.folder.glob("*.tar"))) == 1
    assert (cache.folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ShardCache(tmp_path / "file" / "cache")
    assert cache.put("0" * 64 + ".offsets", b"1") is None
    for act in (cache.trim, lambda: cache.reserve("0" * 64 + ".tar", 1)):
        with pytest.raises(OSError):
            act()


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == default_folder() and default_folder().parent.parent == tmp_path


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "write", "finish", "leave", "abandon", "hold", "release", "read", "trim"]),
        st.integers(0, 5),
        st.integers(1, 12),
    ),
    max_size=60,
)


@settings(max_examples=150 if not LONG else 2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_schedule_keeps_the_bound_and_the_content(steps: list[tuple[str, int, int]], tmp_path_factory) -> None:
    cache = ShardCache(tmp_path_factory.mktemp("cache"), max_bytes=24 * BLOCK)
    data = [content(i, blocks=2 + i) for i in range(6)]
    names = [name_of(d) for d in data]
    downloads: dict[int, Download] = {}
    holds: dict[int, object] = {}
    for step, i, amount in steps:
        if step == "reserve" and i not in downloads:
            reserved = cache.reserve(names[i], len(data[i]))
            if isinstance(reserved, Download):
                assert b"".join(reserved.content()) == data[i][: reserved.size]
                downloads[i] = reserved
            else:
                assert reserved is not Refusal.BUSY and (reserved is Refusal.THERE) == (
                    cache.find(names[i]) is not None
                )
        elif step == "reserve":
            assert cache.reserve(names[i], len(data[i])) is Refusal.BUSY
        elif step == "hold" and i not in holds and (hold := cache.hold(names[i])) is not None:
            holds[i] = hold
        elif step == "release" and i in holds:
            holds.pop(i).release()
        elif step == "read":
            assert cache.read(names[i], 7, 100) in (None, data[i][7:107])
        elif step == "trim":
            cache.trim()
        elif i in downloads:
            download = downloads[i]
            if step == "write":
                download.write(data[i][download.size : download.size + amount * 1000])
            elif step == "finish" and download.size == len(data[i]):
                holds[i] = downloads.pop(i).finish()
            elif step in ("leave", "abandon"):
                with downloads.pop(i):
                    download.abandon() if step == "abandon" else None
        assert used_bytes(cache.folder) <= cache.max_bytes
        assert all(cache.find(names[k]) for k in holds), "what is held stays"
    for reserved in downloads.values():
        with reserved:
            pass
    for hold in holds.values():
        hold.release()


_HAMMER = """
import hashlib, random, sys, time
from shards.cache import Download, ShardCache

folder, seed = sys.argv[1:]
cache, pick = ShardCache(folder, max_bytes=35 * 4096), random.Random(int(seed))
data = [bytes([i]) * (8 + i % 5) * 4096 for i in range(12)]
holds = []
while True:
    d = pick.choice(data)
    name = hashlib.sha256(d).hexdigest() + ".tar"
    found = cache.read(name, 0, len(d))
    assert found is None or found == d, "other bytes than were put there"
    match cache.reserve(name, len(d)):
        case Download() as download:
            with download:
                if b"".join(download.content()) != d[:download.size]:
                    download.restart()
                while download.size < len(d):
                    download.write(d[download.size : download.size + pick.randrange(1, 9000)])
                    time.sleep(pick.choice([0, 0, 0.0005]))
                holds.append(download.finish())
        case _:
            if (hold := cache.hold(name)) is not None:
                holds.append(hold)
    while holds and pick.random() < 0.7:
        holds.pop(0).release()
    print("turn", flush=True)
"""


@pytest.fixture
def hammers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_processes_that_are_killed_at_any_moment_keep_the_bound(
    tmp_path: Path, hammers: list[subprocess.Popen[str]]
) -> None:
    """Three processes hammer one folder; every now and then one is killed and another started; du watches."""
    folder, pick = tmp_path / "cache", random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    log = (tmp_path / "log").open("w+")

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HAMMER, str(folder), str(len(hammers))]
        hammers.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment))
        return hammers[-1]

    running = [start() for _ in range(3)]
    start_time, kills, most, turns = time.monotonic(), 0, 0, 0
    wanted_kills, wanted_turns = (100, 10_000) if LONG else (8, 600)
    while kills < wanted_kills or turns < wanted_turns:
        assert time.monotonic() - start_time < 120, (kills, turns)
        turns = (tmp_path / "log").stat().st_size // len("turn\n")
        if folder.exists():
            most = max(most, used_bytes(folder))
            assert most <= 35 * BLOCK, sorted(path.name for path in folder.iterdir())
        if pick.random() < 0.02 and turns > 40 * kills:
            victim = pick.randrange(3)
            running[victim].send_signal(signal.SIGKILL)
            assert running[victim].wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
            running[victim] = start()
            kills += 1
        time.sleep(0.005)
    assert all(process.poll() is None for process in running), (tmp_path / "log").read_text()
    assert most > 20 * BLOCK
    for process in running:
        process.kill()
        process.wait()
    cache = ShardCache(folder, max_bytes=35 * BLOCK)
    for path in folder.glob("*.tar"):
        assert name_of(path.read_bytes()) == path.name, "a complete file is whole"
    for partial in folder.glob("*.partial"):
        os.utime(partial, (0, 0))
    cache.trim()
    assert not list(folder.glob("*.partial")), "nothing of the killed stays for ever"

"""Shards behind an HTTP server: the same samples as from a local folder, whatever the network does, or an error that
names the file."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shards import places
from shards.cache import ShardCache
from shards.decode import View
from shards.index import INDEX_NAME, ShardIndex
from shards.loader import ShardLoader, evaluation_batches
from shards.order import SampleOrder
from shards.places import Url
from shards.reader import SampleReader
from tests.http import FaultyServer, faulty_server, flip_byte, nginx
from tests.reading import small_shards

Stream = list[tuple[bytes, int]]  # ids and the crc32 of the pixels of every micro-batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("data"), num_images=120)


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with faulty_server(folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "20")


def loader(index: ShardIndex, **options: Any) -> ShardLoader:
    """Two and a half epochs in batches of 16."""
    order = SampleOrder(index.shard_sizes, seed=1, lanes=4, shuffle_window=10)
    values = {"seed": 0, "global_batch_size": 16, "micro_batch_size": 16, "stop": 300, **options}
    return ShardLoader(index, order, views=[View("a", 24)], **values)


def stream(index: ShardIndex, *, pause: float = 0.0, **options: Any) -> Stream:
    found = []
    for batch in loader(index, **options):
        found.append((batch["ids"].numpy().tobytes(), zlib.crc32(batch["views"]["a"].numpy().tobytes())))
        time.sleep(pause)
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> Stream:
    return stream(ShardIndex.load(folder))


def error_of(act: Callable[[], object]) -> str:
    """The one line that a user sees."""
    with pytest.raises(ValueError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def tars(server: FaultyServer) -> list[str]:
    return [request.path for request in server.requests if request.path.endswith(".tar")]


def test_the_index_and_what_it_says_are_those_of_the_folder(
    folder: Path, server: FaultyServer, cache: ShardCache
) -> None:
    local, remote = ShardIndex.load(folder), ShardIndex.load(server.url + "/", cache=cache)
    assert remote.path == Url(server.url) and remote.fingerprint == local.fingerprint
    assert str(remote.shard_path(1)) == f"{server.url}/{local.shard_names[1]}"
    everything = range(local.num_samples)
    assert remote.keys(everything) == local.keys(everything) and remote.skipped() == local.skipped() == []
    assert remote.labels(everything).tolist() == local.labels(everything).tolist()
    assert [remote.entry(id) for id in everything] == [local.entry(id) for id in everything]
    before = len(server.requests)
    again = pickle.loads(pickle.dumps(remote))
    assert again.keys(everything) == local.keys(everything) and len(server.requests) == before, "offsets are cached"


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_the_stream_is_the_local_one(
    folder: Path, cache: ShardCache, expected: Stream, options: dict[str, Any]
) -> None:
    with nginx(folder) as server:
        index = ShardIndex.load(server.url, cache=cache)
        SampleReader(index).read(index.entry(0))  # this process's client must not be taken along by a fork
        assert stream(index, pause=0.03, **options) == expected
        sizes = dict(zip(index.shard_names, index.shard_bytes.tolist(), strict=True))
        whole = [request.path for request in server.requests() if sizes.get(request.path) == request.sent]
        assert len(set(whole)) == len(whole) > 0, "no shard is fetched twice"
        for _ in range(20):  # on a busy machine a stream may end before the last shard has come
            if all(cache.find(index.shard_cache_name(shard)) for shard in range(len(sizes))):
                break
            assert stream(index, pause=0.1) == expected
        before = len(server.requests())
        assert stream(index) == expected
        assert len(server.requests()) == before, "a run with all shards in the cache reads nothing else"


def test_evaluation_reads_every_sample_once(folder: Path, server: FaultyServer, cache: ShardCache) -> None:
    def read(index: ShardIndex) -> list[Any]:
        view = View("center", 24, kind="center")
        return [(b["ids"].tolist(), b["images"].sum()) for b in evaluation_batches(index, view=view, batch_size=32)]

    assert read(ShardIndex.load(server.url, cache=cache)) == read(ShardIndex.load(folder))


def test_without_reading_ahead_only_what_is_read_is_fetched(
    server: FaultyServer, cache: ShardCache, expected: Stream
) -> None:
    index = ShardIndex.load(server.url, cache=cache)
    assert stream(index, stop=32, read_ahead=False) == expected[:2]
    assert len(tars(server)) == 32 and not list(cache.folder.glob("*.tar"))


def test_cut_connections_change_nothing(server: FaultyServer, cache: ShardCache, expected: Stream) -> None:
    server.cut_every = 3
    assert stream(ShardIndex.load(server.url, cache=cache), num_workers=1) == expected
    cut = [request for request in server.requests if request.stop and request.sent < request.stop - request.start]
    assert len(cut) > 1  # how many depends on who asks first: the process that fetches ahead, or the worker by range


def test_a_server_that_knows_no_ranges(server: FaultyServer, cache: ShardCache, expected: Stream) -> None:
    server.ranges = False
    index = ShardIndex.load(server.url, cache=cache)
    assert stream(index) == expected
    assert len(tars(server)) <= 3 * len(index.shard_names), "what comes whole is kept"


def test_a_server_that_restarts(server: FaultyServer, cache: ShardCache, expected: Stream) -> None:
    index = ShardIndex.load(server.url, cache=cache)
    server.delay = 0.01
    threading.Timer(0.3, server.stop).start()
    threading.Timer(1.5, server.start).start()
    assert stream(index) == expected


def test_a_server_that_stays_away(server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "1.5")
    index = ShardIndex.load(server.url, cache=cache)
    index.keys(range(index.num_samples))  # the offset files
    server.stop()
    start = time.monotonic()
    message = error_of(lambda: stream(index))
    assert re.match(rf"{server.url}/shard-0000\d\d.tar: .*[Cc]onnect.*tried for 1 s", message)
    message = error_of(lambda: ShardIndex.load(server.url, cache=cache))
    assert re.match(rf"{server.url}/{INDEX_NAME}: .*[Cc]onnect.*tried for 1 s", message)
    assert time.monotonic() - start < 10


def test_a_server_that_says_nothing(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers; no read waits for it longer than its time."""
    monkeypatch.setattr(places, "_SECONDS", 0.3)
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "1")
    server.delay = 60.0
    start = time.monotonic()
    message = error_of(lambda: ShardIndex.load(server.url))
    assert re.match(rf"{server.url}/{INDEX_NAME}: .*Timeout.*tried for 1 s", message)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("times", [2, 1000])
def test_a_wrong_byte_of_a_sample(
    server: FaultyServer, cache: ShardCache, expected: Stream, times: int, folder: Path
) -> None:
    index = ShardIndex.load(server.url, cache=cache)
    entry = next(index.entry(id) for id in range(index.num_samples) if index.entry(id).shard == 3)
    name = index.shard_names[3]
    server.damage = flip_byte(name, entry.offset + entry.size // 2, times=times)
    if times == 2:
        assert stream(index) == expected
        return
    message = error_of(lambda: stream(index))
    assert f"{server.url}/{name}" in message and ("crc32" in message or "sha256" in message)
    reader, local = SampleReader(index), SampleReader(ShardIndex.load(folder))
    assert "crc32" in error_of(lambda: reader.read(entry)) and repr(entry.key) in error_of(lambda: reader.read(entry))
    other = index.entry(0)
    assert reader.read(other) == local.read(other)
    assert not cache.find(index.shard_cache_name(3))


@pytest.mark.parametrize("times", [2, 1000])
def test_a_wrong_byte_between_samples(server: FaultyServer, cache: ShardCache, expected: Stream, times: int) -> None:
    """No sample shows it, so that only the shard's sha256 does."""
    index = ShardIndex.load(server.url, cache=cache)
    server.damage = flip_byte(index.shard_names[3], int(index.shard_bytes[3]) - 10, times=times)
    if times == 2:
        assert stream(index, pause=0.1) == expected and cache.find(index.shard_cache_name(3))
    else:
        message = error_of(lambda: stream(index, pause=0.1))
        assert f"{server.url}/{index.shard_names[3]} is damaged: its sha256" in message


@pytest.mark.parametrize("file", [INDEX_NAME, "shard-000002.offsets"])
def test_a_wrong_byte_of_what_describes_the_shards(
    server: FaultyServer, cache: ShardCache, expected: Stream, file: str
) -> None:
    server.damage = flip_byte(file, 300, times=2)
    index = ShardIndex.load(server.url, cache=cache)
    assert stream(index) == expected
    # Two damaged answers and a good one; another process may have asked for it at the same time.
    assert sum(request.path == file for request in server.requests) in (3, 4)
    server.damage = flip_byte(file, 300, times=1000)
    for path in cache.folder.glob("*.offsets"):
        path.write_bytes(path.read_bytes()[:-1])  # and the disk is bad
    assert f"{server.url}/{file}" in error_of(lambda: stream(ShardIndex.load(server.url, cache=cache)))


def test_a_damaged_copy_in_the_cache_is_fetched_again(
    server: FaultyServer, cache: ShardCache, expected: Stream, capfd: pytest.CaptureFixture[str]
) -> None:
    index = ShardIndex.load(server.url, cache=cache)
    assert stream(index, pause=0.1) == expected
    path = cache.find(index.shard_cache_name(2))
    assert path is not None
    path.write_bytes(bytes(path.stat().st_size))
    assert stream(index) == expected
    assert f"the copy of {server.url}/{index.shard_names[2]} in {cache.folder} was damaged" in capfd.readouterr().err


def test_a_shard_that_changed_its_size(server: FaultyServer, cache: ShardCache) -> None:
    index = ShardIndex.load(server.url, cache=cache)
    name = index.shard_names[3]
    server.damage = lambda path, start, data: data[: max(0, 5000 - start)] if path == name else data
    assert f"{server.url}/{name}" in error_of(lambda: stream(index, pause=0.1))
    server.ranges = False
    assert f"{server.url}/{name}" in error_of(lambda: stream(index, pause=0.1))


@pytest.mark.parametrize(("status", "words"), [(403, "refused .*check your credentials"), (404, "not found")])
def test_what_is_refused_or_missing_is_said_at_once(
    server: FaultyServer, cache: ShardCache, status: int, words: str
) -> None:
    start = time.monotonic()
    index = ShardIndex.load(server.url, cache=cache)
    index.keys(range(index.num_samples))
    server.status[index.shard_names[2]] = status
    message = error_of(lambda: stream(index))
    assert message.startswith(f"{server.url}/{index.shard_names[2]}: ") and re.search(words, message)
    server.status["shard-000001.offsets"] = status
    message = error_of(lambda: ShardIndex.load(server.url, cache=ShardCache(cache.folder / "other")).keys(range(120)))
    assert f"{server.url}/shard-000001.offsets: " in message and re.search(words, message)
    server.status[INDEX_NAME] = status
    message = error_of(lambda: ShardIndex.load(server.url, cache=cache))
    wanted = f"{server.url}/{INDEX_NAME}: refused" if status == 403 else f"{server.url} holds no {INDEX_NAME}: make"
    assert message.startswith(wanted)
    assert time.monotonic() - start < 5


def test_a_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALER_REMOTE_SECONDS", "0.1")  # where there is no name service at all
    assert "http://no-such-host.invalid/a/index.json: " in error_of(
        lambda: ShardIndex.load("http://no-such-host.invalid/a")
    )


def test_secrets_are_used_but_not_told(server: FaultyServer, cache: ShardCache) -> None:
    secret = server.url.replace("//", "//user:password@") + "/?signature=abc"
    index = ShardIndex.load(secret, cache=cache)
    assert index.path.text.startswith("http://user:password@") and (index.path / "b").text.endswith("/b?signature=abc")
    told = f"{index.path} {index!r} {index.path!r} {index.shard_path(0)} {index.path.parent} {index.path.name}"
    server.status |= {INDEX_NAME: 403, "shard-000001.offsets": 500}
    os.environ["SCALER_REMOTE_SECONDS"] = "0.1"
    told += error_of(lambda: ShardIndex.load(secret, cache=cache)) + error_of(lambda: index.keys(range(120)))
    assert not re.search("password|signature|abc", told)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['aiohttp'] = None; from shards.index import ShardIndex; ShardIndex.load('http://a/b')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert re.search(r"ValueError: http://a/b: .*aiohttp.*pip install 'scaler\[remote\]'", result.stderr)

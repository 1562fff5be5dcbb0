"""Shards as a source of images: their samples, wherever they lie, to be laid out and shuffled anew."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.image_header import DecodeError
from shards.places import Location, RangeIgnoredError, folder_at
from shards.retry import retry
from shards.sources import Source
from shards.storage import printable

_OPEN_SHARDS = 256
_THREADS = 8  # reads at a time from far away
_FINAL = (FileNotFoundError, PermissionError, RangeIgnoredError)  # no waiting helps
_MAX_JSON = 1 << 20


class _Ahead:
    """Calls `fetch(number)` in threads, for a few numbers ahead of the one that is asked for."""

    def __init__(
        self, pool: ThreadPoolExecutor, fetch: Callable[[int], bytes | bytearray], numbers: Sequence[int]
    ) -> None:
        self._pool, self._fetch = pool, fetch
        self._waiting = iter(numbers)
        self._coming: deque[tuple[int, Future[bytes | bytearray]]] = deque()
        self._fill_up()

    def get(self, number: int) -> bytes | bytearray:
        """What was fetched for `number`; those before it are dropped."""
        while True:
            found, future = self._coming.popleft()
            self._fill_up()
            if found == number:
                return future.result()

    def _fill_up(self) -> None:
        for number in islice(self._waiting, 2 * _THREADS - len(self._coming)):
            self._coming.append((number, self._pool.submit(self._fetch, number)))


@dataclass(kw_only=True)
class Samples(Source):
    """The samples of tars; three more columns (int64 [n]) over them, and the crc32 of each image (uint32 [n])."""

    keys: list[str]  # KEY.ending
    places: list[Location]  # of the tars
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    json: NDArray[np.int64]  # [n, 2]: offset and size of the JSON member, size 0: none
    _files: dict[int, int] = field(default_factory=dict)  # shard → descriptor, the one used longest ago first
    _ahead: _Ahead | None = None

    @property
    def names(self) -> list[str]:
        """See `Source.names`."""
        return self.keys

    def read(self, number: int, into: memoryview) -> None:
        """See `Source.read`."""
        if self._ahead is not None:
            into[:] = self._ahead.get(number)
            return
        place = self.places[self.shards[number]]
        if isinstance(place, Path):
            self._fill(number, int(self.offsets[number]), into)
            self._prove(number, into)
        else:
            into[:] = self._fetch(number)

    @contextlib.contextmanager
    def reading(self, numbers: Sequence[int]) -> Iterator[None]:
        """See `Source.reading`; where samples lie far away, several are fetched ahead at a time."""
        if all(isinstance(place, Path) for place in self.places):
            yield
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            self._ahead = _Ahead(pool, self._fetch, numbers)
            try:
                yield
            finally:
                self._ahead = None
                pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, number: int) -> bytearray:
        """An image from far away; what was damaged on its way is fetched again."""
        content = bytearray(int(self.sizes[number]))

        def read() -> None:
            self._fill_once(number, int(self.offsets[number]), memoryview(content))
            self._prove(number, content)

        retry(read, final=_FINAL)
        return content

    def _fill(self, number: int, offset: int, into: memoryview) -> None:
        """Read from byte `offset` of the shard of an image on; `ValueError` naming it when that cannot be done."""
        if not isinstance(place := self.places[self.shards[number]], Path):
            retry(lambda: self._fill_once(number, offset, into), final=_FINAL)
            return
        try:
            self._fill_once(number, offset, into)
        except OSError as error:
            raise ValueError(f"cannot read shard {place}: {error.strerror or error}") from error

    def _fill_once(self, number: int, offset: int, into: memoryview) -> None:
        shard = int(self.shards[number])
        place = self.places[shard]
        if not isinstance(place, Path):
            folder_at(place.parent).read_into(place.name, offset, into)
        elif (filled := os.preadv(self._open(shard, place), (into,), offset)) != len(into):
            raise ValueError(f"shard {place} ends at byte {offset + filled}; copy it again from where it came")

    def _prove(self, number: int, content: bytes | bytearray | memoryview) -> None:
        if zlib.crc32(content) != self.crc32[number]:
            raise ValueError(
                f"shard {self.places[self.shards[number]]} is damaged: {printable(self.keys[number])!r} is not what it "
                "was when the shard was indexed; copy it again from where it came"
            )

    def _open(self, shard: int, path: Path) -> int:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            while len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_ahead": None}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def about(self, number: int) -> dict[str, Any]:
        """See `Source.about`."""
        offset, size = self.json[number].tolist()
        if size > _MAX_JSON:
            raise DecodeError(f"its JSON member has {size} bytes, at most {_MAX_JSON} are read")
        content = bytearray(size)
        self._fill(number, offset, memoryview(content))
        try:
            found = json.loads(content) if size else {}
        except (ValueError, RecursionError) as error:
            raise DecodeError("its JSON member is no JSON") from error
        if not isinstance(found, dict):
            raise DecodeError("its JSON member is no object")
        return found

"""Bytes of samples, read from the tars by position.

On a local disk each process keeps a bounded number of shards open. Reads name their position (`pread`), so that
descriptors inherited over a fork share nothing that matters; over a spawn they are left behind and opened again.

Shards of a URL are read from the node's cache, where shards/ahead.py puts them ahead of need. Until one is there its
samples are read from as much of it as has arrived, or by range over the network. Whatever it is, it counts only if the
sample's crc32 is right: networks and the disks of nodes err.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from shards.index import Entry, ShardIndex, Span
from shards.places import Folder, RangeIgnoredError, folder_at
from shards.retry import retry

_OPEN_SHARDS = 256


class SampleReader:
    """Reads samples of `index`. The first time that a local shard is opened its size is compared with the index."""

    def __init__(self, index: ShardIndex, *, open_shards: int = _OPEN_SHARDS) -> None:
        self.index, self.open_shards = index, open_shards
        self.is_local = isinstance(index.shards_at, Path)
        self._files: dict[int, int] = {}  # shard → file descriptor, the one used longest ago first
        self._remote: Folder | None = None

    def read(self, sample: Span | Entry) -> bytes:
        """The image file of one sample.

        Raises:
            ValueError: the shard is missing, refused, was cut off, cannot be read, or damaged at its source; in one
                line that names the file.
        """
        return self._read_local(sample) if self.is_local else self._read_remote(sample)

    def close(self) -> None:
        """Close all files; the next read opens what it needs."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_local(self, sample: Span | Entry) -> bytes:
        try:
            data = os.pread(self._open(sample.shard), sample.size, sample.offset)
        except OSError as error:
            path = self.index.shard_path(sample.shard)
            raise ValueError(f"cannot read shard {path}: {error.strerror}") from error
        if len(data) != sample.size:
            path, key = self.index.shard_path(sample.shard), self.index.entry(sample.id).key
            raise ValueError(
                f"shard {path} was cut off while it was in use: {key!r} should be bytes {sample.offset} to "
                f"{sample.offset + sample.size}, only {len(data)} of them are there"
            )
        return data

    def _open(self, shard: int) -> int:
        file = self._files.pop(shard, None)
        if file is None:
            self.index.check_shard(shard, full=False)
            while len(self._files) >= self.open_shards:
                os.close(self._files.pop(next(iter(self._files))))
            file = os.open(str(self.index.shard_path(shard)), os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = file
        return file

    def _read_remote(self, sample: Span | Entry) -> bytes:
        data = self._read_cached(sample)  # what nearly all reads of a long run do
        return retry(lambda: self._read_cached(sample) or self._read_range(sample)) if data is None else data

    def _read_cached(self, sample: Span | Entry) -> bytes | None:
        cache, name = self.index.cache, self.index.shard_cache_name(sample.shard)
        if cache is None:
            return None
        data = cache.read(name, sample.offset, sample.size)
        if data is None:
            data = cache.read_partial(name, int(self.index.shard_bytes[sample.shard]), sample.offset, sample.size)
            return data if data is not None and zlib.crc32(data) == sample.crc32 else None
        if zlib.crc32(data) == sample.crc32:
            return data
        path = self.index.shard_path(sample.shard)
        print(f"warning: the copy of {path} in {cache.folder} was damaged and is removed", file=sys.stderr, flush=True)
        cache.remove(name)
        return None

    def _read_range(self, sample: Span | Entry) -> bytes:
        if self._remote is None:
            self._remote = folder_at(self.index.shards_at)
        name = self.index.shard_names[sample.shard]
        try:
            data = self._remote.read_range(name, sample.offset, sample.size)
        except RangeIgnoredError as error:
            self._keep(sample.shard, error.content)
            data = error.content[sample.offset : sample.offset + sample.size]
        if zlib.crc32(data) != sample.crc32:
            path, key = self.index.shard_path(sample.shard), self.index.entry(sample.id).key
            raise ValueError(
                f"shard {path}: bytes {sample.offset} to {sample.offset + sample.size} ({key!r}) came with another "
                "crc32 than the index says, also when asked for again; copy the shard again to where it lies, or run "
                f"`scaler index {self.index.path}` if it was changed on purpose"
            )
        return data

    def _keep(self, shard: int, content: bytes) -> None:
        """A server that knows no ranges has sent the whole shard: the next sample need not fetch it again."""
        record, cache = self.index.shard_record(shard), self.index.cache
        if cache is not None and hashlib.sha256(content).hexdigest() == record.sha256:
            cache.put(self.index.shard_cache_name(shard), content)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_remote": None}

    def __del__(self) -> None:
        self.close()

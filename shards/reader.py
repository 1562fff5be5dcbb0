"""Bytes of samples, read from the tars by position.

Each process keeps a bounded number of shards open. Reads name their position (`pread`), so that descriptors inherited
over a fork share nothing that matters; over a spawn they are left behind and opened again.
"""

from __future__ import annotations

import os
from typing import Any

from shards.index import Entry, ShardIndex

_OPEN_SHARDS = 256


class SampleReader:
    """Reads samples of `index`. The first time a shard is opened its size is compared with the index."""

    def __init__(self, index: ShardIndex, *, open_shards: int = _OPEN_SHARDS) -> None:
        self.index, self.open_shards = index, open_shards
        self._files: dict[int, int] = {}  # shard → file descriptor, the one used longest ago first

    def read(self, entry: Entry) -> bytes:
        """The image file of one sample.

        Raises:
            ValueError: the shard is missing, was cut off or cannot be read; the message names the file.
        """
        path = self.index.shard_path(entry.shard)
        try:
            data = os.pread(self._open(entry.shard), entry.size, entry.offset)
        except OSError as error:
            raise ValueError(f"cannot read shard {path}: {error.strerror}") from error
        if len(data) != entry.size:
            raise ValueError(
                f"shard {path} was cut off while it was in use: {entry.key!r} should be bytes {entry.offset} to "
                f"{entry.offset + entry.size}, only {len(data)} of them are there"
            )
        return data

    def close(self) -> None:
        """Close all files; the next read opens what it needs."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, shard: int) -> int:
        file = self._files.pop(shard, None)
        if file is None:
            self.index.check_shard(shard, full=False)
            while len(self._files) >= self.open_shards:
                os.close(self._files.pop(next(iter(self._files))))
            file = os.open(self.index.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        self.close()

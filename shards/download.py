"""A remote shard into the node's cache: in parts, each tried again until it comes, verified by the shard's sha256."""

from __future__ import annotations

import hashlib

from shards.cache import Download, Hold
from shards.index import INDEX_NAME, ShardRecord
from shards.places import Folder, RangeIgnoredError
from shards.retry import retry

_PART = 4 << 20  # bytes of one request; a cut connection loses at most so many
_SMALLEST_PART = 64 << 10  # for networks so slow that a larger one would not come in time
_ATTEMPTS = 3  # at a whole shard


def download(reserved: Download, folder: Folder, record: ShardRecord) -> Hold:
    """Fetch the shard `record` of `folder` into its place in the cache, going on where an earlier download stopped.

    Raises:
        ValueError: it is missing, refused, shorter than the index says or has another sha256; its cause is an
            `OSError` where it could not be fetched.
        OSError: the cache's disk is full.
    """
    place = folder.location / record.name
    with reserved:
        try:
            for _ in range(_ATTEMPTS):
                if _fill(reserved, folder, record) == record.sha256:
                    return reserved.finish()
                reserved.restart()
        except OSError:
            reserved.abandon()  # it may be what fills the disk
            raise
        reserved.abandon()
    raise ValueError(
        f"shard {place} is damaged: its sha256 is not the one in {INDEX_NAME}, after {_ATTEMPTS} downloads; copy it "
        f"again to where it lies, or run `scaler index {folder.location}` if it was changed on purpose"
    )


def _fill(reserved: Download, folder: Folder, record: ShardRecord) -> str:
    """Fetch what is not there yet; the sha256 of it all."""
    digest = hashlib.sha256()
    for part in reserved.content():
        digest.update(part)
    size = _PART
    while (rest := record.num_bytes - reserved.size) > 0:
        data = _fetch(folder, record, start=reserved.size, size=min(size, rest))
        digest.update(data)
        reserved.write(data)
        if len(data) < min(size, rest):
            size = len(data)  # a slow network
    return digest.hexdigest()


def _fetch(folder: Folder, record: ShardRecord, *, start: int, size: int) -> bytes:
    """The shard's bytes from `start` on: `size`, fewer where the network is slow, all where ranges are ignored."""

    def read() -> bytes:
        nonlocal size
        try:
            return folder.read_range(record.name, start, size)
        except RangeIgnoredError as error:
            if len(error.content) != record.num_bytes:
                place = folder.location / record.name
                raise ValueError(
                    f"shard {place} has changed: {len(error.content)} bytes, {INDEX_NAME} says {record.num_bytes}"
                ) from None
            return error.content[start:]
        except TimeoutError:
            size = min(size, max(size // 2, _SMALLEST_PART))
            raise

    return retry(read)

"""Writes one shard: reads its files, looks at their headers, lays them out as a tar, and keeps the offsets."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.folder import image_extension
from shards.image_header import DecodeError, inspect
from shards.offsets import Sample, Skipped, offset_path, pack_offsets, read_header
from shards.storage import atomic_file, printable, write_all, write_atomic
from shards.tar import BLOCK, END, padded, ustar_header

MAX_IMAGE_BYTES = 1 << 30
_WRITE_BYTES = 4 << 20


@dataclass(frozen=True)
class SourceFile:
    """One image to write: its path below the source, its size when it was listed (-1: unknown), its key and class."""

    path: str
    size: int
    key: str
    label: int


@dataclass(frozen=True)
class ShardTask:
    """A shard to write and the files that belong in it, in order."""

    path: Path
    files: list[SourceFile]


@dataclass(frozen=True)
class WrittenShard:
    """What a shard has become; `num_samples` may be 0."""

    path: Path
    num_bytes: int
    num_samples: int
    sha256: str
    skipped: list[Skipped]


def sample_bytes(sizes: NDArray[np.int64], *, label: bool, json_member: bool) -> NDArray[np.int64]:
    """The bytes that images of `sizes` bytes (int64 [n]) take in a shard, headers and padding included: int64 [n]."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + 2 * BLOCK * (label + json_member)


def finished_shard(path: Path) -> WrittenShard | None:
    """The shard at `path` if an earlier run finished it: its offset file is written last."""
    try:
        header = read_header(offset_path(path))
        size = path.stat().st_size
    except (ValueError, OSError):
        return None
    if header["shard"] != path.name or header["bytes"] != size:
        return None
    return WrittenShard(path, size, header["samples"], header["sha256"], header["skipped"])


def write_shard(
    task: ShardTask, *, source: str, json_member: bool, decode_check: bool, max_pixels: int
) -> WrittenShard:
    """Write a shard and then its offset file. Files that are no usable images are left out, with the reason."""
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    with atomic_file(task.path) as descriptor:
        archive = _Archive(descriptor)
        for file in task.files:
            try:
                data = _read(os.path.join(source, file.path), size=file.size)
                info = inspect(data, max_pixels=max_pixels)
                if decode_check:
                    _check_decodes(data, max_pixels=max_pixels)
            except DecodeError as error:
                skipped.append((printable(file.path), str(error)))
                continue
            extension = image_extension(file.path)
            offset = archive.add(f"{file.key}.{extension}", data)
            if file.label >= 0:
                archive.add(f"{file.key}.cls", b"%d" % file.label)
            if json_member:
                about = {"path": file.path, "width": info.width, "height": info.height}
                archive.add(f"{file.key}.json", json.dumps(about).encode())
            crc32 = zlib.crc32(data)
            samples.append(Sample(file.key, extension, offset, len(data), file.label, source=file.path, crc32=crc32))
        num_bytes, sha256 = archive.finish()
    offsets = pack_offsets(samples, shard_name=task.path.name, num_bytes=num_bytes, sha256=sha256, skipped=skipped)
    write_atomic(offset_path(task.path), offsets)
    return WrittenShard(task.path, num_bytes, len(samples), sha256, skipped)


class _Archive:
    """A tar going to a descriptor in large writes, and its sha256."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._parts: list[bytes] = []
        self._position = 0
        self._written = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the position of its first byte."""
        start = self._position + BLOCK
        self._parts += (ustar_header(name, size=len(data)), data, bytes(-len(data) % BLOCK))
        self._position = start + padded(len(data))
        if self._position - self._written > _WRITE_BYTES:
            self._flush()
        return start

    def finish(self) -> tuple[int, str]:
        """End the archive; its size and sha256."""
        self._parts.append(END)
        self._position += len(END)
        self._flush()
        return self._position, self._digest.hexdigest()

    def _flush(self) -> None:
        block = b"".join(self._parts)
        self._digest.update(block)
        write_all(self._descriptor, block)
        self._parts.clear()
        self._written = self._position


def _read(path: str, *, size: int) -> bytes:
    """The bytes of a source file that was `size` bytes long when the plan was made.

    `DecodeError` with the reason when it cannot be used, `ValueError` when it is not the file that was planned with.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe named .jpg must not stop us
    except OSError as error:
        raise _read_error(path, error, size=size) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError("not a regular file")
        if status.st_size != size:
            raise _changed(path)
        if size > MAX_IMAGE_BYTES:
            raise DecodeError(f"{size} bytes is above the limit of {MAX_IMAGE_BYTES} for one image")
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
    except OSError as error:
        raise _read_error(path, error, size=size) from error
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise _changed(path)
    return data


def _read_error(path: str, error: OSError, *, size: int) -> ValueError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and size >= 0:
        return _changed(path)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ValueError(f"cannot read {printable(path)}: {error.strerror}; run again to continue")
    return DecodeError(f"unreadable: {error.strerror}")


def _changed(path: str) -> ValueError:
    return ValueError(
        f"{printable(path)} has changed since the conversion began; leave the source alone while it runs, delete the "
        "destination and convert again"
    )


def _check_decodes(data: bytes, *, max_pixels: int) -> None:
    import torch

    from shards.decode import View, decode_views  # here, since torch takes seconds to import and few ask for this

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    view = View(name="check", size=8, kind="center")
    decode_views(data, views=[view], seed=0, epoch=0, sample_id=0, max_pixels=max_pixels)

"""What images come from: a folder, a list of files, or other shards (shards/folder.py, filelist.py, shardlist.py).

A source is listed once, when a conversion is planned. Its columns go to the worker processes, which read the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.image_header import DecodeError
from shards.offsets import Skipped
from shards.storage import printable

try:
    from shards import _files  # type: ignore[attr-defined]
except ImportError:  # no compiler, or not for this processor
    _files = None

_SPARE = bytearray(1)  # a file that has grown since it was listed shows by one byte that lands here


def look_at_files(folder: str | Path, names: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes in bytes and times of the last change in nanoseconds, int64 [n] each, of the files `names` of a folder.

    Links are followed; -1 and 0 for what is no regular file, or cannot be looked at.
    """
    sizes, times = np.full(len(names), -1, dtype=np.int64), np.zeros(len(names), dtype=np.int64)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _files is not None:
            _files.look_at_files(descriptor, names, sizes, times)
            return sizes, times
        for i, name in enumerate(names):
            with contextlib.suppress(OSError):
                facts = os.stat(name, dir_fd=descriptor)
                if stat.S_ISREG(facts.st_mode):
                    sizes[i], times[i] = facts.st_size, facts.st_mtime_ns
    finally:
        os.close(descriptor)
    return sizes, times


@dataclass(kw_only=True)
class Source(ABC):
    """Images to convert, in the order that they have without shuffling; columns over the n of them.

    Attributes:
        paths: relative, what they are called in messages and offset files.
        sizes: int64 [n] in bytes, -1 where a file cannot be looked at (a broken link).
        labels: int64 [n], -1 for none.
        class_names: what the labels count; empty without labels.
        digest: of all that makes this source what it is; another one when a file was changed.
        rejected: images and folders that cannot be taken, with the reason.
        ignored: what is there and is no image.
    """

    paths: list[str]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: list[str]
    digest: str
    rejected: list[Skipped]
    ignored: list[Skipped]

    @property
    def names(self) -> list[str]:
        """KEY.ending of each image, as keys and endings are made from them."""
        return self.paths

    @abstractmethod
    def read(self, number: int, into: memoryview) -> None:
        """Fill `into`, which is as long as image `number` was when it was listed.

        Raises:
            DecodeError: it cannot be used, and is to be left out.
            ValueError: it is not what was listed.
        """

    def read_many(
        self,
        numbers: Sequence[int],
        room: memoryview,
        begins: NDArray[np.int64],
        sizes: NDArray[np.int64],
        *,
        max_pixels: int,
    ) -> tuple[list[int], list[bool]]:
        """Read images to `room` at `begins` (int64 [n]; `sizes` likewise), as far as that is faster than one by one.

        It stops before the first with which something is wrong. For each that was read: its crc32, and whether its
        header is certain to be a sound one of at most `max_pixels`.
        """
        return [], []

    def reading(self, numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """A block in which these images, no others, are read, in this order."""
        return contextlib.nullcontext()

    def about(self, number: int) -> dict[str, Any]:
        """What the source's own JSON says about an image; `DecodeError` when it is no JSON object."""
        return {}


@dataclass(kw_only=True)
class Files(Source):
    """Image files below the folder `root`."""

    root: str

    def read_many(
        self,
        numbers: Sequence[int],
        room: memoryview,
        begins: NDArray[np.int64],
        sizes: NDArray[np.int64],
        *,
        max_pixels: int,
    ) -> tuple[list[int], list[bool]]:
        """See `Source.read_many`."""
        if _files is None:
            return [], []
        crc32, sound = np.empty(len(numbers), dtype=np.uint32), np.empty(len(numbers), dtype=np.bool_)
        paths = [self.paths[number] for number in numbers]
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            count = _files.read_files(folder, paths, room, begins, sizes, crc32, sound, max_pixels)
        finally:
            os.close(folder)
        return crc32[:count].tolist(), sound[:count].tolist()

    def read(self, number: int, into: memoryview) -> None:
        """See `Source.read`."""
        path = f"{self.root}/{self.paths[number]}"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe named .jpg must not stop us
        except OSError as error:
            raise _read_error(path, error, known=self.sizes[number] >= 0) from error
        try:
            if os.readv(descriptor, (into, _SPARE)) != len(into) or not into:
                self._look_again(descriptor, number, into)
        except OSError as error:
            raise _read_error(path, error, known=self.sizes[number] >= 0) from error
        finally:
            os.close(descriptor)

    def _look_again(self, descriptor: int, number: int, into: memoryview) -> None:
        """A file that was not read whole at once: an empty or strange one, an interrupted read, or a changed file."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError("not a regular file")
        if status.st_size != self.sizes[number]:
            raise _changed(f"{self.root}/{self.paths[number]}")
        os.lseek(descriptor, 0, os.SEEK_SET)
        while into and (count := os.readv(descriptor, (into,))):
            into = into[count:]
        if into:
            raise _changed(f"{self.root}/{self.paths[number]}")


def _read_error(path: str, error: OSError, *, known: bool) -> ValueError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and known:
        return _changed(path)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ValueError(f"cannot read {printable(path)}: {error.strerror}; run again to continue")
    return DecodeError(f"unreadable: {error.strerror}")


def _changed(path: str) -> ValueError:
    return ValueError(
        f"{printable(path)} has changed since the conversion began; leave the source alone while it runs, delete the "
        "destination and convert again"
    )

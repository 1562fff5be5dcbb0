"""A tar on its way out: aligned buffers that are filled in place, hashed, and written by a thread.

Images are read straight into the buffer in which they are written, so that no byte is copied in between. On Linux a
local shard goes to the disk past the page cache: that saves a fifth of the time, and a conversion of terabytes evicts
nobody's files from memory. What the thread does is waiting, so one process still needs one core.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from shards.keys import NAME_BYTES, PREFIX_BYTES, split_name
from shards.places import Location, folder_at
from shards.storage import atomic_file, write_all
from shards.tar import BLOCK, END, padded, ustar_header

_BUFFER_BYTES = 1 << 20
_ALIGNMENT = 4096  # of addresses, positions and lengths, for writes past the page cache
_NUM_BUFFERS = 3  # one being filled, one being written, one waiting
_idle: list[memoryview] = []  # buffers of archives that are done: the system takes long to give memory

# Where a ustar header has what changes from member to member.
_NAME, _SIZE, _SUM, _FOLDER = slice(0, 100), slice(124, 135), slice(148, 154), slice(345, 345 + PREFIX_BYTES)
_SHIFTS = 3 * np.arange(10, -1, -1)
_BLANK = np.frombuffer(ustar_header("", size=0), dtype=np.uint8).copy()
_BLANK[_SIZE] = _BLANK[_SUM] = 0
_BLANK_SUM = int(_BLANK.sum())


class Archive:
    """A tar being written with `write`, which gets aligned pieces and at last a rest of any length."""

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int] | None] = SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._free.put(_idle.pop() if _idle else _new_buffer(_BUFFER_BYTES))
        self._buffer = self._free.get()
        self._start = 0  # position in the archive at which the buffer begins
        self._end = 0  # bytes of the buffer in use
        self._digest = hashlib.sha256()
        self._hashed = 0  # bytes of the buffer that the digest has seen
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, args=(write,), daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """Bytes of the archive so far: where the next member's header goes."""
        return self._start + self._end

    def room(self, num_bytes: int) -> memoryview:
        """What comes next in the archive, to be filled: whole blocks, at least `num_bytes` of them.

        It counts when `advance` is called; until then it is as it was.
        """
        if self._end + num_bytes > len(self._buffer):
            self._flush(num_bytes)
        return self._buffer[self._end :]

    def advance(self, num_bytes: int) -> None:
        """The first `num_bytes` of the `room` are filled."""
        self._end += num_bytes

    def add(self, name: str, content: bytes | bytearray) -> int:
        """Append a whole member; the position of its contents."""
        size, end = len(content), BLOCK + padded(len(content))
        room = self.room(end)
        room[:BLOCK] = ustar_header(name, size=size)
        room[BLOCK : BLOCK + size] = content
        room[BLOCK + size : end] = bytes(end - BLOCK - size)
        self.advance(end)
        return self.position - end + BLOCK

    def finish(self) -> tuple[int, str]:
        """End the archive and wait until all is written; its size and sha256."""
        self.room(len(END))[: len(END)] = END
        self.advance(len(END))
        self._digest.update(self._buffer[self._hashed : self._end])
        self._full.put((self._buffer, self._end))
        self.close()
        if self._error is not None:
            raise self._error
        return self.position, self._digest.hexdigest()

    def close(self) -> None:
        """Wait for what has been handed to the thread, and end it."""
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()
            while not self._free.empty():
                _idle.append(self._free.get())

    def _flush(self, wanted: int) -> None:
        """Hand over whole blocks; the rest moves to the next buffer, of which at least `wanted` bytes are free."""
        self._digest.update(self._buffer[self._hashed : self._end])
        whole = self._end // _ALIGNMENT * _ALIGNMENT
        rest = self._end - whole
        following = self._free.get()
        if rest + wanted > len(following):
            following = _new_buffer(padded(rest + wanted))
        following[:rest] = self._buffer[whole : self._end]
        self._full.put((self._buffer, whole))
        self._buffer, self._start, self._end, self._hashed = following, self._start + whole, rest, rest
        if self._error is not None:
            raise self._error

    def _write_all(self, write: Callable[[memoryview], object]) -> None:
        while (job := self._full.get()) is not None:
            buffer, num_bytes = job
            try:
                if self._error is None:
                    write(buffer[:num_bytes])
            except BaseException as error:
                self._error = error  # raised where the archive is filled
            if len(buffer) > _BUFFER_BYTES:  # made for one large image
                buffer = _new_buffer(_BUFFER_BYTES)
            self._free.put(buffer)


def _new_buffer(num_bytes: int) -> memoryview:
    """Memory that begins at a page; private, since forked workers inherit the idle buffers."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@contextlib.contextmanager
def writing_archive(place: Location) -> Iterator[Archive]:
    """An archive that is at `place`, whole, when the block has ended, or not at all.

    A local file is synced and renamed; an object of a store appears when it is complete. `ValueError` of one line when
    the disk refuses (it is full, …), OSError of one line when a store does.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            write = _past_the_cache(stack.enter_context(atomic_file(place)))
        else:
            write = stack.enter_context(folder_at(place.parent).writing(place.name))
        archive = Archive(write)
        try:
            yield archive
        finally:
            archive.close()


def _past_the_cache(descriptor: int) -> Callable[[memoryview], None]:
    """Writes to a file without filling the page cache, where the system and the file system can do that."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = False

    def switch(on: bool) -> None:
        nonlocal direct
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags)
            direct = on

    def write(piece: memoryview) -> None:
        if direct and len(piece) % _ALIGNMENT:  # the end
            switch(False)
        try:
            write_all(descriptor, piece)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            switch(False)
            write_all(descriptor, piece)

    if hasattr(os, "O_DIRECT"):
        switch(True)
    return write


def ustar_headers(names: list[bytes], sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """`ustar_header` of many members at once: uint8 [n, 512]. `sizes` is int64 [n], the names fit (shards/keys.py)."""
    headers = np.empty((len(names), BLOCK), dtype=np.uint8)
    headers[:] = _BLANK
    headers[:, _SIZE] = (sizes[:, None] >> _SHIFTS & 7) + ord("0")
    # The checksum counts its own field, eight bytes of which the last two never change, as spaces.
    sums = headers[:, _SIZE].sum(axis=1, dtype=np.int64) + (_BLANK_SUM + 7 * ord(" "))
    fields = [(_NAME, names)]
    if max(map(len, names), default=0) > NAME_BYTES:
        parts = [split_name(name) or (b"", b"") for name in names]
        fields = [(_NAME, [base for _, base in parts]), (_FOLDER, [folder for folder, _ in parts])]
    for place, texts in fields:
        rows = _as_rows(texts, place.stop - place.start)
        headers[:, place] = rows
        sums += rows.sum(axis=1, dtype=np.int64)
    headers[:, _SUM] = (sums[:, None] >> _SHIFTS[-6:] & 7) + ord("0")
    return headers


def label_members(keys: list[bytes], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The members `KEY.cls` of labels int64 [n] >= 0, whole as they lie in the archive: uint8 [n, 1024]."""
    texts = [b"%d" % label for label in labels.tolist()]
    members = np.zeros((len(keys), 2 * BLOCK), dtype=np.uint8)
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    members[:, :BLOCK] = ustar_headers([key + b".cls" for key in keys], sizes)
    members[:, BLOCK : BLOCK + 20] = _as_rows(texts, 20)
    return members


def _as_rows(texts: list[bytes], width: int) -> NDArray[np.uint8]:
    """Texts of at most `width` bytes, none ending in NUL, padded with NUL: uint8 [n, width]."""
    return np.array(texts, dtype=f"S{width}").view(np.uint8).reshape(len(texts), width)

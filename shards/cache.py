"""The node's cache: whole files of remote shards on a local disk, within a bound of bytes, shared by all processes.

    cache = ShardCache("/scratch/cache", max_bytes=100 * 10**9)
    match cache.reserve(name, num_bytes):
        case Download() as download:            # nobody has it, and now there is room for it
            with download:
                download.write(part)            # …
                hold = download.finish()        # it is there for all, and stays until `hold.release()`
        case Refusal.BUSY: …                    # another process is fetching it
    cache.read(name, offset, size)

What is in the folder says everything, and locks of the kernel say who is at work, so a process may be killed at any
moment:

    lock                                        held (flock) while something is added, renamed or removed
    NAME                                        a complete, verified file; appears by rename
    NAME.<bytes of the complete file>.partial   on its way: its size is its progress, its name reserves the whole

A partial file is locked by who fetches it; one without a lock is resumed by the next who wants it, or removed. The
bound holds for the files and what is reserved. The file that was used longest ago (its mtime) goes first, unless
somebody holds it (a shared lock on the file). Readers open, read and close, so that nobody keeps the disk space of what
is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from shards.storage import write_all

DEFAULT_BYTES = 100 * 10**9
_NAME = re.compile(r"[0-9a-f]{64}\.(?:tar|offsets)(?:\.(\d{1,18})\.partial)?")
_LOCK = "lock"
_BLOCK = 4096  # disks give whole blocks
_STALE_SECONDS = 600.0  # a download that nobody resumed for so long is removed when somebody looks
_TOUCH_SECONDS = 1.0  # between two notes of a process that it used a file
_MAPPED_SECONDS = 600.0  # an opened offset file stays mapped for long: removing it sooner would give no room back
_COPY_BYTES = 1 << 20
_KEPT_FREE = 50  # one part in so many of the disk is left to others


class Refusal(Enum):
    """Why a file cannot be fetched into the cache now."""

    THERE = "it is there"
    BUSY = "another process is fetching it"
    FULL = "all room is taken by files that are held or being fetched"
    TOO_LARGE = "it is larger than the whole cache, or than what its disk can hold"


class ShardCache:
    """A folder of files, at most `max_bytes` in all, fewer where the disk is full; made when the first file comes.

    Names are 64 hexadecimal digits and an ending, .tar or .offsets: what a file holds decides its name.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = default_folder() if folder is None else Path(folder).absolute()
        self.max_bytes = max_bytes
        self._touched: dict[str, float] = {}

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """Bytes `offset … offset + size` of a complete file (fewer where it ends); None: not here."""
        data = _pread(self.folder / name, offset, size)
        if data is not None:
            self._touch(name)
        return data

    def read_partial(self, name: str, num_bytes: int, offset: int, size: int) -> bytes | None:
        """The same of a file of `num_bytes` that is on its way, so not verified yet; None: not here (yet)."""
        data = _pread(self.folder / _partial(name, num_bytes), offset, size)
        return data if data is not None and len(data) == size else None

    def find(self, name: str) -> Path | None:
        """Where a complete file lies; None: not here."""
        path = self.folder / name
        if not path.exists():
            return None
        self._touch(name)
        return path

    def hold(self, name: str) -> Hold | None:
        """Keep a complete file from being removed until the hold is released or this process ends; None: not here."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            return None
        if _lock(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
            self._touch(name)
            return Hold(descriptor)
        os.close(descriptor)  # it is being removed
        return None

    def reserve(self, name: str, num_bytes: int) -> Download | Refusal:
        """Make room for a file of `num_bytes` that is to be fetched, removing what was used longest ago.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        path = self.folder / _partial(name, num_bytes)
        with self._locked():
            if (self.folder / name).exists():
                return Refusal.THERE
            if (descriptor := _open_locked(path)) is not None:
                return Download(self, name, path, descriptor)
            if path.exists():
                return Refusal.BUSY
            if not self._make_room(num_bytes):
                alone = _on_disk(num_bytes) + _on_disk(self.folder.stat().st_size)
                return Refusal.FULL if alone <= self._limit(self._scan()) else Refusal.TOO_LARGE
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            assert _lock(descriptor, fcntl.LOCK_EX), "nobody else can know this file yet"
            return Download(self, name, path, descriptor)

    def put(self, name: str, content: bytes) -> Path | None:
        """Keep a whole file, if that can be done at once; where it lies then."""
        try:
            reserved = self.reserve(name, len(content))
            if isinstance(reserved, Download):
                with reserved:
                    reserved.restart()
                    reserved.write(content)
                    reserved.finish().release()
        except OSError:
            return None  # a full or read-only disk; what is fetched in earnest says so
        return self.find(name)

    def remove(self, name: str) -> None:
        """Remove a complete file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove what is over the bound, as after it was lowered, and what killed downloads left long ago.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        with self._locked():
            self._make_room(0)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove files until `num_bytes` more fit; removes none (but stale downloads) if that is not to be had."""
        now, items = time.time(), []
        for item in self._scan():
            if item.partial and now - item.used > _STALE_SECONDS and self._removed(item):
                continue
            items.append(item)
        limit = self._limit(items)
        total = _on_disk(self.folder.stat().st_size) + sum(item.num_bytes for item in items) + _on_disk(num_bytes)
        chosen: list[tuple[Path, int]] = []
        try:
            for item in sorted(items, key=lambda item: (not item.partial, item.used)):
                if total <= limit:
                    break
                if not item.mapped and (descriptor := _open_locked(item.path)) is not None:
                    chosen.append((item.path, descriptor))
                    total -= item.num_bytes
            if total > limit:
                return False
            for path, _ in chosen:
                path.unlink(missing_ok=True)
            return True
        finally:
            for _, descriptor in chosen:
                os.close(descriptor)

    def _limit(self, items: list[_Item]) -> int:
        """Bytes that the cache may take: the bound, or as much as its disk can hold besides what is not ours."""
        disk = os.statvfs(self.folder)
        free = (disk.f_bavail - disk.f_blocks // _KEPT_FREE) * disk.f_frsize
        mine = _on_disk(self.folder.stat().st_size) + sum(item.present for item in items)
        return min(self.max_bytes, mine + free)

    def _scan(self) -> list[_Item]:
        items = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (match := _NAME.fullmatch(entry.name)) is not None:
                    with contextlib.suppress(FileNotFoundError):  # users may remove what they like
                        facts = entry.stat()
                        sizes = _on_disk(facts.st_size), _on_disk(max(facts.st_size, int(match[1] or 0)))
                        mapped = entry.name.endswith(".offsets") and 0 <= time.time() - facts.st_mtime < _MAPPED_SECONDS
                        items.append(_Item(Path(entry.path), *sizes, facts.st_mtime, match[1] is not None, mapped))
        return items

    def _removed(self, item: _Item) -> bool:
        """Remove a file that nobody has locked; False: somebody has."""
        descriptor = _open_locked(item.path)
        if descriptor is None:
            return False
        item.path.unlink(missing_ok=True)
        os.close(descriptor)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _close(descriptor)

    def _touch(self, name: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[name] = now
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_touched": {}}


class Hold:
    """A file of the cache that stays while this exists (and its process lives)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let it go."""
        _close(self._descriptor)


class Download:
    """A file on its way into the cache; as a context manager, leaving it unfinished keeps what is there for the next.

    `size` is how many bytes there are already: of an interrupted download they are not verified.
    """

    def __init__(self, cache: ShardCache, name: str, path: Path, descriptor: int) -> None:
        self._cache, self._name, self._path, self._descriptor = cache, name, path, descriptor
        self.size = os.fstat(descriptor).st_size

    def content(self) -> Iterator[bytes]:
        """What is there, in parts."""
        for offset in range(0, self.size, _COPY_BYTES):
            yield os.pread(self._descriptor, min(_COPY_BYTES, self.size - offset), offset)

    def write(self, data: bytes | memoryview) -> None:
        """Append. `OSError`: the disk is full."""
        os.lseek(self._descriptor, self.size, os.SEEK_SET)
        write_all(self._descriptor, data)
        self.size += len(data)

    def restart(self) -> None:
        """Throw away what is there."""
        os.ftruncate(self._descriptor, 0)
        self.size = 0

    def finish(self) -> Hold:
        """The whole file is there and right: show it to all. It is held."""
        os.fsync(self._descriptor)  # a power cut must not leave a name without its content
        with self._cache._locked():
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            os.rename(self._path, self._cache.folder / self._name)
        descriptor, self._descriptor = self._descriptor, -1
        return Hold(descriptor)

    def abandon(self) -> None:
        """Remove what is there."""
        with self._cache._locked():
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            _close(self._descriptor)
            self._descriptor = -1


def default_folder() -> Path:
    """In the user's cache folder, one for each machine, since homes are often shared by many."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "scaler", f"shards-{socket.gethostname()}")


@dataclass(frozen=True)
class _Item:
    path: Path
    present: int  # bytes on the disk now
    num_bytes: int  # in the end
    used: float  # seconds since 1970
    partial: bool
    mapped: bool  # probably


def _partial(name: str, num_bytes: int) -> str:
    return f"{name}.{num_bytes}.partial"


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


def _pread(path: Path, offset: int, size: int) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # most often it is not there; and nobody stops for a cache that cannot be read
        return None
    try:
        return os.pread(descriptor, size, offset)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int | None:
    """A descriptor that has the file's lock to itself; None: there is no such file, or somebody else has it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    if _lock(descriptor, fcntl.LOCK_EX):
        return descriptor
    os.close(descriptor)
    return None


def _close(descriptor: int) -> None:
    """Close and unlock; closing alone leaves it locked where a fork has the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

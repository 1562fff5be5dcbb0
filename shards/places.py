"""Where checkpoints lie: a folder of this machine, or any fsspec URL (`s3://…`, `gs://…`, `memory://…`).

    folder = folder_at(locate("s3://bucket/run") / "step-00000100")
    with folder.writing("rank-00000.safetensors") as write:
        write(header)
    folder.read("manifest.json")

Locally a file appears whole or not at all. An object store has no rename, and needs none: what counts is decided by
the manifest, which is written last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

Write = Callable[[Any], Any]

# Object stores: their folders exist as soon as something is in them (and s3fs would make a misspelt bucket).
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}


@dataclass(frozen=True, order=True)
class Url:
    """A place that fsspec reads and writes, with as much of `Path` as checkpoints need."""

    text: str

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """What it lies in."""
        return Url(self.text.rpartition("/")[0])


Location = Path | Url


def locate(where: str | Path | Url) -> Location:
    """A location from a path, `file://` included, or a URL."""
    if not isinstance(where, str):
        return where
    protocol, separator, rest = where.partition("://")
    if not separator or protocol in ("file", "local"):
        return Path(rest if separator else where)
    return Url(where.rstrip("/"))


def folder_at(location: Location) -> Folder:
    """The files at a location.

    Raises:
        ValueError: a URL that fsspec does not know, or whose package is not installed.
    """
    return LocalFolder(location) if isinstance(location, Path) else RemoteFolder(location)


class Folder(ABC):
    """Files below a location, by their path relative to it.

    A missing file is a FileNotFoundError; whatever else goes wrong is an OSError of one line that names the place.

    Attributes:
        threads: how many reads at a time make sense.
    """

    location: Location
    threads: int

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """All files below and their bytes; nothing where there is no such folder."""

    @abstractmethod
    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file on.

        Raises:
            ValueError: the file ends before.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole (small) file."""

    @abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[Write]:
        """A function that appends to a new file, which is there for readers when the block has ended."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove files that exist."""

    @abstractmethod
    def remove_all(self) -> None:
        """Remove the folder with everything in it."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self.sizes()

    def write(self, name: str, content: bytes) -> None:
        """Write a whole (small) file."""
        with self.writing(name) as write:
            write(content)


class LocalFolder(Folder):
    """A folder of this machine, or one that it mounts."""

    threads = 4

    def __init__(self, path: Path) -> None:
        self.location = self._path = path

    def sizes(self) -> dict[str, int]:
        """See `Folder.sizes`."""
        found = {}
        for parent, _, names in os.walk(self._path):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # other ranks rename and remove theirs meanwhile
                    found[path.relative_to(self._path).as_posix()] = path.stat().st_size
        return found

    def exists(self, name: str) -> bool:
        """See `Folder.exists`."""
        return (self._path / name).is_file()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Folder.read_into`."""
        with open(self._path / name, "rb", buffering=0) as file:
            file.seek(start)
            filled = 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])
                if not count:
                    raise ValueError(f"{self._path / name} ends at byte {start + filled}")
                filled += count

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        return (self._path / name).read_bytes()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        """See `Folder.writing`; the file is synced and renamed, so that not even a power cut leaves half of it."""
        path = self._path / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync(path.parent.parent)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file.write
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, names: Sequence[str]) -> None:
        """See `Folder.remove`."""
        for name in names:
            (self._path / name).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """See `Folder.remove_all`."""
        if self._path.exists():
            shutil.rmtree(self._path)


class RemoteFolder(Folder):
    """Any place that fsspec knows; credentials and endpoints come from its own configuration and environment."""

    def __init__(self, url: Url) -> None:
        self.location = url
        try:
            self._files, self._path = url_to_fs(url.text)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {error} (pip install 'scaler[remote]' brings s3:// and gs://)") from None
        self._path = self._path.rstrip("/")
        protocol = self._files.protocol
        self._has_folders = not _WITHOUT_FOLDERS & ({protocol} if isinstance(protocol, str) else set(protocol))
        self.threads = 8 if self._files.async_impl else 1  # a client without asyncio need not bear several threads

    def sizes(self) -> dict[str, int]:
        """See `Folder.sizes`."""
        with self._named(""):
            self._files.invalidate_cache()  # other ranks write here too
            try:
                found = self._files.find(self._path, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._path) + 1 :]: int(info["size"] or 0) for name, info in found.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Folder.read_into`."""
        if not len(buffer):
            return  # there is no empty range in HTTP: s3fs would give everything from `start` on
        with self._named(name):
            content = self._files.cat_file(self._at(name), start=start, end=start + len(buffer))
        if len(content) != len(buffer):
            raise ValueError(f"{self.location / name} ends at byte {start + len(content)}")
        buffer[:] = content

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        with self._named(name):
            return bytes(self._files.cat_file(self._at(name)))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        """See `Folder.writing`; large files go up in parts of some megabytes."""
        with self._named(name):
            if self._has_folders:
                self._files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            file = self._files.open(self._at(name), "wb")
            try:
                yield file.write
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                with contextlib.suppress(Exception):
                    file.closed = True  # or else its finaliser tries to upload the rest
                raise

    def remove(self, names: Sequence[str]) -> None:
        """See `Folder.remove`."""
        with self._named(""):
            if names:
                self._files.rm([self._at(name) for name in names])

    def remove_all(self) -> None:
        """See `Folder.remove_all`."""
        with self._named(""), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path, recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Clients raise errors of many libraries, some of many lines: one kind and one line for all of them."""
        place = self.location / name if name else self.location
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place}: not found ({_line(error)})") from error
        except Exception as error:
            raise OSError(f"{place}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

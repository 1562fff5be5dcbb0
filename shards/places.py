"""Where shards and checkpoints lie: a folder of this machine, or any fsspec URL (`s3://…`, `https://…`, `memory://…`).

    folder = folder_at(locate("s3://bucket/run") / "step-00000100")
    with folder.writing("rank-00000.safetensors") as write:
        write(header)
    folder.read("manifest.json")

Locally a file appears whole or not at all. An object store has no rename, and needs none: what counts is decided by
the manifest (of shards: `index.json`), which is written last.

URLs may hold secrets (`https://user:password@host/…`, `…?signature=…`). Nothing here prints them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fsspec.core import url_to_fs

Write = Callable[[Any], Any]

# Object stores: their folders exist as soon as something is in them (and s3fs would make a misspelt bucket).
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}


_HTTP = ("http://", "https://")
_USER, _QUERY = re.compile(r"(\w://)[^/\s@]*@"), re.compile(r"\?[^\s'\")]*")  # in texts with URLs
_inherited: list[Any] = []  # clients from before a fork: were they dropped, they would fail aloud to close themselves
_SECONDS = 30.0  # that one request may take; the largest are parts of a few megabytes


class NoSuchHostError(OSError):
    """The host of a URL is unknown to the name service."""


class RangeIgnoredError(OSError):
    """A server sent a whole file where a range of it was asked for.

    Attributes:
        content: that file.
    """

    def __init__(self, message: str, *, content: bytes) -> None:
        super().__init__(message)
        self.content = content


@dataclass(frozen=True, order=True)
class Url:
    """A place that fsspec reads and writes, with as much of `Path` as is needed here.

    The query of an HTTP URL (`https://host/folder?signature=…`) belongs to every file below. `str()` leaves out what
    may be secret: the query, and user and password.
    """

    text: str

    def __truediv__(self, name: str) -> Url:
        path, query = self._parts()
        return Url(f"{path}/{quote(name) if path.startswith(_HTTP) else name}{query}")

    def __str__(self) -> str:
        return _USER.sub(r"\1", self._parts()[0])

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """What it lies in."""
        path, query = self._parts()
        above = path.rpartition("/")[0]
        return self if above.endswith("/") else Url(above + query)  # what is left of a host alone is no place

    def _parts(self) -> tuple[str, str]:
        """The path, and for HTTP the query with its question mark."""
        path, mark, query = self.text.partition("?") if self.text.startswith(_HTTP) else (self.text, "", "")
        return path.rstrip("/"), mark + query


Location = Path | Url


def locate(where: str | Path | Url) -> Location:
    """A location from a path, `file://` included, or a URL."""
    if not isinstance(where, str):
        return where
    protocol, separator, rest = where.partition("://")
    if not separator or protocol in ("file", "local"):
        return Path(rest if separator else where)
    return Url(where.rstrip("/"))


def without_secrets(text: str) -> str:
    """`text` with user names, passwords and queries taken out of its URLs."""
    return _QUERY.sub("", _USER.sub(r"\1", text)) if "://" in text else text


def folder_at(location: Location) -> Folder:
    """The files at a location.

    Raises:
        ValueError: a URL that fsspec does not know, or whose package is not installed.
    """
    return LocalFolder(location) if isinstance(location, Path) else RemoteFolder(location)


class Folder(ABC):
    """Files below a location, by their path relative to it.

    A missing file is a FileNotFoundError, a refusal a PermissionError, an unknown host a NoSuchHostError; whatever else
    goes wrong is an OSError. Their text is one line that names the place.

    Attributes:
        threads: how many reads at a time make sense.
        caching: whether it pays to keep copies of files on a local disk.
    """

    location: Location
    threads: int
    caching: bool

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """All files below and their bytes; nothing where there is no such folder."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The bytes of one file; web servers often list their files without."""

    @abstractmethod
    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file on.

        Raises:
            ValueError: the file ends before.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Bytes `start … start + size` of a file.

        Raises:
            ValueError: the file ends before.
            RangeIgnoredError: the server sends whole files only.
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
    caching = False

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

    def size(self, name: str) -> int:
        """See `Folder.size`."""
        return (self._path / name).stat().st_size

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

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See `Folder.read_range`."""
        buffer = bytearray(size)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

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

    location: Url

    def __init__(self, url: Url) -> None:
        self.location = url
        self._connect()

    def _connect(self) -> None:
        """Clients have threads and connections, which a fork does not take along: every process has its own."""
        path, query = self.location._parts()
        self._query = query
        # Some servers send the whole file's checksum with a part of it, which botocore then refuses. What we read is
        # proven by checksums of our own.
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        try:
            self._files, self._path = url_to_fs(path)
        except (ImportError, ValueError) as error:
            packages = "pip install 'scaler[remote]' brings http://, s3://, gs:// and hf://"
            raise ValueError(f"{self.location}: {without_secrets(str(error))} ({packages})") from None
        self._path = self._path.rstrip("/")
        protocol = self._files.protocol
        self.caching = protocol != "memory"
        self._has_folders = not _WITHOUT_FOLDERS & ({protocol} if isinstance(protocol, str) else set(protocol))
        self.threads = 8 if self._files.async_impl else 1  # a client without asyncio need not bear several threads
        self._pid = os.getpid()
        self._options: dict[str, Any] = {}  # of reads
        if self._files.async_impl:
            self._options["timeout"] = _SECONDS  # the others have limits of their own
        elif protocol == "hf":
            self._options["cache_type"] = "none"  # or it reads megabytes for a sample

    def sizes(self) -> dict[str, int]:
        """See `Folder.sizes`."""
        with self._named(""):
            self._files.invalidate_cache()  # other ranks write here too
            try:
                found = self._files.find(self._path, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._path) + 1 :]: int(info["size"] or 0) for name, info in found.items()}

    def size(self, name: str) -> int:
        """See `Folder.size`."""
        with self._named(name):
            size = self._files.info(self._at(name))["size"]
        if size is None:
            raise ValueError(f"{self.location / name}: the server does not say how large it is")
        return int(size)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Folder.read_into`."""
        buffer[:] = self.read_range(name, start, len(buffer))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See `Folder.read_range`."""
        if not size:
            return b""  # there is no empty range in HTTP: s3fs would give everything from `start` on
        content = self._cat(name, start=start, end=start + size)
        if len(content) > size:
            place = self.location / name
            raise RangeIgnoredError(f"{place}: the server sends whole files where a part is asked for", content=content)
        if len(content) < size:
            raise ValueError(f"{self.location / name} ends at byte {start + len(content)}")
        return content

    def read(self, name: str) -> bytes:
        """See `Folder.read`."""
        return self._cat(name)

    def _cat(self, name: str, **range_: int) -> bytes:
        with self._named(name):
            return bytes(self._files.cat_file(self._at(name), **range_, **self._options))

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
        return f"{self._path}/{quote(name) if self._path.startswith(_HTTP) else name}{self._query}"

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Clients raise errors of many libraries, some of many lines: one kind and one line for all of them."""
        place = self.location / name if name else self.location
        if self._pid != os.getpid():
            _inherited.append(self._files)
            self._connect()
        try:
            yield
        except Exception as error:
            raise _plain_error(error, place) from error


def _plain_error(error: Exception, place: Url) -> OSError | ValueError:
    """What `Folder` promises to raise."""
    causes = [error, *_causes(error)]
    status = next(filter(None, map(_status, causes)), None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        more = "" if str(place) in without_secrets(str(error)) else f" ({_line(error)})"
        return FileNotFoundError(f"{place}: not found{more}")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__.endswith("CredentialsError"):
        advice = "check your credentials for it, or that it may be read by all"
        return PermissionError(f"{place}: refused ({_line(error)}); {advice}")
    if status == 416:
        return ValueError(f"{place} ends before the bytes that were asked for")
    unknown = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    if any(isinstance(cause, socket.gaierror) and cause.errno in unknown for cause in causes):
        return NoSuchHostError(f"{place}: no such host; check its name and the network")
    kind = TimeoutError if isinstance(error, TimeoutError | asyncio.TimeoutError) else OSError
    return kind(f"{place}: {_line(error)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error came from, in whatever way its library says so."""
    for cause in (getattr(error, "os_error", None), error.__cause__ or error.__context__):
        if isinstance(cause, BaseException):
            yield cause
            yield from _causes(cause)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, requests, botocore or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(error, "status", None), getattr(response, "status_code", None), getattr(error, "code", None))
    return next((status for status in found if isinstance(status, int)), None)


def _line(error: BaseException) -> str:
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

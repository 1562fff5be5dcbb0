"""The index of a folder of shards: which samples it holds and where their bytes are.

`index.json` lists the shards (file name, bytes, samples, sha256), the class names, the totals and a fingerprint over
all of it; the offset file of each shard (shards/offsets.py) is opened when a sample of it is first asked for. Sample
ids count through the shards in the order of the list, so a million shards cost megabytes, whatever they hold.

The folder may be a URL. Then offset files are fetched when they are needed and kept in the node's cache
(shards/cache.py); what does not fit its own checksums was damaged on its way, and is fetched again before it is an
error.

shards/indexing.py makes these files for shards from elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.cache import ShardCache
from shards.offsets import ENDING, OffsetTable, Skipped, load_offsets, offset_path, parse_offsets, read_header
from shards.places import Folder, Location, NoSuchHostError, Url, folder_at, locate
from shards.retry import patience, retry
from shards.storage import sha256_file, write_atomic

FORMAT = 1
INDEX_NAME = "index.json"
_OPEN_TABLES = 256  # offset files kept mapped per process
_START_SECONDS = 30.0  # to get hold of `index.json`: whoever starts a run is waiting


class Span(NamedTuple):
    """Where one sample lies, which is all that reading it takes: the image is bytes `offset … offset + size` of shard
    number `shard`; `label` -1: none."""

    id: int
    shard: int
    offset: int
    size: int
    label: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """One sample with its names."""

    id: int
    shard: int
    offset: int
    size: int
    extension: str
    key: str
    source: str
    label: int
    crc32: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What `index.json` says about one shard."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str


class ShardIndex:
    """A folder of shards, read-only. Can be sent to worker processes (fork or spawn); make one with `load`.

    Attributes:
        path: the folder, a `Path` or a `Url`.
        shards_at: where the tars lie: as a rule the same folder; another one for an index of shards that lie where
            nothing can be written.
        cache: where files of a URL are kept; None where nothing needs to be.
        shard_sizes: int64 [S], the samples of each shard; `shard_bytes` likewise.
    """

    def __init__(
        self,
        path: str | Location,
        *,
        shards: Sequence[ShardRecord],
        class_names: Sequence[str],
        shards_at: str | Location | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.path, self.cache = locate(path), cache
        self.shards_at = self.path if shards_at is None else locate(shards_at)
        self.shard_names = [shard.name for shard in shards]
        self.class_names = list(class_names)
        self.shard_sizes = np.array([shard.num_samples for shard in shards], dtype=np.int64)
        self.shard_bytes = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.num_bytes = int(self.shard_bytes.sum())
        self.fingerprint = _fingerprint(shards, class_names)
        self._sha256 = np.array([shard.sha256 for shard in shards], dtype="S64")
        self._ends = np.cumsum(self.shard_sizes)
        self._tables: dict[int, OffsetTable] = {}
        self._remote: Folder | None = None

    @classmethod
    def load(cls, path: str | Location, *, cache: ShardCache | None = None) -> ShardIndex:
        """Read `path/index.json`; `path` is a folder or a URL.

        Args:
            cache: for files of a URL (None: in the user's cache folder).

        Raises:
            ValueError: it is missing, refused, damaged or of another format, in one line.
        """
        location = locate(path)
        if isinstance(location, Path):
            try:
                return cls._parse((location / INDEX_NAME).read_bytes(), location, cache=cache)
            except FileNotFoundError as error:
                raise _no_index(location, "is no folder" if not location.is_dir() else None) from error
            except OSError as error:
                raise ValueError(f"cannot read {location / INDEX_NAME}: {error.strerror}") from error
        folder = folder_at(location)
        try:
            return retry(
                lambda: cls._parse(folder.read(INDEX_NAME), location, cache=cache),
                seconds=min(_START_SECONDS, patience()),
                final=(FileNotFoundError, PermissionError, NoSuchHostError),
            )
        except ValueError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _no_index(location, None) from error
            raise

    @classmethod
    def _parse(cls, content: bytes, path: Location, *, cache: ShardCache | None) -> ShardIndex:
        file = path / INDEX_NAME
        try:
            data = json.loads(content, object_hook=_parse_record)
        except (ValueError, RecursionError) as error:
            raise _damaged_index(file, "it is not JSON") from error
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise _damaged_index(file, "it has no format number")
        if data["format"] != FORMAT:
            raise ValueError(
                f"{file} has format {data['format']}, this version reads {FORMAT}; `scaler index {path}` makes it anew"
            )
        shards, class_names = data.get("shards"), data.get("class_names")
        if not isinstance(shards, list) or not all(isinstance(shard, ShardRecord) for shard in shards):
            raise _damaged_index(file, "its shards are not listed as file, bytes, samples and sha256")
        if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
            raise _damaged_index(file, "its class names are not a list of texts")
        shards_at = data.get("shards_at")
        if not isinstance(shards_at, str | None):
            raise _damaged_index(file, "where its shards lie is not a text")
        index = cls(path, shards=shards, class_names=class_names, shards_at=shards_at)
        if isinstance(index.shards_at, Url) and folder_at(index.shards_at).caching:
            index.cache = cache or ShardCache()
        if index.fingerprint != data.get("fingerprint"):
            raise _damaged_index(file, "its fingerprint does not match what it lists (was it edited, or cut off?)")
        if any("/" in name or not name.endswith(".tar") for name in index.shard_names):
            raise _damaged_index(file, "a shard name is not the name of a .tar file")
        if not index.num_samples:
            raise _damaged_index(file, "it lists no samples")
        return index

    def save(self) -> None:
        """Write `index.json`, whole or not at all; on a local disk an identical one is left alone."""
        rows = zip(self.shard_names, self.shard_bytes.tolist(), self.shard_sizes.tolist(), self._sha256, strict=True)
        data = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "num_shards": len(self.shard_names),
            "class_names": self.class_names,
        }
        if self.shards_at != self.path:
            place = self.shards_at
            data["shards_at"] = place.text if isinstance(place, Url) else str(place.resolve())
        lines = [json.dumps({"file": n, "bytes": b, "samples": s, "sha256": h.decode()}) for n, b, s, h in rows]
        head = json.dumps(data, indent=1, ensure_ascii=False)
        text = head.removesuffix("\n}") + ',\n "shards": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        if isinstance(self.path, Path):
            write_atomic(self.path / INDEX_NAME, text.encode())
        else:
            folder_at(self.path).write(INDEX_NAME, text.encode())

    def shard_path(self, shard: int) -> Location:
        """The tar file of shard number `shard`."""
        return self.shards_at / self.shard_names[shard]

    def shard_record(self, shard: int) -> ShardRecord:
        """What `index.json` says about shard number `shard`."""
        sizes = int(self.shard_bytes[shard]), int(self.shard_sizes[shard])
        return ShardRecord(self.shard_names[shard], *sizes, self._sha256[shard].decode())

    def shard_cache_name(self, shard: int) -> str:
        """What shard number `shard` is called in a cache: by its content, whatever folder or URL it came from."""
        return f"{self._sha256[shard].decode()}.tar"

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids (integers, any shape) → (shard, number within the shard), int64 arrays of that shape."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_samples):
            last = self.num_samples - 1
            raise ValueError(f"sample ids run from {ids.min()} to {ids.max()}, but {self.path} holds only 0 … {last}")
        shard = np.searchsorted(self._ends, ids, side="right")
        return shard, ids - (self._ends[shard] - self.shard_sizes[shard])

    def spans(self, ids: ArrayLike) -> list[Span]:
        """Where the samples of the given ids lie, in their order."""
        ids = np.asarray(ids, dtype=np.int64).ravel()
        rows = zip(ids.tolist(), *(part.tolist() for part in self.locate(ids)), strict=True)
        return [Span(id, shard, *self._table(shard).span(local)) for id, shard, local in rows]

    def entry(self, id: int) -> Entry:
        """Where sample `id` lies and what it is."""
        shard, local = self.locate(id)
        sample = self._table(int(shard)).sample(int(local))
        return Entry(id=int(id), shard=int(shard), **vars(sample))

    def keys(self, ids: ArrayLike) -> list[str]:
        """The keys of the given sample ids, in their order."""
        shards, locals_ = (part.ravel() for part in self.locate(ids))
        keys = [""] * len(shards)
        for i in np.argsort(shards, kind="stable"):
            keys[i] = self._table(int(shards[i])).key(int(locals_[i]))
        return keys

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        """The class numbers of the given sample ids, int64 of their shape, -1 where there is none."""
        shards, locals_ = self.locate(ids)
        shape, shards, locals_ = shards.shape, shards.ravel(), locals_.ravel()
        labels = np.empty(len(shards), dtype=np.int64)
        order = np.argsort(shards, kind="stable")  # shard by shard, so that each offset file is opened once
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(part):
                labels[part] = self._table(int(shards[part[0]])).labels[locals_[part]]
        return labels.reshape(shape)

    def skipped(self) -> list[Skipped]:
        """(what, why) for all that was left out of these shards when they were made or indexed; reads every header."""
        if isinstance(self.path, Path):
            headers = (read_header(offset_path(self.path / name)) for name in self.shard_names)
            return [pair for header in headers for pair in header["skipped"]]
        return [pair for shard in range(len(self.shard_names)) for pair in self._table(shard).skipped]

    def check_shard(self, shard: int, *, full: bool) -> None:
        """Compare a shard on a local disk with the index: its size, and when `full` its sha256.

        Raises:
            ValueError: it differs; names the file.
        """
        path, wanted = self.shard_path(shard), int(self.shard_bytes[shard])
        assert isinstance(path, Path), "shards of a URL are checked on their way into the cache"
        advice = f"copy it again from where it came, or run `scaler index {self.path}` if the change is meant"
        try:
            size = path.stat().st_size
            if size == wanted and full and sha256_file(path).encode() != self._sha256[shard]:
                raise ValueError(f"shard {path} has changed: its sha256 is not the one in {INDEX_NAME}; {advice}")
        except FileNotFoundError as error:
            raise ValueError(f"shard {path} is missing; {advice}") from error
        except OSError as error:
            raise ValueError(f"cannot read shard {path}: {error.strerror}") from error
        if size != wanted:
            cut = "was cut off" if size < wanted else "has changed"
            raise ValueError(f"shard {path} {cut}: {size} bytes, {INDEX_NAME} says {wanted}; {advice}")

    def _table(self, shard: int) -> OffsetTable:
        table = self._tables.pop(shard, None)
        if table is None:
            name = offset_path(Path(self.shard_names[shard])).name
            if isinstance(self.path, Path):
                table = self._checked(load_offsets(self.path / name), shard, self.path / name)
            else:
                table = self._remote_table(shard, name)
            while len(self._tables) >= _OPEN_TABLES:
                self._tables.pop(next(iter(self._tables)), None)
        self._tables[shard] = table  # last in, so the one used longest ago is dropped first
        return table

    def fetch_offsets(self, shard: int) -> None:
        """Have the offset file of a shard of a URL in the cache. `ValueError`: it cannot be had, or is damaged."""
        self._remote_table(shard, offset_path(Path(self.shard_names[shard])).name)

    def _remote_table(self, shard: int, name: str) -> OffsetTable:
        """The offset file of a URL: from the cache, or fetched into it."""
        place = self.path / name
        # Other shards may be called the same, and the same shards may have been indexed in another way elsewhere.
        kept = hashlib.sha256(f"{self.fingerprint} {place}".encode()).hexdigest() + ENDING
        if self.cache is not None and (path := self.cache.find(kept)) is not None:
            try:
                return self._checked(load_offsets(path), shard, place)
            except ValueError:
                self.cache.remove(kept)

        if self._remote is None:
            self._remote = folder_at(self.path)
        folder = self._remote

        def fetch() -> tuple[bytes, OffsetTable]:
            content = folder.read(name)
            return content, self._checked(parse_offsets(content, place), shard, place)

        try:
            content, table = retry(fetch)
        except ValueError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ValueError(f"{error}; `scaler index {self.path}` makes the offset files anew") from error
            raise
        if self.cache is not None and (path := self.cache.put(kept, content)) is not None:
            with contextlib.suppress(ValueError):  # gone already: the cache is very small
                return load_offsets(path)  # the same, but in memory that all processes of this node share
        return table

    def _checked(self, table: OffsetTable, shard: int, path: Location) -> OffsetTable:
        """`table` if it belongs to the shard; `ValueError` naming `path` otherwise."""
        found = (table.shard_name, len(table), table.num_bytes, table.sha256.encode())
        wanted = (self.shard_names[shard], self.shard_sizes[shard], self.shard_bytes[shard], self._sha256[shard])
        if found != wanted:
            raise ValueError(
                f"offset file {path} does not belong to {self.path / INDEX_NAME}; `scaler index {self.path}` makes "
                "both anew"
            )
        if len(table) and table.labels.max() >= len(self.class_names):
            raise ValueError(
                f"offset file {path} has label {table.labels.max()}, but {INDEX_NAME} names only "
                f"{len(self.class_names)} classes; `scaler index {self.path}` makes both anew"
            )
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_remote": None}

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"ShardIndex({str(self.path)!r}, {self.num_samples} samples in {len(self.shard_names)} shards)"


def _parse_record(row: dict[str, Any]) -> Any:
    """A row of the list of shards as soon as it is parsed (200,000 dicts would take 100 MB); others are left."""
    name, sha256 = row.get("file"), row.get("sha256")
    counts = row.get("bytes"), row.get("samples")
    if not (isinstance(name, str) and isinstance(sha256, str) and len(sha256) == 64):
        return row
    if not all(isinstance(count, int) and 0 <= count < 1 << 48 for count in counts):
        return row
    return ShardRecord(name, row["bytes"], row["samples"], sha256)


def _fingerprint(shards: Sequence[ShardRecord], class_names: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, list(class_names)]).encode())
    for shard in shards:
        digest.update(f"\n{shard.name} {shard.num_bytes} {shard.num_samples} {shard.sha256}".encode())
    return digest.hexdigest()


def _no_index(folder: Location, what: str | None) -> ValueError:
    out = " --out FOLDER" if str(folder).startswith("http") else ""  # where nothing can be written
    return ValueError(
        f"{folder} {what or f'holds no {INDEX_NAME}'}: make shards with `scaler convert SOURCE "
        f"{'FOLDER' if out else folder}`, or index existing ones with `scaler index {folder}{out}`"
    )


def _damaged_index(file: Location, what: str) -> ValueError:
    return ValueError(f"{file} is damaged: {what}; `scaler index {file.parent}` makes it anew from the shards")

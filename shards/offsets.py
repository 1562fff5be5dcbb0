"""The offset file of one shard: where each sample's image lies, its key, label and source, without reading the tar.

Layout: one line of JSON (padded with spaces to a multiple of 8 bytes), then little-endian arrays over the n samples

    offsets int64 · sizes int64 · labels int64 · key_ends int64 · source_ends int64 · crc32 uint32 · extensions uint8

and two utf-8 blobs, keys and sources, cut by the cumulative ends. A source that equals `KEY.extension` is stored as
nothing. `crc32` (zlib's) of an image tells a picture that never could be decoded from one that was damaged since, on
the disk or on its way here. The header's own `crc32` covers the file, so that a damaged offset file is an error,
never other samples. No pickle; the file is memory-mapped, and every number is checked before it is used.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.places import Location

FORMAT = 2
ENDING = ".offsets"
_COLUMNS = {
    "offsets": "<i8",
    "sizes": "<i8",
    "labels": "<i8",
    "key_ends": "<i8",
    "source_ends": "<i8",
    "crc32": "<u4",
    "extensions": "<u1",
}
_ROW_BYTES = sum(np.dtype(dtype).itemsize for dtype in _COLUMNS.values())
_MAX_HEADER = 1 << 30

Skipped = tuple[str, str]  # what was left out (a path or key), and why


@dataclass(frozen=True)
class Sample:
    """One image of a shard: its bytes are `shard[offset : offset + size]`."""

    key: str
    extension: str
    offset: int
    size: int
    label: int  # -1: none
    source: str
    crc32: int  # of the image's bytes


@dataclass(frozen=True)
class OffsetTable:
    """The offset file of one shard, memory-mapped; `labels` is int64 [n], -1 where there is none."""

    shard_name: str
    num_bytes: int  # of the shard
    sha256: str  # of the shard
    skipped: list[Skipped]
    labels: NDArray[np.int64]
    _offsets: NDArray[np.int64]
    _sizes: NDArray[np.int64]
    _key_ends: NDArray[np.int64]
    _source_ends: NDArray[np.int64]
    _crc32: NDArray[np.uint32]
    _extensions: NDArray[np.uint8]
    _extension_names: list[str]
    _blobs: memoryview  # keys, then sources

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, local: int) -> str:
        """The key of sample number `local` of this shard."""
        return self._text(self._key_ends, local, base=0)

    def span(self, local: int) -> tuple[int, int, int, int]:
        """Offset, size, label and crc32 of sample number `local` of this shard."""
        return int(self._offsets[local]), int(self._sizes[local]), int(self.labels[local]), int(self._crc32[local])

    def sample(self, local: int) -> Sample:
        """Everything known about sample number `local` of this shard."""
        key, extension = self.key(local), self._extension_names[self._extensions[local]]
        base = int(self._key_ends[-1])
        source = self._text(self._source_ends, local, base=base)
        return Sample(
            key=key,
            extension=extension,
            offset=int(self._offsets[local]),
            size=int(self._sizes[local]),
            label=int(self.labels[local]),
            source=source or f"{key}.{extension}",
            crc32=int(self._crc32[local]),
        )

    def _text(self, ends: NDArray[np.int64], local: int, *, base: int) -> str:
        start = int(ends[local - 1]) if local > 0 else 0
        return bytes(self._blobs[base + start : base + int(ends[local])]).decode("utf-8", "surrogateescape")


def offset_name(shard_name: str) -> str:
    """`NAME-000000.tar` → `NAME-000000.offsets`, beside it."""
    return shard_name.removesuffix(".tar") + ENDING


def offset_path(shard: Path) -> Path:
    """The offset file of a shard of this machine."""
    return shard.with_name(offset_name(shard.name))


def pack_offsets(
    samples: Sequence[Sample], *, shard_name: str, num_bytes: int, sha256: str, skipped: Sequence[Skipped]
) -> bytes:
    """The bytes of an offset file; `num_bytes` and `sha256` are the shard's."""
    return pack_columns(
        keys=[sample.key for sample in samples],
        extensions=[sample.extension for sample in samples],
        offsets=[sample.offset for sample in samples],
        sizes=[sample.size for sample in samples],
        labels=[sample.label for sample in samples],
        sources=[sample.source for sample in samples],
        crc32=[sample.crc32 for sample in samples],
        shard_name=shard_name,
        num_bytes=num_bytes,
        sha256=sha256,
        skipped=skipped,
    )


def pack_columns(
    *,
    keys: Sequence[str],
    extensions: Sequence[str],
    offsets: ArrayLike,
    sizes: ArrayLike,
    labels: ArrayLike,
    sources: Sequence[str],
    crc32: ArrayLike,
    shard_name: str,
    num_bytes: int,
    sha256: str,
    skipped: Sequence[Skipped],
) -> bytes:
    """`pack_offsets` of samples given by their fields, each as n values."""
    extension_names = sorted(set(extensions))
    if len(extension_names) > 256:
        raise ValueError(f"{shard_name} holds {len(extension_names)} different image endings; at most 256 are possible")
    key_texts = [_encode(key) for key in keys]
    source_texts = [
        b"" if source == f"{key}.{extension}" else _encode(source)
        for key, extension, source in zip(keys, extensions, sources, strict=True)
    ]
    codes = {name: code for code, name in enumerate(extension_names)}
    columns: dict[str, ArrayLike] = {
        "offsets": offsets,
        "sizes": sizes,
        "labels": labels,
        "key_ends": np.cumsum([len(key) for key in key_texts]),
        "source_ends": np.cumsum([len(source) for source in source_texts]),
        "crc32": crc32,
        "extensions": [codes[extension] for extension in extensions],
    }
    arrays = [np.asarray(columns[name], dtype).tobytes() for name, dtype in _COLUMNS.items()]
    body = b"".join([*arrays, *key_texts, *source_texts])
    header = {
        "format": FORMAT,
        "shard": shard_name,
        "bytes": num_bytes,
        "sha256": sha256,
        "samples": len(keys),
        "extensions": extension_names,
        "key_bytes": sum(map(len, key_texts)),
        "source_bytes": sum(map(len, source_texts)),
        "skipped": [list(pair) for pair in skipped],
    }
    header["crc32"] = _checksum(header, body)
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 8) + b"\n"
    return line + body


def read_header(path: Path) -> dict[str, Any]:
    """The JSON line of an offset file alone (shard, bytes, sha256, samples, skipped)."""
    try:
        with open(path, "rb") as file:
            return _parse_header(file.readline(_MAX_HEADER), path)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def load_offsets(path: Path) -> OffsetTable:
    """Memory-map an offset file; `ValueError` naming it when anything in it does not fit together."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise _damaged(path, "it is empty")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    table = parse_offsets(data, path)
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)  # the check has read all of it; a few samples of it are needed at a time
    return table


def parse_offsets(file: bytes | mmap.mmap, path: Location) -> OffsetTable:
    """The table in the bytes of an offset file; `ValueError` naming `path` when they do not fit together."""
    line = file[: file.find(b"\n") + 1]
    header = _parse_header(line, path)
    data = memoryview(file)
    size = header["samples"]
    blob_bytes = header["key_bytes"] + header["source_bytes"]
    if len(data) != len(line) + size * _ROW_BYTES + blob_bytes:
        raise _damaged(path, f"{len(data)} bytes where {len(line) + size * _ROW_BYTES + blob_bytes} were expected")
    if _checksum(json.loads(line), data[len(line) :]) != header["crc32"]:
        raise _damaged(path, "its crc32 is not the one in its first line")
    columns, position = {}, len(line)
    for name, dtype in _COLUMNS.items():
        columns[name] = np.frombuffer(data, dtype=dtype, count=size, offset=position)
        position += columns[name].nbytes
    offsets, sizes = columns["offsets"], columns["sizes"]
    if size:
        if sizes.min() < 0 or offsets.min() < 0 or (offsets > header["bytes"] - sizes).any():
            raise _damaged(path, "a sample lies outside of its shard")
        if columns["labels"].min() < -1:
            raise _damaged(path, "a label is below -1")
        for ends, total in ((columns["key_ends"], "key_bytes"), (columns["source_ends"], "source_bytes")):
            if ends[0] < 0 or (ends[1:] < ends[:-1]).any() or ends[-1] != header[total]:
                raise _damaged(path, "the keys do not fit together")
        if columns["extensions"].max() >= len(header["extensions"]):
            raise _damaged(path, "an unknown image ending")
    return OffsetTable(
        shard_name=header["shard"],
        num_bytes=header["bytes"],
        sha256=header["sha256"],
        skipped=header["skipped"],
        labels=columns["labels"],
        _offsets=offsets,
        _sizes=sizes,
        _key_ends=columns["key_ends"],
        _source_ends=columns["source_ends"],
        _crc32=columns["crc32"],
        _extensions=columns["extensions"],
        _extension_names=header["extensions"],
        _blobs=data[position:],
    )


def _parse_header(line: bytes, path: Location) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its first line is not JSON") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _damaged(path, f"format {header.get('format') if isinstance(header, dict) else None}, not {FORMAT}")
    counts = [header.get(name) for name in ("bytes", "samples", "key_bytes", "source_bytes", "crc32")]
    texts = [header.get(name) for name in ("shard", "sha256")]
    endings, skipped = header.get("extensions"), header.get("skipped")
    sound = (
        all(isinstance(count, int) and 0 <= count < 1 << 62 for count in counts)
        and all(isinstance(text, str) for text in texts)
        and _is_texts(endings)
        and isinstance(skipped, list)
        and all(_is_texts(pair) and len(pair) == 2 for pair in skipped)
    )
    if not sound:
        raise _damaged(path, "its first line lacks a field or holds a wrong one")
    return {**header, "skipped": [(what, why) for what, why in header["skipped"]]}


def _checksum(header: dict[str, Any], body: bytes | memoryview) -> int:
    """Of the header's other fields and of all that follows it."""
    fields = json.dumps({name: value for name, value in header.items() if name != "crc32"}).encode()
    return zlib.crc32(body, zlib.crc32(fields))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names in old tars and file systems need not be utf-8


def _damaged(path: Location, what: str) -> ValueError:
    return ValueError(
        f"offset file {path} is damaged or missing: {what}; `scaler index {path.parent}` makes it anew from the shard"
    )

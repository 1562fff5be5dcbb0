"""Writes one shard: reads its images, looks at their headers, lays them out as a tar, and keeps the offsets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.archive import Archive, label_members, ustar_headers, writing_archive
from shards.destination import WrittenShard
from shards.folder import image_extension
from shards.image_header import DecodeError, ImageInfo, inspect
from shards.offsets import Skipped, offset_name, pack_columns
from shards.places import Location, folder_at
from shards.sources import Source
from shards.storage import printable, write_atomic
from shards.tar import BLOCK, padded, ustar_header

MAX_IMAGE_BYTES = 1 << 30
_HEADERS_AT_ONCE = 1024
_HEAD_BYTES = 2048  # of a JPEG, in which its size mostly is


@dataclass(frozen=True)
class Options:
    """What is done to the images; `resize` 0 keeps their bytes."""

    json_member: bool = False
    decode_check: bool = False
    max_pixels: int = 100_000_000
    resize: int = 0
    quality: int = 90


@dataclass
class _Columns:
    """The samples of a shard as its offset file lists them."""

    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)


def sample_bytes(sizes: NDArray[np.int64], *, label: bool, json_member: bool) -> NDArray[np.int64]:
    """The bytes that images of `sizes` bytes (int64 [n]) take in a shard, headers and padding included: int64 [n]."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + 2 * BLOCK * (label + json_member)


def write_shard(
    name: str, place: Location, *, source: Source, numbers: NDArray[np.int64], keys: Sequence[str], options: Options
) -> WrittenShard:
    """Write images `numbers` (int64 [n]) of a source to the shard at `place`, and then its offset file.

    `keys` are those of the whole source. What is no usable image is left out, with the reason.
    """
    samples, skipped = _Columns(), list[Skipped]()
    with writing_archive(place) as archive, source.reading(numbers.tolist()):
        for part in np.split(numbers, range(_HEADERS_AT_ONCE, len(numbers), _HEADERS_AT_ONCE)):
            _add_images(archive, source, part, keys=keys, options=options, samples=samples, skipped=skipped)
        num_bytes, sha256 = archive.finish()
    offsets = pack_columns(**vars(samples), shard_name=place.name, num_bytes=num_bytes, sha256=sha256, skipped=skipped)
    if isinstance(place, Path):
        write_atomic(place.with_name(offset_name(place.name)), offsets)
    else:
        folder_at(place.parent).write(offset_name(place.name), offsets)
    return WrittenShard(name, num_bytes, len(samples.keys), sha256, skipped)


def _add_images(
    archive: Archive,
    source: Source,
    numbers: NDArray[np.int64],
    *,
    keys: Sequence[str],
    options: Options,
    samples: _Columns,
    skipped: list[Skipped],
) -> None:
    chosen, sizes, labels = numbers.tolist(), source.sizes[numbers].clip(0), source.labels[numbers]
    extensions = [image_extension(source.names[number]) for number in chosen]
    encoded = [keys[number].encode() for number in chosen]
    names = [b"%b.%b" % (key, extension.encode()) for key, extension in zip(encoded, extensions, strict=True)]
    headers = ustar_headers(names, sizes).tobytes()
    tails = label_members(encoded, labels.clip(0)).tobytes() if source.class_names else b""
    rows = zip(chosen, extensions, sizes.tolist(), labels.tolist(), strict=True)
    for i, (number, extension, size, label) in enumerate(rows):
        start = archive.position + BLOCK
        filled = BLOCK + padded(size)
        room = archive.room(filled + 2 * BLOCK)
        data = room[BLOCK : BLOCK + size]
        try:
            if size > MAX_IMAGE_BYTES:
                raise DecodeError(f"{size} bytes is above the limit of {MAX_IMAGE_BYTES} for one image")
            source.read(number, data)
            info = _inspect(data, max_pixels=options.max_pixels)
            about = source.about(number) if options.json_member else {}
            smaller = None
            if options.resize or options.decode_check:
                smaller, info = _decode(data, info, options)
        except DecodeError as error:
            skipped.append((printable(source.paths[number]), str(error)))
            continue
        if smaller is None:
            room[:BLOCK] = headers[i * BLOCK : (i + 1) * BLOCK]
            room[BLOCK + size : filled] = bytes(filled - BLOCK - size)
        else:
            extension, size, filled = "jpg", len(smaller), BLOCK + padded(len(smaller))
            room = archive.room(filled + 2 * BLOCK)
            data = room[BLOCK : BLOCK + size]
            room[:BLOCK] = ustar_header(f"{keys[number]}.jpg", size=size)
            room[BLOCK:filled] = smaller + bytes(filled - BLOCK - size)
        if label >= 0:
            room[filled : filled + 2 * BLOCK] = tails[i * 2 * BLOCK : (i + 1) * 2 * BLOCK]
            filled += 2 * BLOCK
        archive.advance(filled)
        samples.keys.append(keys[number])
        samples.extensions.append(extension)
        samples.offsets.append(start)
        samples.sizes.append(size)
        samples.labels.append(label)
        samples.sources.append(source.paths[number])
        samples.crc32.append(zlib.crc32(data))
        if options.json_member:
            about = {"path": source.paths[number], **about, "width": info.width, "height": info.height}
            archive.add(f"{keys[number]}.json", json.dumps(about).encode())


def _inspect(data: memoryview, *, max_pixels: int) -> ImageInfo:
    """The header of an image; that of a JPEG is mostly found without copying all of it."""
    head = bytes(data[:_HEAD_BYTES])
    if len(data) > _HEAD_BYTES:
        if head[:3] == b"\xff\xd8\xff":
            try:
                return inspect(head, max_pixels=max_pixels)
            except DecodeError:
                pass  # a long EXIF or colour profile comes first, or something is wrong
        head = bytes(data)
    return inspect(head, max_pixels=max_pixels)


def _decode(data: memoryview, info: ImageInfo, options: Options) -> tuple[bytes | None, ImageInfo]:
    """Decode an image whole, as it is asked for: smaller as a new JPEG, or None where its bytes stay; and its header.

    Raises:
        DecodeError: it does not decode.
    """
    from shards.reencode import check_decodes, shrink  # here, since they bring torch, which takes seconds

    if options.resize and min(info.width, info.height) > options.resize:
        smaller = shrink(bytes(data), info, short_side=options.resize, quality=options.quality)
        return smaller, inspect(smaller, max_pixels=options.max_pixels)
    if options.decode_check:
        check_decodes(bytes(data), info)
    return None, info

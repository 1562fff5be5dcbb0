"""Writes one shard: reads its images, looks at their headers, lays them out as a tar, and keeps the offsets."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.archive import Archive, label_members, ustar_headers, writing_archive
from shards.destination import WrittenShard
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


# One sample of a shard: number in the source, ending, offset, size, crc32.
_Written = tuple[int, str, int, int, int]


def sample_bytes(sizes: NDArray[np.int64], *, label: bool, json_member: bool) -> NDArray[np.int64]:
    """The bytes that images of `sizes` bytes (int64 [n]) take in a shard, headers and padding included: int64 [n]."""
    return BLOCK + -(-sizes // BLOCK) * BLOCK + 2 * BLOCK * (label + json_member)


def size_ratio(source: Source, numbers: Sequence[int], *, options: Options) -> float:
    """By how much images get smaller when they are resized, in bytes, measured on some of them; at most 1."""
    before = after = 0
    for number in numbers:
        data = memoryview(bytearray(max(0, int(source.sizes[number]))))
        with contextlib.suppress(DecodeError):
            source.read(number, data)
            smaller, _ = _decode(data, _inspect(data, max_pixels=options.max_pixels), options)
            before += len(data)
            after += len(data if smaller is None else smaller)
    return min(1.0, after / before) if before else 1.0


def write_shard(
    name: str, place: Location, *, source: Source, numbers: NDArray[np.int64], keys: Sequence[str], options: Options
) -> WrittenShard:
    """Write images `numbers` (int64 [n]) of a source to the shard at `place`, and then its offset file.

    `keys` are those of the whole source. What is no usable image is left out, with the reason.
    """
    samples: list[_Written] = []
    skipped: list[Skipped] = []
    with writing_archive(place) as archive, source.reading(numbers.tolist()):
        for part in np.split(numbers, range(_HEADERS_AT_ONCE, len(numbers), _HEADERS_AT_ONCE)):
            _add_images(archive, source, part, keys=keys, options=options, samples=samples, skipped=skipped)
        num_bytes, sha256 = archive.finish()
    chosen, extensions, starts, sizes, crc32 = zip(*samples, strict=True) if samples else [()] * 5
    offsets = pack_columns(
        keys=[keys[number] for number in chosen],
        extensions=extensions,
        offsets=starts,
        sizes=sizes,
        labels=source.labels[list(chosen)],
        sources=[source.paths[number] for number in chosen],
        crc32=crc32,
        shard_name=place.name,
        num_bytes=num_bytes,
        sha256=sha256,
        skipped=skipped,
    )
    if isinstance(place, Path):
        write_atomic(place.with_name(offset_name(place.name)), offsets)
    else:
        folder_at(place.parent).write(offset_name(place.name), offsets)
    return WrittenShard(name, num_bytes, len(samples), sha256, skipped)


def _add_images(
    archive: Archive,
    source: Source,
    numbers: NDArray[np.int64],
    *,
    keys: Sequence[str],
    options: Options,
    samples: list[_Written],
    skipped: list[Skipped],
) -> None:
    chosen, sizes, labels = numbers.tolist(), source.sizes[numbers].clip(0), source.labels[numbers]
    names = [source.names[number] for number in chosen]
    extensions = [name[name.rfind(".") + 1 :].lower() for name in names]
    encoded = [keys[number].encode() for number in chosen]
    members = [b"%b.%b" % (key, extension.encode()) for key, extension in zip(encoded, extensions, strict=True)]
    headers = ustar_headers(members, sizes).tobytes()
    tails = label_members(encoded, labels.clip(0)).tobytes() if source.class_names else b""
    ends = BLOCK + -(-sizes // BLOCK) * BLOCK  # of an image's blocks, counted from its header on
    rows = zip(chosen, extensions, sizes.tolist(), ends.tolist(), labels.tolist(), strict=True)
    for i, (number, extension, size, filled, label) in enumerate(rows):
        start = archive.position + BLOCK
        room = archive.room(filled + 2 * BLOCK)  # to the end of the label
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
        samples.append((number, extension, start, size, zlib.crc32(data)))
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

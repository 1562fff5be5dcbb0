"""Writes one shard: reads its images, looks at their headers, lays them out as a tar, and keeps the offsets."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.archive import Archive, label_members, ustar_headers, writing_archive
from shards.destination import WrittenShard
from shards.image_header import DEFAULT_MAX_PIXELS, DecodeError, ImageInfo, inspect
from shards.offsets import Skipped, offset_name, pack_columns
from shards.places import Location, folder_at
from shards.sources import Source
from shards.storage import printable, write_atomic
from shards.tar import BLOCK

MAX_IMAGE_BYTES = 1 << 30
_HEADERS_AT_ONCE = 1024
_HEAD_BYTES = 2048  # of a JPEG, in which its size mostly is


@dataclass(frozen=True)
class Options:
    """What is done to the images; `resize` 0 keeps their bytes."""

    json_member: bool = False
    decode_check: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
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
        with contextlib.suppress(DecodeError):
            after += len(_changed(source, number, options=options)[0])
            before += int(source.sizes[number])
    return min(1.0, after / before) if before else 1.0


def write_shard(
    name: str, place: Location, *, source: Source, numbers: NDArray[np.int64], keys: Sequence[str], options: Options
) -> WrittenShard:
    """Write images `numbers` (int64 [n]) of a source to the shard at `place`, and then its offset file.

    `keys` are those of the whole source. What is no usable image is left out, with the reason.
    """
    skipped: list[Skipped] = []
    too_large = np.flatnonzero(source.sizes[numbers] > MAX_IMAGE_BYTES)
    for number in numbers[too_large].tolist():
        why = f"{source.sizes[number]} bytes is above the limit of {MAX_IMAGE_BYTES} for one image"
        skipped.append((printable(source.paths[number]), why))
    numbers = np.delete(numbers, too_large)
    changed = options.json_member or options.decode_check or options.resize
    with writing_archive(place) as archive, source.reading(numbers.tolist()):
        shard = _Shard(archive, source, keys, options, skipped)
        for part in np.split(numbers, range(_HEADERS_AT_ONCE, len(numbers), _HEADERS_AT_ONCE)):
            (shard.add_changed if changed else shard.add_as_they_are)(part)
        num_bytes, sha256 = archive.finish()
    chosen, extensions, starts, sizes, crc32 = zip(*shard.samples, strict=True) if shard.samples else [()] * 5
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
    return WrittenShard(name, num_bytes, len(shard.samples), sha256, skipped)


@dataclass
class _Shard:
    """A shard being filled."""

    archive: Archive
    source: Source
    keys: Sequence[str]  # of the whole source
    options: Options
    skipped: list[Skipped]
    samples: list[_Written] = field(default_factory=list)

    def add_as_they_are(self, numbers: NDArray[np.int64]) -> None:
        """Add images with their labels: as many at a time as a buffer has room for, laid out before they are read."""
        chosen, sizes, labels = numbers.tolist(), self.source.sizes[numbers].clip(0), self.source.labels[numbers]
        names = self.source.names
        extensions = [_extension(names[number]) for number in chosen]
        encoded = [self.keys[number].encode() for number in chosen]
        members = [b"%b.%b" % (key, extension.encode()) for key, extension in zip(encoded, extensions, strict=True)]
        headers = ustar_headers(members, sizes)
        tails = label_members(encoded, labels.clip(0)).reshape(-1, 2, BLOCK)
        images = BLOCK + -(-sizes // BLOCK) * BLOCK
        ends = np.cumsum(images + 2 * BLOCK * (labels >= 0))
        starts = np.append(0, ends[:-1])
        first, limit = 0, len(chosen)
        while first < len(chosen):
            room = self.archive.room(int(ends[first] - starts[first]))
            past = int(np.searchsorted(ends, starts[first] + len(room), side="right"))
            part = slice(first, min(past, first + limit))
            limit *= 2
            begin = starts[part] - starts[first]  # in the room, as are all positions from here on
            blocks = np.frombuffer(room, dtype=np.uint8).reshape(-1, BLOCK)
            blocks[(begin + images[part]) // BLOCK - 1] = 0  # the images' last blocks, which they need not fill
            blocks[begin // BLOCK] = headers[part]
            labelled = np.flatnonzero(labels[part] >= 0)
            after = (begin + images[part])[labelled] // BLOCK
            blocks[after], blocks[after + 1] = tails[part][labelled, 0], tails[part][labelled, 1]
            begins, lengths = (begin + BLOCK).tolist(), sizes[part].tolist()
            crc32, sound = self.source.read_many(
                chosen[part], room, begin + BLOCK, sizes[part], max_pixels=self.options.max_pixels
            )
            usable = len(begins)
            for i in [i for i in range(usable) if i >= len(sound) or not sound[i]]:
                number, data = chosen[first + i], room[begins[i] : begins[i] + lengths[i]]
                try:
                    if i >= len(sound):
                        self.source.read(number, data)
                        crc32.append(zlib.crc32(data))
                    _inspect(data, max_pixels=self.options.max_pixels)
                except DecodeError as error:
                    self.skipped.append((printable(self.source.paths[number]), str(error)))
                    first += 1  # the images after it are laid out anew, few at first: more like it may come
                    usable, limit = i, 4
                    break
            if usable:
                offsets = (self.archive.position + begin[:usable] + BLOCK).tolist()
                rows = chosen[part][:usable], extensions[part][:usable], offsets, lengths[:usable], crc32[:usable]
                self.samples += zip(*rows, strict=True)
                self.archive.advance(int(ends[part][usable - 1] - starts[part][0]))
                first += usable

    def add_changed(self, numbers: NDArray[np.int64]) -> None:
        """Add images one by one, with whatever is done to them, and with their labels and JSON."""
        for number in numbers.tolist():
            try:
                data, extension, info = _changed(self.source, number, options=self.options)
                about = self.source.about(number) if self.options.json_member else {}
            except DecodeError as error:
                self.skipped.append((printable(self.source.paths[number]), str(error)))
                continue
            offset = self.archive.add(f"{self.keys[number]}.{extension}", data)
            self.samples.append((number, extension, offset, len(data), zlib.crc32(data)))
            if self.source.labels[number] >= 0:
                self.archive.add(f"{self.keys[number]}.cls", b"%d" % self.source.labels[number])
            if self.options.json_member:
                about = {"path": self.source.paths[number], **about, "width": info.width, "height": info.height}
                self.archive.add(f"{self.keys[number]}.json", json.dumps(about).encode())


def _changed(source: Source, number: int, *, options: Options) -> tuple[bytes | bytearray, str, ImageInfo]:
    """The bytes of an image as they are to be stored, their ending and header."""
    data = bytearray(max(0, int(source.sizes[number])))
    source.read(number, memoryview(data))
    info = _inspect(memoryview(data), max_pixels=options.max_pixels)
    if options.resize or options.decode_check:
        from shards.reencode import check_decodes, shrink  # here, since it brings torch, which takes seconds

        if options.resize and min(info.width, info.height) > options.resize:
            smaller = shrink(bytes(data), info, short_side=options.resize, quality=options.quality)
            return smaller, "jpg", inspect(smaller, max_pixels=options.max_pixels)
        if options.decode_check:
            check_decodes(bytes(data), info)
    return data, _extension(source.names[number]), info


def _extension(name: str) -> str:
    return name[name.rfind(".") + 1 :].lower()


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

"""Tar archives at the level of headers: writing ustar ones by hand, and finding the samples of any that exists.

Python's tarfile writes 13,000 files a second and these headers 46,000 and more, since nothing but the name, the size
and the checksum changes from one to the next.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from shards.keys import NAME_BYTES, PREFIX_BYTES, split_name
from shards.offsets import Sample, Skipped
from shards.storage import printable

BLOCK = 512
END = bytes(2 * BLOCK)  # two empty blocks end an archive
MAX_MEMBER = (1 << 33) - 1  # 11 octal digits

# mode, owner and group | time: 1980-01-01, since GNU tar warns of 1970 | an ordinary file, no link, no owner's name
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"%011o\0" % 315532800
_KIND = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
_FIXED_SUM = sum(_OWNER) + sum(_TIME) + sum(_KIND) + 8 * ord(" ")  # the checksum counts its own field as spaces

# As webdataset (1.0.2) does it: what it skips, and how it splits a name into key and ending.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_KEY_AND_ENDING = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


def ustar_header(name: str, *, size: int) -> bytes:
    """The 512 bytes before a member of `size` bytes; equal names and sizes give equal bytes."""
    parts = split_name(name.encode())
    assert parts is not None and size <= MAX_MEMBER, (name, size)
    folder, base = parts
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(folder) + sum(base) + sum(digits))
    padding = bytes(BLOCK - 345 - PREFIX_BYTES)
    name_field, folder_field = base.ljust(NAME_BYTES, b"\0"), folder.ljust(PREFIX_BYTES, b"\0")
    return b"".join((name_field, _OWNER, digits, _TIME, checksum, _KIND, folder_field, padding))


def padded(size: int) -> int:
    """`size` rounded up to whole blocks, as members lie in an archive."""
    return -(-size // BLOCK) * BLOCK


def scan_tar(path: Path, *, image_extensions: Sequence[str]) -> tuple[list[Sample], list[Skipped]]:
    """The samples of a tar file (ustar, pax or GNU), grouped as webdataset groups them, and the members left out.

    A sample's image is the member with the first of `image_extensions` that it has; its label is the `cls` member.
    `ValueError` naming the file when it is truncated or damaged, when a key comes twice, or when a `cls` is no number.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for key, members in groupby(_members(archive, skipped), key=lambda member: member[0]):
                if key in seen:
                    raise ValueError(f"shard {path} holds the key {key!r} twice; a sample's members must be adjacent")
                seen.add(key)
                endings: dict[str, tarfile.TarInfo] = {}
                for _, ending, member in members:
                    if ending in endings:
                        raise ValueError(f"shard {path} holds {member.name!r} twice")
                    endings[ending] = member
                extension = next((ending for ending in image_extensions if ending in endings), None)
                if extension is None:
                    skipped.append((printable(key), f"no image among its members ({', '.join(endings)})"))
                    continue
                image, label = endings[extension], -1
                if "cls" in endings:
                    label = _parse_label(archive, endings["cls"], path=path)
                crc32 = _crc32(file, image)
                samples.append(
                    Sample(key, extension, image.offset_data, image.size, label, source=image.name, crc32=crc32)
                )
            file.seek(archive.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError(f"shard {path} is cut off or damaged after byte {archive.offset}; copy it again")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"shard {path} is cut off or damaged ({error}); copy it again") from error
    except OSError as error:
        raise ValueError(f"cannot read shard {path}: {error.strerror or error}") from error
    return samples, skipped


def _members(archive: tarfile.TarFile, skipped: list[Skipped]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, lower-case ending, member) for the members that webdataset would yield; the others go to `skipped`."""
    for member in archive:
        match = _KEY_AND_ENDING.fullmatch(member.name)
        if _SKIPPED.match(member.name):
            skipped.append((printable(member.name), "a name that webdataset skips"))
        elif member.isdir():
            continue
        elif match is None:
            skipped.append((printable(member.name), "no key and ending"))
        elif not member.isreg() or member.issparse():
            skipped.append((printable(member.name), "a link, a sparse or a special file"))
        else:
            yield match[1], match[2].lower(), member


def _crc32(file: BinaryIO, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)
    left, crc32 = member.size, 0
    while left:
        if not (piece := file.read(min(left, 1 << 20))):
            raise EOFError(f"{member.name!r} ends early")
        left, crc32 = left - len(piece), zlib.crc32(piece, crc32)
    return crc32


def _parse_label(archive: tarfile.TarFile, member: tarfile.TarInfo, *, path: Path) -> int:
    stream = archive.extractfile(member)
    text = stream.read(32) if stream is not None else b""
    try:
        label = int(text)
    except ValueError:
        label = -2
    if not -1 <= label < 1 << 31:
        raise ValueError(f"shard {path}: {member.name!r} holds {text!r}, which is no class number (0, 1, …)")
    return label

"""Tar archives at the level of headers: writing ustar ones by hand, and reading any that exists, in one pass.

Python's tarfile writes 13,000 files a second and these headers 46,000 and more, since nothing but the name, the size
and the checksum changes from one to the next.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

from shards.image_header import MAX_IMAGE_BYTES
from shards.keys import NAME_BYTES, PREFIX_BYTES, split_name
from shards.offsets import Sample, Skipped
from shards.storage import printable

BLOCK = 512
EMPTY = bytes(BLOCK)
END = 2 * EMPTY  # two empty blocks end an archive
MAX_MEMBER = (1 << 33) - 1  # 11 octal digits
MAX_EXTENDED = 1 << 20  # bytes of a pax header or of GNU's long names
MAX_NAME = 4096  # what Linux lets a path have
_EXTENDED = b"xXgLK"  # kinds of headers that say more about the next member
_REGULAR = b"0\0007"  # kinds of ordinary files
_WITHOUT_CONTENTS = b"123456"  # links, devices, folders

# mode, owner and group | time: 1980-01-01, since GNU tar warns of 1970 | an ordinary file, no link, no owner's name
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"%011o\0" % 315532800
_KIND = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2
_FIXED_SUM = sum(_OWNER) + sum(_TIME) + sum(_KIND) + 8 * ord(" ")  # the checksum counts its own field as spaces

# As webdataset (1.0.2) does it: what it skips, and how it splits a name into key and ending.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_KEY_AND_ENDING = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_LABEL = re.compile(rb"\s*-?\d{1,10}\s*")
_SHOWN = 10  # endings that a report names


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


class Member(NamedTuple):
    """One member of an archive; its contents are the `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int
    kind: str  # file | folder | other (links, devices, sparse files and what we do not know)


class TarStream:
    """The members of a tar (ustar, pax, GNU) that comes piece by piece, each byte once.

        for member in tar:
            crc32 = tar.crc32()         # or tar.contents(), or nothing: what is left is passed over

    Nothing that a header says is believed before it is checked, and nothing is allocated by it. Python's tarfile reads
    the same members (a test compares them), but a tenth of these, and takes a damaged header for the end.

    Args:
        pieces: the bytes, in order; a piece is not looked at any more when the next one is asked for.
        name: of the shard, for errors.
        num_bytes: the size of the file, None where it is not known.

    Raises:
        ValueError: while iterating: one line with the shard, the byte and what is wrong there.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview], *, name: str, num_bytes: int | None = None) -> None:
        self.name, self.num_bytes = name, num_bytes
        self.position = 0
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")
        self._at = 0  # in the piece
        self._left = 0  # of the current member's contents

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next_member()) is not None:
            self._left = member.size
            yield member
            self._skip(member.offset + padded(member.size) - self.position)
        self._check_end()

    def crc32(self) -> int:
        """Of the current member's contents."""
        value = 0
        left, self._left = self._left, 0
        for part in self._take(left):
            value = zlib.crc32(part, value)
        return value

    def contents(self) -> bytes:
        """The current member's contents."""
        left, self._left = self._left, 0
        return self._read(left)

    def _next_member(self) -> Member | None:
        """The header of the next member with the extended ones before it; None at the end of the archive."""
        name: str | None = None
        size: int | None = None
        sparse = False
        first = self.position
        while True:
            at = self.position
            block = self._block()
            if block == EMPTY:
                if at != first:
                    raise self._damaged(at, "the archive ends between a member's two headers")
                return None
            stored = self._checked_size(block, at)
            kind = block[156:157]
            if kind not in _EXTENDED:
                break
            if stored > MAX_EXTENDED:
                raise self._damaged(at, f"an extended header of {stored} bytes, at most {MAX_EXTENDED} are read")
            text = self._read(padded(stored))[:stored]
            if kind == b"L":
                name = name or _decode(text.partition(b"\0")[0])
            elif kind in b"xXg":
                fields = self._pax_fields(text, at)
                if kind == b"g":
                    if not fields.keys().isdisjoint((b"path", b"size")):
                        raise self._damaged(at, "a global header that gives all members one name or size")
                    continue
                sparse = sparse or any(field.startswith(b"GNU.sparse.") for field in fields)
                if b"path" in fields:
                    name = name or _decode(fields[b"path"].rstrip(b"/"))
                if b"size" in fields and size is None:
                    size = self._number(fields[b"size"], at, base=10)
        short = block[:NAME_BYTES].partition(b"\0")[0]
        if kind in _WITHOUT_CONTENTS or (kind == b"\0" and short.endswith(b"/")):
            size = 0  # whatever the header says: no contents follow
        elif size is None:
            size = stored
        if kind == b"S" and block[482]:  # more of the map of an old GNU sparse file
            while self._block()[504]:
                pass
        if block[257:263] == b"ustar\0" and block[345]:
            short = block[345 : 345 + PREFIX_BYTES].partition(b"\0")[0] + b"/" + short
        name = name or _decode(short)
        if len(name) > MAX_NAME:
            raise self._damaged(at, f"a name of {len(name)} characters, at most {MAX_NAME} are read")
        if self.num_bytes is not None and size > self.num_bytes - self.position:
            raise self._damaged(at, f"{printable(name)!r} has {size} bytes, {self.num_bytes - self.position} follow")
        if kind == b"5" or (kind == b"\0" and short.endswith(b"/")):
            return Member(name, self.position, size, "folder")
        return Member(name, self.position, size, "file" if kind in _REGULAR and not sparse else "other")

    def _checked_size(self, block: bytes, at: int) -> int:
        """The size field of a header whose checksum is right."""
        field = block[148:156]
        if not at and not field.strip(b"\0 ").isdigit():
            raise self._damaged(at, f"it begins with {block[:8]!r}, which is no plain tar")
        # Adler's first half is one more than the sum of the bytes, as long as that stays below 65521.
        total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2 - sum(field) + 8 * 32
        if (found := self._number(field, at, base=8)) != total:
            negative = sum(byte > 127 for byte in block[:148] + block[156:])
            if found != total - 256 * negative:  # as programs have it that take bytes for signed
                raise self._damaged(at, "the checksum of the header there is wrong")
        return self._number(block[124:136], at, base=8)

    def _number(self, field: bytes, at: int, *, base: int) -> int:
        if base == 8 and field[0] == 0x80:  # binary, for sizes from 8 GiB on
            return int.from_bytes(field[1:])
        text = field.partition(b"\0")[0].strip()
        if base == 8 and not text:
            return 0
        try:
            return int(text if text.isdigit() and len(text) < 20 else b"?", base)
        except ValueError:
            raise self._damaged(at, f"a header holds {field[:20]!r} where a number belongs") from None

    def _pax_fields(self, text: bytes, at: int) -> dict[bytes, bytes]:
        """The records "LENGTH KEY=VALUE" of a pax header."""
        fields = {}
        position, end = 0, len(text.rstrip(b"\0"))
        while position < end:
            digits = text[position : position + 20].partition(b" ")[0]
            past = position + (int(digits) if digits.isdigit() else 0)
            key, equals, value = text[position + len(digits) + 1 : past].partition(b"=")
            if not (equals and value.endswith(b"\n") and past <= end):
                raise self._damaged(at, "a pax header is malformed")
            fields[key] = value[:-1]
            position = past
        return fields

    def _block(self) -> bytes:
        """The next 512 bytes."""
        part = self._piece[self._at : self._at + BLOCK]
        if len(part) == BLOCK:
            self._at += BLOCK
            self.position += BLOCK
            return bytes(part)
        return self._read(BLOCK)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        for part in self._take(count):
            data += part
        return bytes(data)

    def _skip(self, count: int) -> None:
        inside = min(count, len(self._piece) - self._at)
        self._at += inside
        self.position += inside
        for _ in self._take(count - inside):
            pass

    def _take(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes in parts, each to be used before the next is asked for."""
        while count:
            if self._at == len(self._piece):
                self._piece, self._at = memoryview(next(self._pieces, b"")), 0
                if not self._piece:
                    raise self._damaged(self.position, "the file ends there")
            part = self._piece[self._at : self._at + count]
            self._at += len(part)
            self.position += len(part)
            count -= len(part)
            yield part

    def _check_end(self) -> None:
        """Read what follows the end of the archive, which must be empty blocks: else something would be left out."""
        end = self.position
        rest = bytes(self._piece[self._at :])
        while rest or (rest := bytes(next(self._pieces, b""))):
            if rest.strip(b"\0"):
                raise self._damaged(end, "the archive ends there, but more follows; pack it again if tars were joined")
            self.position += len(rest)
            rest = b""

    def _damaged(self, at: int, what: str) -> ValueError:
        return ValueError(f"shard {self.name} is cut off or damaged at byte {at} ({what}); copy it again")


def scan_tar(tar: TarStream, *, image_extensions: Sequence[str]) -> tuple[list[Sample], list[Skipped]]:
    """The samples of a tar file, grouped as webdataset groups them, and the members left out.

    A sample's image is the member with the first of `image_extensions` that it has; its label is the `cls` member.

    Raises:
        ValueError: the file is truncated or damaged, a key comes twice, or a `cls` is no number; names the file.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for key, files in groupby(sample_files(tar, skipped=skipped), key=lambda file: file[0]):
        if key in seen:
            raise ValueError(f"shard {tar.name} holds the key {key!r} twice; a sample's members must be adjacent")
        seen.add(key)
        endings: dict[str, Member] = {}
        crc32: dict[str, int] = {}
        label = -1
        for _, ending, member in files:
            if ending in endings:
                raise ValueError(f"shard {tar.name} holds {member.name!r} twice")
            endings[ending] = member
            if ending == "cls":
                label = read_label(tar, member)
            elif ending in image_extensions:
                crc32[ending] = tar.crc32()
        extension = next((ending for ending in image_extensions if ending in endings), None)
        if extension is None:
            others = ", ".join([*islice(endings, _SHOWN), *["…"] * (len(endings) > _SHOWN)])
            skipped.append((printable(key), f"no image among its members ({others})"))
            continue
        image = endings[extension]
        if image.size > MAX_IMAGE_BYTES:
            skipped.append((printable(key), f"its image has {image.size} bytes, at most {MAX_IMAGE_BYTES} are read"))
            continue
        samples.append(
            Sample(key, extension, image.offset, image.size, label, source=image.name, crc32=crc32[extension])
        )
    return samples, skipped


def sample_files(tar: TarStream, *, skipped: list[Skipped]) -> Iterator[tuple[str, str, Member]]:
    """(key, lower-case ending, member) for the members that webdataset would yield; the others go to `skipped`."""
    for member in tar:
        match = _KEY_AND_ENDING.fullmatch(member.name)
        if _SKIPPED.match(member.name):
            skipped.append((printable(member.name), "a name that webdataset skips"))
        elif member.kind == "folder":
            continue
        elif match is None:
            skipped.append((printable(member.name) or f"(byte {member.offset})", "no key and ending"))
        elif member.name.rpartition("/")[2].startswith("."):
            skipped.append((printable(member.name), "a hidden file"))  # macOS puts ._NAME beside each
        elif member.kind != "file":
            skipped.append((printable(member.name), "a link, a sparse or a special file"))
        else:
            yield match[1], match[2].lower(), member


def read_label(tar: TarStream, member: Member) -> int:
    """The class number that the current member, a `cls`, holds; `ValueError` naming it when it holds none."""
    text = tar.contents() if member.size <= 32 else b"%d bytes" % member.size
    label = int(text) if _LABEL.fullmatch(text) else -2
    if not -1 <= label < 1 << 31:
        raise ValueError(f"shard {tar.name}: {member.name!r} holds {text!r}, which is no class number (0, 1, …)")
    return label


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")

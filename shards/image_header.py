"""What the first bytes of a JPEG, PNG or WebP file say: format, size and EXIF orientation, without decoding anything.

Formats are told by their contents, never by a file's ending. Reading a header allocates nothing that depends on the
sizes written in it, so a decompression bomb is refused here for the price of a few reads.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

DEFAULT_MAX_PIXELS = 100_000_000  # 300 MB decoded
MAX_IMAGE_BYTES = 1 << 30  # of a file
_MAX_PARTS = 100_000  # segments of a JPEG, chunks of a PNG or WebP
_MAX_PASSES = 20  # all scans of a JPEG together, as a multiple of max_pixels; progressive ones have 10 as a rule
_FILL = re.compile(rb"\xff*")


class DecodeError(ValueError):
    """An image that cannot be used; the message is one line with the reason."""


@dataclass(frozen=True)
class ImageInfo:
    """A header. `width` and `height` are those of the picture as shown, that is after the EXIF orientation."""

    format: str  # jpeg | png | webp
    width: int
    height: int
    orientation: int = 1  # EXIF: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 with the axes exchanged
    components: int = 0  # colour components of a JPEG (1, 3 or 4); 0 for the others
    scans: int = 1  # passes over the picture that decoding takes: more in a progressive JPEG

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the pixels in the file, before the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def inspect(data: bytes, *, max_pixels: int) -> ImageInfo:
    """Read the header of an image file.

    Raises:
        DecodeError: empty, not a JPEG, PNG or WebP image, a damaged header, no pixels, more than `max_pixels`, or a
            JPEG that goes over them too often (a few kilobytes can keep a decoder busy for minutes).
    """
    if not data:
        raise DecodeError("file is empty (0 bytes)")
    try:
        if data[:3] == b"\xff\xd8\xff":
            info = _inspect_jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            info = _inspect_png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            info = _inspect_webp(data)
        else:
            raise DecodeError(f"not a JPEG, PNG or WebP image (starts with {data[:12]!r})")
    except (struct.error, IndexError) as error:
        raise DecodeError("header is truncated or damaged") from error
    if info.width < 1 or info.height < 1:
        raise DecodeError(f"header gives a size of {info.width} x {info.height} pixels")
    pixels = info.width * info.height
    if pixels > max_pixels:
        raise DecodeError(f"header gives {info.width} x {info.height} = {pixels} pixels, above max_pixels {max_pixels}")
    if info.scans * pixels > _MAX_PASSES * max_pixels:
        raise DecodeError(
            f"JPEG of {info.width} x {info.height} pixels with {info.scans} scans, above {_MAX_PASSES} times "
            f"max_pixels {max_pixels} together"
        )
    return info


def _info(format: str, width: int, height: int, *, orientation: int, components: int = 0, scans: int = 1) -> ImageInfo:
    if orientation >= 5:
        width, height = height, width
    return ImageInfo(format, width, height, orientation, components, scans)


def _inspect_jpeg(data: bytes) -> ImageInfo:
    """Walk the segments up to the frame header (SOF); the EXIF segment, if any, comes before it."""
    position, orientation = 2, 1
    for _ in range(_MAX_PARTS):
        if data[position] != 0xFF:
            raise DecodeError("JPEG header is damaged")
        fill = _FILL.match(data, position)  # any number of fill bytes may precede a marker
        assert fill is not None
        position = fill.end()
        marker = data[position]
        position += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            continue
        if marker in (0xD9, 0xDA):
            raise DecodeError("JPEG without a frame header")
        (length,) = struct.unpack_from(">H", data, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 2)
            if precision != 8:
                raise DecodeError(f"JPEG with {precision} bits per component (only 8 are supported)")
            scans = 1
            if marker in (0xC2, 0xC6, 0xCA, 0xCE) or not _is_single_scan(data, position + length, components):
                scans = data.count(b"\xff\xda", position)
            return _info("jpeg", width, height, orientation=orientation, components=components, scans=scans)
        if marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 8 : position + length])
        position += length
    raise DecodeError(f"JPEG with more than {_MAX_PARTS} segments before its frame header")


def _is_single_scan(data: bytes, position: int, components: int) -> bool:
    """Whether the first scan of a sequential JPEG holds all its components; decoders then look no further."""
    start = data.find(b"\xff\xda", position)
    return start < 0 or start + 4 >= len(data) or data[start + 4] >= components


def _inspect_png(data: bytes) -> ImageInfo:
    if data[12:16] != b"IHDR":
        raise DecodeError("PNG without an IHDR chunk")
    width, height = struct.unpack_from(">II", data, 16)
    orientation = 1
    for name, start, length in _chunks(data, 8, order=">", length_first=True):
        if name == b"eXIf":
            orientation = _exif_orientation(data[start : start + length])
    return _info("png", width, height, orientation=orientation)


def _inspect_webp(data: bytes) -> ImageInfo:
    size: tuple[int, int] | None = None
    orientation = 1
    for name, start, length in _chunks(data, 12, order="<", length_first=False):
        if name == b"VP8X":
            size = (_uint24(data, start + 4) + 1, _uint24(data, start + 7) + 1)
        elif name == b"VP8 " and size is None:
            if data[start + 3 : start + 6] != b"\x9d\x01\x2a":
                raise DecodeError("WebP frame header is damaged")
            width, height = struct.unpack_from("<HH", data, start + 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", data, start + 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif name == b"EXIF":
            exif = data[start : start + length]
            orientation = _exif_orientation(exif[6:] if exif[:6] == b"Exif\0\0" else exif)
    if size is None:
        raise DecodeError("WebP without a frame header")
    return _info("webp", *size, orientation=orientation)


def _uint24(data: bytes, position: int) -> int:
    low, high = struct.unpack_from("<HB", data, position)
    return low | high << 16


def _chunks(data: bytes, position: int, *, order: str, length_first: bool) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of the contents, length) of the chunks of a PNG (length, name, contents, CRC) or RIFF file."""
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            return
        if length_first:
            length, name = struct.unpack_from(order + "I4s", data, position)
            step = length + 12
        else:
            name, length = struct.unpack_from(order + "4sI", data, position)
            step = 8 + length + length % 2
        yield name, position + 8, length
        position += step
    raise DecodeError(f"image of more than {_MAX_PARTS} chunks")


def _exif_orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory of a TIFF block; 1 where it is missing or malformed, as viewers do."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for k in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * k)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1

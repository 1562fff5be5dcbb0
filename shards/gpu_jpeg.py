"""Which image files a GPU may decode: JPEGs of the plain kind, and structurally whole.

A GPU's JPEG engine takes baseline files of one scan; nvJPEG decodes others in the host's time, one by one, and takes
little notice of damage. So everything else is left to the CPU, whose verdict on a file is the rule: what it would
reject for its structure (cut off, without an end, with tables missing) never comes to a GPU. What this cannot see is
damage within the coded pixels of a file that is whole otherwise; `scaler verify --decode` finds such files.
"""

from __future__ import annotations

import struct

import numpy as np

from shards.image_header import ImageInfo

MOST_PIXELS = 1 << 25  # 100 MB decoded; larger ones cost the CPU less, which may decode them at ½ to ⅛
_LONGEST_SIDE = 1 << 14  # pixels
_MAX_SEGMENTS = 1000  # before the scan; a long ICC profile has some tens
# Sampling of (Y, Cb, Cr), horizontal in the upper four bits: 4:4:4, 4:2:2, 4:4:0, 4:2:0; and of a grey picture.
_SAMPLINGS = frozenset({(0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x12, 0x11, 0x11), (0x22, 0x11, 0x11), (0x11,)})
_COLORS = frozenset({(1, 2, 3), (0, 1, 2)})  # names of the components that mean YCbCr to every decoder
_TABLE_BYTES = {0: 65, 1: 129}  # a quantisation table of 8 and of 16 bits, with its name


def why_not_on_gpu(data: bytes, info: ImageInfo) -> str | None:
    """Why the CPU must decode the image file `data`, of which `info` is the header, in a few words; None: a GPU may."""
    if info.format != "jpeg":
        return info.format.replace("png", "PNG").replace("webp", "WebP")
    if info.components not in (1, 3):
        return f"JPEG of {info.components} components"
    if info.orientation != 1:
        return "JPEG turned by its EXIF orientation"
    if info.width * info.height > MOST_PIXELS or max(info.width, info.height) > _LONGEST_SIDE:
        return "very large JPEG"
    try:
        return _look(data, info)
    except (struct.error, IndexError):
        return "damaged JPEG"


def _look(data: bytes, info: ImageInfo) -> str | None:
    """Walk the segments to the scan, and see that it is the only one and ends with the file."""
    position = 2
    quantization: set[int] = set()
    huffman: set[int] = set()
    components: list[tuple[int, int, int]] = []  # (name, sampling, quantisation table)
    for _ in range(_MAX_SEGMENTS):
        if data[position] != 0xFF:
            return "damaged JPEG"
        marker = data[position + 1]
        (length,) = struct.unpack_from(">H", data, position + 2)
        start, end = position + 4, position + 2 + length
        if length < 2 or end > len(data) or marker == 0xFF:
            return "damaged JPEG"
        if marker == 0xDB:
            while start < end:
                quantization.add(data[start] & 15)
                start += _TABLE_BYTES.get(data[start] >> 4, len(data))
        elif marker == 0xC4:
            while start < end:
                huffman.add(data[start])
                if (count := sum(data[start + 1 : start + 17])) > 256:
                    return "damaged JPEG"
                start += 17 + count
        elif marker == 0xC0 and not components:
            _, height, width, count = struct.unpack_from(">BHHB", data, start)
            if (width, height) != info.stored_size or count != info.components or length != 8 + 3 * count:
                return "damaged JPEG"
            components = [(data[i], data[i + 1], data[i + 2]) for i in range(start + 6, start + 6 + 3 * count, 3)]
            start = end
        elif marker == 0xC2:
            return "progressive JPEG"
        elif marker == 0xEE and data[start : start + 5] == b"Adobe":
            if info.components == 3 and data[start + 11] != 1:
                return "JPEG in RGB"
            start = end
        elif marker == 0xDA:
            break
        elif marker in (0xDD, 0xFE) or 0xE0 <= marker <= 0xEF:
            start = end
        else:
            return "JPEG of an unusual kind"
        if start != end:
            return "damaged JPEG"
        position = end
    else:
        return "JPEG of an unusual kind"

    names, samplings = tuple(c[0] for c in components), tuple(c[1] for c in components)
    if samplings not in _SAMPLINGS or (len(names) == 3 and names not in _COLORS):
        return "JPEG of an unusual kind"
    if data[start] != len(components) or length != 6 + 2 * len(components):
        return "JPEG of several scans"
    tables = [data[start + 2 + 2 * i] for i in range(len(components))]
    needed = {t >> 4 for t in tables} | {0x10 | t & 15 for t in tables}
    scanned = tuple(data[start + 1 + 2 * i] for i in range(len(components)))
    if scanned != names or not needed <= huffman or not {c[2] for c in components} <= quantization:
        return "damaged JPEG"
    return None if _ends_with_scan(data, end) else "damaged JPEG"


def _ends_with_scan(data: bytes, position: int) -> bool:
    """Whether the first marker in the coded pixels, but for restarts, is the end of the picture and of the file (which
    zeros may follow)."""
    coded = np.frombuffer(data, dtype=np.uint8, offset=position)
    at = np.flatnonzero(coded[:-1] == 0xFF)
    after = coded[at + 1]
    markers = at[(after != 0) & ((after & 0xF8) != 0xD0) & (after != 0xFF)]
    if not len(markers) or coded[markers[0] + 1] != 0xD9 or not markers[0]:
        return False
    return not coded[markers[0] + 2 :].any()

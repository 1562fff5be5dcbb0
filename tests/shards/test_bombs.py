"""Small files that would take much memory or time to decode: refused, or decoded within bounds."""

from __future__ import annotations

import io
import re
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from shards.decode import DecodeError, View, decode_views
from shards.image_header import inspect
from tests.images import encode_image, make_pixels

MAX_PIXELS = 4_000_000  # 12 MB decoded; WebP and progressive JPEG take a few times that on the way
MAX_GROWTH = 200 << 20
MAX_SECONDS = 10.0  # on a busy machine; each takes well under one


@contextmanager
def bounded() -> Iterator[None]:
    started, before = time.monotonic(), _peak()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert _peak() - before < MAX_GROWTH
    assert time.monotonic() - started < MAX_SECONDS


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def decode(data: bytes) -> str:
    """Why an image cannot be decoded; "" when it can."""
    try:
        decode_views(data, views=[View("v", 16)], seed=0, epoch=0, sample_id=0, max_pixels=MAX_PIXELS)
    except DecodeError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*extra: bytes, rows: bytes | None = None) -> bytes:
    """A black 100 x 100 picture with `extra` chunks before its pixels."""
    pixels = zlib.compress(bytes(301) * 100) if rows is None else rows
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def progressive(size: int, *, scans: int) -> bytes:
    """A black progressive JPEG whose last scan, of 14 bytes, is said again until there are so many."""
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def animation(frames: int) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("RGB", (500, 500), (40 * i % 256, 0, 0)) for i in range(frames)]
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def wide_animation() -> bytes:
    """An animation of small frames on a canvas of 16,000 x 16,000."""
    data = bytearray(animation(2))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = 2 * (15_999).to_bytes(3, "little")
    return bytes(data)


ZEROS = zlib.compress(bytes(1 << 28))  # 256 MiB in 260 KB
BOMBS = {
    "PNG with more pixels than it says": (png(rows=ZEROS), ""),
    "PNG text": (png(chunk(b"zTXt", b"key\0\0" + ZEROS)), "png cannot be decoded: .*too large"),
    "PNG international text": (png(chunk(b"iTXt", b"key\0\1\0\0\0" + ZEROS)), "png cannot be decoded: .*too large"),
    "PNG texts": (
        png(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 300),
        "cannot be decoded: .*memory",
    ),
    "PNG profile": (png(chunk(b"iCCP", b"name\0\0" + ZEROS)), "png cannot be decoded: .*too large"),
    "PNG of many chunks": (png(*[chunk(b"abCd", b"")] * 120_000), "more than 100000 chunks"),
    "PNG of many animated frames": (png(chunk(b"acTL", struct.pack(">II", 1 << 30, 0))), ""),
    "WebP animation": (animation(100), ""),
    "WebP animation on a wide canvas": (wide_animation(), "16000 x 16000 = 256000000 pixels, above max_pixels"),
    "JPEG of many scans": (progressive(2000, scans=1000), "JPEG of 2000 x 2000 pixels with 1000 scans, above 20 times"),
    "JPEG of many fill bytes": (b"\xff\xd8" + b"\xff" * (30 << 20), "header is truncated"),
    "JPEG of many segments": (b"\xff\xd8" + b"\xff\xfe\0\2" * 120_000, "more than 100000 segments"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(kind: str) -> None:
    data, words = BOMBS[kind]
    with bounded():
        reason = decode(data)
    assert re.search(words, reason) if words else not reason, reason


def test_scans_are_counted_where_decoders_look_at_them() -> None:
    pixels = make_pixels(64, 48, seed=0)
    plain = encode_image(pixels)
    assert inspect(plain, max_pixels=MAX_PIXELS).scans == 1
    assert inspect(plain + plain, max_pixels=MAX_PIXELS).scans == 1  # what follows the end is not looked at
    usual = progressive(64, scans=10)
    assert inspect(usual, max_pixels=MAX_PIXELS).scans == 10 and decode(usual) == ""
    assert decode(progressive(2000, scans=20)) == ""
    assert "with 21 scans" in decode(progressive(2000, scans=21))


def test_a_sequential_jpeg_of_several_scans() -> None:
    """One scan a component is as good as one for all; many more are refused."""
    data = encode_image(make_pixels(1600, 1200, seed=0))
    start = data.index(b"\xff\xda")
    luminance = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    several = data[:start] + luminance * 100 + data[start:]
    assert inspect(several, max_pixels=10**8).scans == 101
    with bounded():
        assert "with 101 scans" in decode(several)

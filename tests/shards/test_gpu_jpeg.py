"""Which files go to a GPU: plain whole JPEGs, and never one that its structure shows to be damaged."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.decode import DecodeError, decode_picture
from shards.gpu_jpeg import why_not_on_gpu
from shards.image_header import ImageInfo, inspect
from tests.images import encode_image, make_pixels
from tests.shards.views import BIG, encode

PIXELS = make_pixels(50, 38, seed=3)
IMAGE = Image.fromarray(PIXELS)
WHOLE = encode_image(PIXELS)


def why_not(data: bytes) -> str | None:
    return why_not_on_gpu(data, inspect(data, max_pixels=BIG))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(IMAGE, "JPEG", exif=exif)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("restarts", [0, 1])
def test_baseline_jpegs_go_to_the_gpu(subsampling: str, restarts: int) -> None:
    options = {"subsampling": subsampling, "restart_marker_rows": restarts, "optimize": not restarts}
    data = encode(IMAGE, "JPEG", icc_profile=b"x" * 70_000, **options)
    assert data.count(b"\xff\xdd") == restarts
    assert why_not(data) is None
    assert why_not(data + b"\0" * 9) is None  # padding
    assert why_not(data[:-2] + b"\xff\xff\xff\xd9") is None  # fill bytes before a marker


@pytest.mark.parametrize("subsampling", ["440", "444", "Gray"])
def test_other_samplings_that_engines_know(subsampling: str) -> None:
    gray = subsampling == "Gray"
    pixels = np.ascontiguousarray(PIXELS[..., :1] if gray else PIXELS)
    data = simplejpeg.encode_jpeg(pixels, colorspace="GRAY" if gray else "RGB", colorsubsampling=subsampling)
    assert inspect(data, max_pixels=BIG).components == (1 if gray else 3)
    assert why_not(data) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(IMAGE, "PNG"), "PNG"),
        (encode(IMAGE, "WEBP"), "WebP"),
        (encode(IMAGE.convert("CMYK"), "JPEG"), "4 components"),
        (encode(IMAGE, "JPEG", progressive=True), "progressive"),
        (encode(IMAGE, "JPEG", keep_rgb=True), "RGB"),
        (rotated(), "EXIF"),
        (simplejpeg.encode_jpeg(PIXELS, colorsubsampling="411"), "unusual"),
        (WHOLE[:-2], "damaged"),
        (WHOLE[:-1], "damaged"),
        (WHOLE + b"\xff\xd9", "damaged"),
        (WHOLE[:-2] + WHOLE[2:], "damaged"),  # a second picture in place of the end
        (WHOLE[: WHOLE.index(b"\xff\xda") + 14] + b"\xff\xd9", "damaged"),  # no pixels
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_else_is_left_to_the_cpu(data: bytes, reason: str) -> None:
    assert reason in str(why_not(data))


def test_very_large_ones_are_left_to_the_cpu() -> None:
    for width, height in ((8000, 8000), (20_000, 100)):
        assert why_not_on_gpu(WHOLE, ImageInfo("jpeg", width, height, components=3)) == "very large JPEG"


@pytest.mark.parametrize("marker", [0xDB, 0xC4])
def test_tables_must_be_there_and_fit(marker: int) -> None:
    start = WHOLE.index(bytes([0xFF, marker]))
    length = int.from_bytes(WHOLE[start + 2 : start + 4])
    assert why_not(WHOLE[:start] + WHOLE[start + 2 + length :]) == "damaged JPEG"
    shorter = (length - 1).to_bytes(2)
    assert why_not(WHOLE[: start + 2] + shorter + WHOLE[start + 4 : start + 1 + length] + WHOLE[start + 2 + length :])


def test_a_second_frame_header_is_none_of_a_plain_file() -> None:
    start = WHOLE.index(b"\xff\xc0")
    frame = WHOLE[start : start + 2 + int.from_bytes(WHOLE[start + 2 : start + 4])]
    assert why_not(WHOLE[:start] + frame + WHOLE[start:]) is not None


@settings(max_examples=100, deadline=None)
@given(st.integers(4, len(WHOLE) - 1))
def test_a_file_that_is_cut_off_never_goes_to_the_gpu(length: int) -> None:
    with contextlib.suppress(DecodeError):  # there is no header
        assert why_not(WHOLE[:length]) == "damaged JPEG"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(2, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_no_accident_of_ours_and_leaves_a_picture_of_its_size(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    try:
        info = inspect(bytes(data), max_pixels=10_000)
    except DecodeError:
        return
    if why_not_on_gpu(bytes(data), info) is not None:
        return
    try:
        picture, _ = decode_picture(bytes(data), info, 1)
    except DecodeError:
        return  # damage within the coded pixels, which only decoding shows
    assert picture.shape == (info.height, info.width, 3)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (info.width, info.height)

"""Every kind of unusual, damaged or hostile image file: the picture that Pillow shows, or a one-line DecodeError."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shards.decode import DecodeError, View, decode_views, inspect
from tests.images import encode_image, make_pixels
from tests.shards.views import BIG, CROP, difference, encode, full_decode, views_of, views_oracle


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_orientation_gives_the_views_of_the_upright_picture(orientation: int, format: str) -> None:
    upright = Image.fromarray(make_pixels(160, 112, seed=8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpeg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}, "png": {}}[format]
    turned = encode(stored, format.upper(), exif=exif, **options)
    plain = encode(upright, format.upper(), **options)
    info = inspect(turned, max_pixels=BIG)
    assert (info.width, info.height, info.orientation, info.format) == (160, 112, orientation, format)
    assert np.abs(full_decode(turned).astype(int) - full_decode(plain)).mean() < 1  # Pillow agrees on what is upright
    view = View("v", 40, count=6)
    mean, largest = difference(views_of(turned, view)["v"], views_of(plain, view)["v"])
    assert (mean < 1.0) if format == "jpeg" else (largest == 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + b"\0" * 4]
)
def test_damaged_exif_is_no_reason_to_lose_a_picture(exif: bytes) -> None:
    data = encode_image(make_pixels(40, 30, seed=0))
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert inspect(data[:2] + segment + data[2:], max_pixels=BIG).orientation == 1
    assert torch.equal(views_of(data[:2] + segment + data[2:], CROP)["crop"], views_of(data, CROP)["crop"])


def grey16(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)), "PNG")


def png16(pixels: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG written by hand (Pillow cannot): uint16 [h, w, channels]."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_is_scaled_not_clipped(color_type: int, channels: int) -> None:
    ramp = np.linspace(0, 65535, 48 * 40 * channels).astype(np.uint16).reshape(40, 48, channels)
    color = ramp[..., : 3 if channels >= 3 else 1]
    expected = np.broadcast_to(np.round(color.astype(float) / 257), (40, 48, 3)).astype(np.uint8)
    view = View("v", 24, count=4)
    got = views_of(png16(ramp, color_type), view)["v"]
    assert got.min() < 40 and got.max() > 200 and got.float().std() > 30
    for a, b in zip(got, views_oracle(expected, view), strict=True):
        assert difference(a, b)[1] <= 2


def test_grey_16_bit_by_pillow_is_scaled() -> None:
    values = np.linspace(0, 65535, 30 * 30).reshape(30, 30)
    expected = np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    view = View("v", 30, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert difference(views_of(grey16(values), view)["v"][0], torch.from_numpy(expected).permute(2, 0, 1))[1] <= 1


def unusual_images() -> dict[str, bytes]:
    picture = Image.fromarray(make_pixels(96, 72, seed=11))
    frames = [picture, ImageOps.invert(picture), ImageOps.mirror(picture)]
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(32)
    return {
        "cmyk jpeg": encode(picture.convert("CMYK"), "JPEG", quality=95),
        "grey jpeg": encode(picture.convert("L"), "JPEG", quality=95),
        "progressive jpeg": encode(picture, "JPEG", progressive=True, quality=95),
        "4:4:4 jpeg": encode(picture, "JPEG", subsampling=0, quality=95),
        "4:1:1 jpeg": encode(picture, "JPEG", subsampling="4:1:1", quality=95),
        "grey png": encode(picture.convert("L"), "PNG"),
        "black and white png": encode(picture.convert("1"), "PNG"),
        "palette png": encode(palette, "PNG"),
        "transparent palette png": encode(palette, "PNG", transparency=bytes(range(32))),
        "grey and alpha png": encode(picture.convert("LA"), "PNG"),
        "alpha png": encode(alpha, "PNG"),
        "animated png": encode(picture, "PNG", save_all=True, append_images=frames[1:]),
        "animated webp": encode(picture, "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "alpha webp": encode(alpha, "WEBP", lossless=True, exact=True),
        "lossy webp": encode(picture, "WEBP", quality=80),
    }


@pytest.mark.parametrize("kind", unusual_images())
def test_unusual_images_equal_pillow(kind: str) -> None:
    data = unusual_images()[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the oracle only
        expected = full_decode(data)
    view = View("v", 60, count=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = views_of(data, view)["v"]
    for a, b in zip(got, views_oracle(expected, view), strict=True):
        mean, largest = difference(a, b)
        assert (mean < 0.5 and largest <= 6) if "jpeg" in kind else largest <= 1


def test_a_wrong_ending_does_not_matter_since_contents_decide() -> None:
    pixels = make_pixels(40, 30, seed=0)
    formats = [inspect(encode_image(pixels, format=f), max_pixels=BIG).format for f in ("jpeg", "png", "webp")]
    assert formats == ["jpeg", "png", "webp"]


# ------------------------------------------------------------------------------------------------------------ damage


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def bombs() -> dict[str, bytes]:
    """Small files whose headers say 30,000 x 30,000 pixels (WebP: 16,383 x 16,383)."""
    pixels = make_pixels(40, 30, seed=0)
    jpeg = bytearray(encode_image(pixels))
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    lossy = bytearray(encode_image(pixels, format="webp"))
    start = lossy.find(b"\x9d\x01\x2a")
    lossy[start + 3 : start + 7] = struct.pack("<HH", 16_383, 16_383)
    lossless = bytearray(encode(Image.fromarray(pixels), "WEBP", lossless=True))
    start = lossless.find(b"VP8L") + 9
    lossless[start : start + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
    return {
        "jpeg": bytes(jpeg),
        "png": png_header(30_000, 30_000),
        "webp": bytes(lossy),
        "webp lossless": bytes(lossless),
    }


@pytest.mark.parametrize("kind", bombs())
def test_bombs_are_refused_without_allocation(kind: str) -> None:
    data = bombs()[kind]
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises(DecodeError, match="above max_pixels 100000000"):
            warnings.simplefilter("error")
            decode_views(data, views=[CROP], seed=0, epoch=0, sample_id=0, max_pixels=100_000_000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_max_pixels_is_the_only_limit() -> None:
    """Pillow's own limit (a warning from 89 million pixels on) does not apply; ours does, to the pixel."""
    data = encode(Image.new("1", (10_000, 9_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_views(data, views=[View("v", 8)], seed=0, epoch=0, sample_id=0, max_pixels=90_000_000)
    with pytest.raises(DecodeError, match="10000 x 9000 = 90000000 pixels, above max_pixels 89999999"):
        inspect(data, max_pixels=89_999_999)


def damaged_images() -> dict[str, tuple[bytes, str]]:
    pixels = make_pixels(200, 150, seed=3)
    jpeg, png, webp = (encode_image(pixels, format=f) for f in ("jpeg", "png", "webp"))
    progressive = encode(Image.fromarray(pixels), "JPEG", progressive=True)
    grey_cmyk = encode(Image.fromarray(pixels).convert("CMYK"), "JPEG")
    frame = jpeg.find(b"\xff\xc0")
    two_frames = jpeg[:frame] + jpeg[frame : frame + 19].replace(struct.pack(">HH", 150, 200), struct.pack(">HH", 9, 9))
    wide = bytearray(jpeg)
    wide[frame + 4] = 12
    hole = bytearray(png)
    hole[len(png) // 2 : len(png) // 2 + 40] = bytes(40)
    return {
        "zero bytes": (b"", "empty"),
        "text": (b"hello, this is not an image", "not a JPEG, PNG or WebP image"),
        "html": (b"<!DOCTYPE html>", "not a JPEG, PNG or WebP image"),
        "gif": (encode(Image.fromarray(pixels), "GIF"), "not a JPEG, PNG or WebP image"),
        "bmp": (encode(Image.fromarray(pixels), "BMP"), "not a JPEG, PNG or WebP image"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg without its last bytes": (jpeg[:-20], "truncated"),
        "half a progressive jpeg": (progressive[: len(progressive) // 2], "truncated"),
        "half a cmyk jpeg": (grey_cmyk[: len(grey_cmyk) // 2], "truncated"),
        "jpeg header only": (jpeg[:frame], "header"),
        "jpeg magic only": (jpeg[:3], "header"),
        "two frame headers": (two_frames + jpeg[frame:], "different sizes|frame header"),
        "12-bit jpeg": (bytes(wide), "12 bits"),
        "half a png": (png[: len(png) // 2], "png cannot be decoded"),
        "png with a hole": (bytes(hole), "png cannot be decoded"),
        "png header only": (png_header(20, 20), "png cannot be decoded"),
        "png of no pixels": (png_header(0, 20), "size of 0 x 20"),
        "png magic only": (png[:8], "IHDR|header"),
        "half a webp": (webp[: len(webp) // 2], "webp cannot be decoded"),
        "webp magic only": (webp[:12], "frame header"),
    }


@pytest.mark.parametrize("kind", damaged_images())
def test_damaged_images_are_one_line_errors(kind: str) -> None:
    data, words = damaged_images()[kind]
    with pytest.raises(DecodeError, match=words) as error:
        views_of(data, CROP)
    assert "\n" not in str(error.value)


def test_truncation_is_noticed_at_every_scale() -> None:
    jpeg = encode_image(make_pixels(800, 600, seed=1))
    for size in (200, 100, 50, 25):
        with pytest.raises(DecodeError, match="truncated"):
            views_of(jpeg[: len(jpeg) * 3 // 4], View("v", size, scale=(0.9, 1.0)))


def test_harmless_oddities_are_accepted() -> None:
    """Stray bytes before the end marker and after it: libjpeg warns, every viewer shows the picture."""
    jpeg = encode_image(make_pixels(200, 150, seed=3))
    good = views_of(jpeg, CROP)["crop"]
    assert torch.equal(views_of(jpeg + b"trailing junk", CROP)["crop"], good)
    assert difference(views_of(jpeg[:-2] + b"\0\1\2\3" + jpeg[-2:], CROP)["crop"], good)[0] < 1


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["jpeg", "png", "webp"]), st.data())
def test_flipped_bytes_give_views_or_a_decode_error(format: str, data: st.DataObject) -> None:
    content = bytearray(encode_image(make_pixels(33, 29, seed=6), format=format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        views = decode_views(bytes(content), views=[CROP], seed=0, epoch=0, sample_id=0, max_pixels=10**6)
    except DecodeError as error:
        assert "\n" not in str(error)
    else:
        assert views["crop"].shape == (2, 3, 64, 64)

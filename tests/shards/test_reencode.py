"""`--resize` against Pillow's own resize; what keeps its bytes; damaged ends."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.convert import convert
from shards.image_header import DecodeError, inspect
from shards.index import ShardIndex
from shards.reencode import check_decodes, shrink
from tests.images import encode_image, make_image_folder, make_pixels


def shrunk(data: bytes, *, short_side: int, quality: int = 95) -> Image.Image:
    info = inspect(data, max_pixels=10**8)
    return Image.open(io.BytesIO(shrink(data, info, short_side=short_side, quality=quality)))


def difference(picture: Image.Image, data: bytes, size: tuple[int, int]) -> float:
    """Mean difference, in grey levels, from Pillow's full decode, Lanczos resize and JPEG of the same quality."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    stream = io.BytesIO()
    upright.resize(size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=95)
    wanted = Image.open(stream)
    assert picture.size == size
    return float(np.abs(np.asarray(picture.convert("RGB"), dtype=float) - np.asarray(wanted, dtype=float)).mean())


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    ("width", "height", "short", "size"),
    [(640, 480, 200, (267, 200)), (480, 1000, 64, (64, 133)), (300, 299, 298, (299, 298))],
)
def test_as_pillow_resizes(kind: str, width: int, height: int, short: int, size: tuple[int, int]) -> None:
    data = encode_image(make_pixels(width, height, seed=3), format=kind, quality=90)
    picture = shrunk(data, short_side=short)
    assert (picture.format, picture.mode) == ("JPEG", "RGB")
    assert difference(picture, data, size) < (0.01 if kind == "png" else 1.5)


def test_never_fewer_pixels_than_needed() -> None:
    """Fine stripes survive where a scaled decode would have blurred them: at 1.9 times the size nothing is scaled."""
    stripes = np.zeros((380, 380, 3), dtype=np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = stripes[:, 2::8] = stripes[:, 3::8] = 255
    data = encode_image(stripes, quality=95)
    assert difference(shrunk(data, short_side=200), data, (200, 200)) < 0.5


def test_orientation_grey_transparency_and_profiles(tmp_path: Path) -> None:
    pixels = make_pixels(200, 100, seed=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, exif=exif, icc_profile=b"profile")
    picture = shrunk(stream.getvalue(), short_side=50)
    assert picture.size == (50, 100) and not picture.getexif() and "icc_profile" not in picture.info
    assert difference(picture, stream.getvalue(), (50, 100)) < 1

    grey = shrunk(encode_image(pixels[..., 0]), short_side=50)
    assert grey.mode == "L"

    alpha = np.dstack([pixels, np.zeros(pixels.shape[:2], dtype=np.uint8)])
    stream = io.BytesIO()
    Image.fromarray(alpha).save(stream, "PNG")
    assert difference(shrunk(stream.getvalue(), short_side=50), encode_image(pixels, format="png"), (100, 50)) < 0.01


def test_resizing_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "src"
    small = make_image_folder(source, num_images=6, classes=["a", "b"], size=40, format="mixed")
    large = encode_image(make_pixels(300, 200, seed=9), format="png")
    (source / "a/large.png").write_bytes(large)
    (source / "a/cut.jpg").write_bytes(encode_image(make_pixels(300, 200, seed=9))[:3000])
    report = convert(source, tmp_path / "out", resize=96, workers=2, shard_size="15KB", json_member=True)
    assert [path for path, _ in report.rejected] == ["a/cut.jpg"] and report.num_samples == 7
    index = ShardIndex.load(tmp_path / "out")
    entries = {entry.source: entry for entry in map(index.entry, range(7))}
    data = {
        source: (tmp_path / "out" / index.shard_names[e.shard]).read_bytes()[e.offset : e.offset + e.size]
        for source, e in entries.items()
    }
    for path in small:
        assert data[path.relative_to(source).as_posix()] == path.read_bytes(), "small enough: bytes kept"
    entry = entries["a/large.png"]
    assert (entry.extension, entry.key, index.class_names[entry.label]) == ("jpg", "a/large", "a")
    assert Image.open(io.BytesIO(data["a/large.png"])).size == (144, 96)
    again = convert(source, tmp_path / "two", resize=96, workers=1, shard_size="15KB", json_member=True)
    assert again == report
    assert all((tmp_path / "two" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in index.shard_names)
    assert convert(source, tmp_path / "two", resize=96, workers=1, shard_size="15KB", json_member=True).num_samples == 7
    with pytest.raises(ValueError, match=r"begun with other options \(resize 96 → 64, quality 90 → 30\)"):
        convert(source, tmp_path / "two", resize=64, quality=30, shard_size="15KB", json_member=True)
    for options, message in (
        ({"resize": 4}, "at least 8 pixels"),
        ({"quality": 80}, "of the JPEGs that resize makes"),
        ({"resize": 64, "quality": 101}, "from 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "x", **options)


def test_shards_are_as_large_as_asked_for_after_resizing(tmp_path: Path) -> None:
    for i in range(60):
        path = tmp_path / f"src/{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_image(make_pixels(90, 60, seed=i), format="png"))
    report = convert(tmp_path / "src", tmp_path / "out", resize=30, shard_size="40KB", workers=1)
    assert report.num_bytes / report.num_shards == pytest.approx(40_000, rel=0.35)
    assert (tmp_path / "src/0.png").stat().st_size * 60 > 5 * report.num_bytes


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_damaged_end_is_found(kind: str) -> None:
    data = encode_image(make_pixels(64, 64, seed=2), format=kind)
    info = inspect(data, max_pixels=10**8)
    check_decodes(data, info)
    for cut in (200, 40):
        with pytest.raises(DecodeError):
            check_decodes(data[:-cut], info)

"""How views are cut, against torchvision on the fully decoded picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from shards import decode, resize
from shards.decode import View, draw
from shards.random import keyed_uniform
from tests.images import encode_image, make_pixels
from tests.shards.views import CROP, box_oracle, difference, encode, full_decode, views_of, views_oracle

Cutter = Callable[..., None]
CUTS = [resize.cut_with_torch] if resize._kernel is None else [resize.cut_with_kernel, resize.cut_with_torch]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 70),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from(["png", "webp"]),
    st.integers(0, 10**9),
)
def test_lossless_views_equal_torchvision(
    width: int, height: int, size: int, interpolation: str, format: str, sample_id: int
) -> None:
    pixels = make_pixels(width, height, seed=sample_id % 7)
    data = encode(Image.fromarray(pixels), format.upper(), **({"lossless": True} if format == "webp" else {}))
    view = View("v", size, count=3, interpolation=interpolation)
    got = views_of(data, view, sample_id=sample_id)["v"]
    assert got.shape == (3, 3, size, size) and got.dtype == torch.uint8 and got.is_contiguous()
    for a, b in zip(got, views_oracle(pixels, view, sample_id=sample_id), strict=True):
        assert difference(a, b)[1] <= 1


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_views_equal_torchvision_at_full_scale(progressive: bool) -> None:
    data = encode(Image.fromarray(make_pixels(301, 203, seed=1)), "JPEG", quality=90, progressive=progressive)
    view = View("v", 128, count=8)
    for a, b in zip(views_of(data, view)["v"], views_oracle(full_decode(data), view), strict=True):
        mean, largest = difference(a, b)
        assert mean < 0.3 and largest <= 4  # decoders differ by a level or two before the resize


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [100, 50, 25])
@pytest.mark.parametrize("shape", [(801, 603), (800, 600), (797, 601)])
def test_dct_scaled_views_are_within_grey_levels(
    size: int, shape: tuple[int, int], cut: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the full decode, cut by Pillow."""
    monkeypatch.setattr(decode, "cut", cut)
    data = encode_image(make_pixels(*shape, seed=3), quality=95)
    view = View("v", size, count=6, scale=(0.4, 1.0), flip=0.0)
    numbers = keyed_uniform("crop", 0, 0, 0, "v", np.arange(6), count=41).tolist()
    boxes = [box_oracle(view, *shape, row) for row in numbers]
    pixels = min(min(box[2:]) for box in boxes) / size  # of the smallest box along a side of the view
    assert max(s for s in (1, 2, 4, 8) if pixels >= 1.4 * s) == {100: 2, 50: 4, 25: 8}[size]
    for got, (top, left, height, width) in zip(views_of(data, view)["v"], boxes, strict=True):
        box = Image.fromarray(full_decode(data)[top : top + height, left : left + width])
        exact = torch.from_numpy(np.array(box.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert difference(got, exact)[0] < 1


@pytest.mark.parametrize("cut", CUTS)
def test_views_of_photographs_are_those_of_a_full_decode(cut: Cutter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sharp photographs, as Pillow decodes, crops and resizes them: mean errors in grey levels."""
    monkeypatch.setattr(decode, "cut", cut)
    scaled = 0
    for picture in load_sample_images().images:
        data = encode_image(picture, quality=90)
        whole, (height, width) = full_decode(data), picture.shape[:2]
        for size in (224, 140, 96, 48, 24):
            view = View("v", size, count=10, flip=0.0)
            numbers = keyed_uniform("crop", 0, 0, 0, "v", np.arange(10), count=41)
            boxes = [box_oracle(view, width, height, row) for row in numbers.tolist()]
            for k, (top, left, h, w) in enumerate(boxes):
                out = np.empty((1, 3, size, size), dtype=np.uint8)
                options = {"views": [replace(view, count=1)], "draws": [numbers[k : k + 1]], "max_pixels": 10**8}
                decode.decode_into([out], data, **options, seconds=decode.Seconds())
                exact = Image.fromarray(whole[top : top + h, left : left + w]).resize((size, size), 3)
                is_scaled = min(h, w) >= 2 * 1.4 * size
                scaled += is_scaled
                error = np.abs(out[0].transpose(1, 2, 0).astype(int) - np.asarray(exact).astype(int)).mean()
                assert error < (2.5 if is_scaled else 0.5)
    assert scaled > 20


def test_the_decoder_scales_only_when_every_view_keeps_its_pixels() -> None:
    """A checkerboard of single pixels vanishes in a scaled decode: its contrast tells which scale was used."""
    board = np.indices((512, 512)).sum(axis=0) % 2 * 255
    data = encode(Image.fromarray(board.astype(np.uint8)), "JPEG", quality=100)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    contrast = {
        size: float(views_of(data, View("v", size, **whole))["v"].float().std())
        for size in (512, 300, 256)  # type: ignore[arg-type]
    }
    assert contrast[512] > 100  # untouched
    assert contrast[256] < 2
    both = views_of(data, View("large", 512, **whole), View("small", 256, **whole))  # type: ignore[arg-type]
    assert torch.equal(both["large"], views_of(data, View("large", 512, **whole))["large"])  # type: ignore[arg-type]


def test_boxes_follow_torchvision_in_distribution() -> None:
    """Means of area, log-ratio and relative position over 4,000 boxes, within 5 standard errors of torchvision's."""
    width, height, count = 500, 375, 4000
    view = View("v", 1, scale=(0.08, 1.0))
    drawn = draw(view, seed=0, epoch=0, sample_id=np.arange(count))[:, 0]
    ours = np.array([box_oracle(view, width, height, row) for row in drawn.tolist()], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )

    def features(box: np.ndarray) -> np.ndarray:
        top, left, h, w = box.T
        return np.stack([h * w, np.log(w / h), top / np.maximum(height - h, 1), left / np.maximum(width - w, 1), h, w])

    a, b = features(ours), features(theirs)
    error = ((a.var(axis=1) + b.var(axis=1)) / count) ** 0.5
    assert (np.abs(a.mean(axis=1) - b.mean(axis=1)) < 5 * error).all()
    assert np.abs(a.std(axis=1) / b.std(axis=1) - 1).max() < 0.08


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (1, 300), (300, 1), (1, 1), (2, 2)])
def test_pictures_in_which_no_box_fits(shape: tuple[int, int]) -> None:
    pixels = make_pixels(*shape, seed=2)
    view = View("v", 16, count=4, scale=(0.9, 1.0))
    data = encode_image(pixels, format="png")
    for a, b in zip(views_of(data, view)["v"], views_oracle(pixels, view), strict=True):
        assert difference(a, b)[1] <= 1


def test_flip_probabilities() -> None:
    data = encode_image(make_pixels(40, 30, seed=0), format="png")
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    plain = views_of(data, View("v", 20, flip=0.0, **whole))["v"]  # type: ignore[arg-type]
    assert torch.equal(views_of(data, View("v", 20, flip=1.0, **whole))["v"], plain.flip(3))  # type: ignore[arg-type]
    many = views_of(data, View("v", 20, count=400, **whole))["v"]  # type: ignore[arg-type]
    flipped = sum(torch.equal(one, plain[0].flip(2)) for one in many)
    unflipped = sum(torch.equal(one, plain[0]) for one in many)
    assert flipped + unflipped == 400 and 150 < flipped < 250


def test_views_depend_on_their_keys_only() -> None:
    data = encode_image(make_pixels(120, 90, seed=5))
    base = views_of(data, CROP, seed=1, epoch=2, sample_id=3)["crop"]
    assert torch.equal(base, views_of(data, CROP, seed=1, epoch=2, sample_id=3)["crop"])
    assert not torch.equal(base[0], base[1])
    for keys in ({"seed": 9}, {"epoch": 9}, {"sample_id": 9}):
        assert not torch.equal(base, views_of(data, CROP, **{"seed": 1, "epoch": 2, "sample_id": 3, **keys})["crop"])
    other = View("other", 64, count=2, scale=(0.3, 1.0))
    both = views_of(data, other, CROP, seed=1, epoch=2, sample_id=3)
    assert torch.equal(both["crop"], base) and not torch.equal(both["other"], base)


@pytest.mark.parametrize("fraction", [0.875, 1.0, 0.5])
@pytest.mark.parametrize("shape", [(90, 60), (61, 97), (50, 50), (224, 200)])
def test_center_equals_torchvision(fraction: float, shape: tuple[int, int]) -> None:
    pixels = make_pixels(*shape, seed=4)
    view = View("eval", 56, kind="center", crop_fraction=fraction)
    got = views_of(encode_image(pixels, format="png"), view)["eval"][0]
    image = tv.resize(
        torch.from_numpy(pixels).permute(2, 0, 1),
        [round(56 / fraction)],
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert difference(got, tv.center_crop(image, [56, 56]))[1] <= 1


def test_center_of_an_endless_picture_needs_little_memory() -> None:
    pixels = np.repeat(make_pixels(8, 2, seed=0), 5000, axis=1)  # 40,000 x 2: resized whole, 2.5 GB
    got = views_of(encode_image(pixels, format="png"), View("eval", 64, kind="center"))["eval"][0]
    middle = torch.from_numpy(pixels[:, 19_992:20_008].astype(np.float32)).mean(dim=(0, 1))
    assert (got.float().mean(dim=(1, 2)) - middle).abs().max() < 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("count", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.2)),
        ("ratio", (2.0, 1.0)),
        ("flip", 1.5),
        ("interpolation", "lanczos"),
        ("kind", "full"),
        ("crop_fraction", 0.0),
    ],
)
def test_wrong_views(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"view 'x': {field} must be") as error:
        View("x", **{"size": 8, field: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value)


def test_a_view_drawn_as_another_has_its_boxes_at_its_own_size() -> None:
    data = encode(Image.fromarray(make_pixels(400, 300, seed=3)), "PNG")
    small, large = View("a", 24, count=6), View("b", 48, count=6, drawn_as="a")
    views = decode.decode_views(data, views=[small, large], seed=1, epoch=2, sample_id=3)
    assert torch.equal(views["a"], views_of(data, small, seed=1, epoch=2, sample_id=3)["a"])
    halved = tv.resize(views["b"], [24, 24], interpolation=InterpolationMode.BICUBIC, antialias=True)
    for a, b in zip(views["a"], halved, strict=True):
        assert difference(a, b)[0] < 2
    own = decode.decode_views(data, views=[replace(large, drawn_as="")], seed=1, epoch=2, sample_id=3)
    assert not torch.equal(own["b"], views["b"])


@pytest.mark.parametrize("view", [View("v", 24, count=5), View("c", 24, kind="center", crop_fraction=0.8)])
def test_boxes_are_where_views_are_cut(view: View) -> None:
    """In the picture as shown: it is stored on its side."""
    pixels = make_pixels(60, 90, seed=3)
    data = encode(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90), "PNG", exif=orientation(6))
    boxes = decode.boxes(view, decode.inspect(data, max_pixels=10**6), seed=1, epoch=2, sample_id=3)
    cut = decode.decode_views(data, views=[view], seed=1, epoch=2, sample_id=3)[view.name]
    assert len(boxes) == view.count
    for box, got in zip(boxes, cut, strict=True):
        area = (box.left, box.top, box.left + box.width, box.top + box.height)
        shape = (box.resized_width, box.resized_height)
        whole = Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC, box=area)
        part = np.asarray(whole)[box.offset_y : box.offset_y + 24, box.offset_x : box.offset_x + 24]
        exact = torch.from_numpy((part[:, ::-1] if box.flip else part).copy()).permute(2, 0, 1)
        assert difference(got, exact)[0] < 0.5


def orientation(value: int) -> bytes:
    """An EXIF block that says how the picture is turned."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()

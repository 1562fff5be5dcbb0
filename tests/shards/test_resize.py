"""The two ways to cut a view give the pixels of Pillow's antialiased resize, and each other's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import resize
from shards.resize import Cut, Pixels
from tests.images import make_pixels

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
needs_kernel = pytest.mark.skipif(resize._kernel is None, reason="installed without a compiler: there is no kernel")

PATHS = [resize.cut_with_torch] if resize._kernel is None else [resize.cut_with_kernel, resize.cut_with_torch]


@st.composite
def a_cut(draw: st.DrawFn, *, height: int, width: int, size: int) -> Cut:
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - h)), draw(st.integers(0, width - w))
    more = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    offset = draw(st.tuples(st.integers(0, more[0]), st.integers(0, more[1])))
    return Cut(top, left, h, w, size + more[0], size + more[1], *offset, flip=draw(st.booleans()))


@st.composite
def a_case(draw: st.DrawFn) -> tuple[Pixels, list[Cut], int, str]:
    height, width, size = draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.integers(1, 70))
    picture = make_pixels(width, height, seed=draw(st.integers(0, 5)))
    cuts = draw(st.lists(a_cut(height=height, width=width, size=size), min_size=1, max_size=3))
    return picture, cuts, size, draw(st.sampled_from(["bicubic", "bilinear"]))


def cut_with_pillow(picture: Pixels, cuts: list[Cut], size: int, interpolation: str) -> Pixels:
    out = []
    for c in cuts:
        top, left, height, width = int(c.top), int(c.left), int(c.height), int(c.width)
        box = Image.fromarray(picture[top : top + height, left : left + width])
        image = np.asarray(box.resize((c.resized_width, c.resized_height), FILTERS[interpolation]))
        image = image[c.offset_y : c.offset_y + size, c.offset_x : c.offset_x + size]
        out.append((image[:, ::-1] if c.flip else image).transpose(2, 0, 1))
    return np.stack(out)


def error(a: Pixels, b: Pixels) -> tuple[float, int]:
    """Mean and largest difference in grey levels."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return float(difference.mean()), int(difference.max())


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(a_case())
def test_kernel_equals_pillow_and_torch(case: tuple[Pixels, list[Cut], int, str]) -> None:
    picture, cuts, size, interpolation = case
    kernel, library = np.zeros((2, len(cuts), 3, size, size), dtype=np.uint8)
    resize.cut_with_kernel(kernel, picture, cuts, interpolation=interpolation)
    resize.cut_with_torch(library, picture, cuts, interpolation=interpolation)
    assert error(kernel, library)[1] <= 1
    # Pillow chooses which axis comes first by what is cheaper; where a cubic overshoots and is cut back to [0, 255] in
    # between, that can be seen in single pixels.
    mean, largest = error(kernel, cut_with_pillow(picture, cuts, size, interpolation))
    assert mean <= 0.5 and largest <= (1 if interpolation == "bilinear" else 12)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(a_case(), st.tuples(*[st.floats(0, 0.45)] * 4))
def test_boxes_within_pixels_are_cut_alike(case: tuple[Pixels, list[Cut], int, str], shrink: tuple[float, ...]) -> None:
    """By the kernel and by Pillow, which cuts the same part out of the same whole pixels."""
    picture, cuts, size, interpolation = case
    a, b, c, d = shrink
    cuts = [x._replace(top=x.top + a, left=x.left + b, height=x.height - a - c, width=x.width - b - d) for x in cuts]
    kernel, library = np.zeros((2, len(cuts), 3, size, size), dtype=np.uint8)
    resize.cut_with_kernel(kernel, picture, cuts, interpolation=interpolation)
    resize.cut_with_torch(library, picture, cuts, interpolation=interpolation)
    mean, largest = error(kernel, library)
    assert mean <= 0.5 and largest <= (1 if interpolation == "bilinear" else 12)


@settings(max_examples=30, deadline=None)
@given(a_case())
def test_torch_equals_pillow(case: tuple[Pixels, list[Cut], int, str]) -> None:
    picture, cuts, size, interpolation = case
    out = np.zeros((len(cuts), 3, size, size), dtype=np.uint8)
    resize.cut_with_torch(out, picture, cuts, interpolation=interpolation)
    mean, largest = error(out, cut_with_pillow(picture, cuts, size, interpolation))
    assert mean <= 0.5 and largest <= (1 if interpolation == "bilinear" else 12)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(a_case())
def test_kernel_gives_the_same_bytes_without_avx2(case: tuple[Pixels, list[Cut], int, str]) -> None:
    picture, cuts, size, interpolation = case
    fast, portable = np.zeros((2, len(cuts), 3, size, size), dtype=np.uint8)
    plans = np.array(cuts, dtype=np.float64)
    resize._kernel.resize_into(fast, picture, plans, interpolation == "bicubic")
    resize._kernel.resize_into(portable, picture, plans, interpolation == "bicubic", True)
    assert np.array_equal(fast, portable)


@needs_kernel
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("length", "size"), [(5000, 3), (3000, 97), (2, 300)])
def test_an_even_picture_stays_as_it_is(length: int, size: int, interpolation: str) -> None:
    for value in (0, 1, 127, 254, 255):
        picture = np.full((length, 40, 3), value, dtype=np.uint8)
        out = np.zeros((1, 3, size, size), dtype=np.uint8)
        resize.cut_with_kernel(out, picture, [Cut(0, 0, length, 40, size, size)], interpolation=interpolation)
        assert (out == value).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_box_within_pixels_is_where_it_says(path: Callable[..., None]) -> None:
    """On a ramp of 4 levels a pixel the middle of the box decides the mean, a quarter of a pixel too."""
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    for start in (20.0, 20.25, 20.5, 20.75, 21.0):
        out = np.zeros((1, 3, 8, 8), dtype=np.uint8)
        path(out, ramp, [Cut(10, start, 24, 24, 8, 8)], interpolation="bilinear")
        assert abs(out.mean() - 4 * (start + 11.5)) < 0.6


@needs_kernel
def test_it_writes_nothing_but_its_part_of_a_batch() -> None:
    picture = make_pixels(60, 50, seed=1)
    cuts = [Cut(3, 4, 40, 41, 17, 17), Cut(0, 0, 50, 60, 17, 17, flip=True)]
    batch = np.full((2, 5, 3, 17, 17), 77, dtype=np.uint8)
    resize.cut_with_kernel(batch[:, 2], picture, cuts, interpolation="bicubic")
    alone = np.zeros((2, 3, 17, 17), dtype=np.uint8)
    resize.cut_with_kernel(alone, picture, cuts, interpolation="bicubic")
    assert np.array_equal(batch[:, 2], alone)
    assert (np.delete(batch, 2, axis=1) == 77).all()


@needs_kernel
@pytest.mark.parametrize(
    "bad",
    [
        Cut(-1, 0, 5, 5, 8, 8),
        Cut(0, 0, 11, 5, 8, 8),
        Cut(0, 6, 5, 5, 8, 8),
        Cut(0, 0, 0, 5, 8, 8),
        Cut(0, 0, 5, 5, 7, 8),
        Cut(0, 0, 5, 5, 8, 8, 1, 0),
        Cut(0, 0, 5, float("nan"), 8, 8),
        Cut(0, 0, 5, 5, 1 << 40, 8),
    ],
)
def test_a_box_that_does_not_fit_is_refused(bad: Cut) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        resize.cut_with_kernel(
            np.zeros((1, 3, 8, 8), np.uint8), np.zeros((10, 10, 3), np.uint8), [bad], interpolation="bicubic"
        )


@needs_kernel
@pytest.mark.parametrize(
    ("out", "picture"),
    [
        (np.zeros((1, 3, 8, 9), np.uint8), np.zeros((10, 10, 3), np.uint8)),
        (np.zeros((1, 3, 8, 16), np.uint8)[..., ::2], np.zeros((10, 10, 3), np.uint8)),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros((10, 10, 3), np.uint8)),
        (np.zeros((1, 3, 8, 8), np.float32), np.zeros((10, 10, 3), np.uint8)),
        (np.zeros((1, 3, 8, 8), np.uint8), np.zeros((10, 10, 4), np.uint8)),
        (np.zeros((1, 3, 8, 8), np.uint8), np.zeros((3, 10, 10), np.uint8).transpose(1, 2, 0)),
    ],
)
def test_arrays_laid_out_otherwise_are_refused(out: Pixels, picture: Pixels) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        resize.cut_with_kernel(out, picture, [Cut(0, 0, 5, 5, 8, 8)], interpolation="bicubic")

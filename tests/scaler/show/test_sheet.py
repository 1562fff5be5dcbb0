"""Sheets of pictures: every cell is where it belongs, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scaler.show.sheet import PALETTE, Cell, draw_sheet, font, shortened, zoomed


def plain(color: str, width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def test_every_picture_is_whole_and_framed() -> None:
    """Pictures of several sizes and colours: each has all its pixels in the sheet, as one rectangle, frames around."""
    colors = {"#102030": (40, 30), "#203040": (70, 20), "#304050": (33, 44), "#405060": (10, 10)}
    cells = [Cell(plain(color, *size), ["caption", "of two lines"], PALETTE[i]) for i, (color, size) in
             enumerate(colors.items())]  # fmt: skip
    sheet = draw_sheet([cells[:2], [None, *cells[2:]]], title="A title", notes=["a note"], columns=["one", "two", "3"])
    pixels = np.asarray(sheet)
    boxes = {}
    for number, (color, (width, height)) in enumerate(colors.items()):
        rgb = tuple(bytes.fromhex(color[1:]))
        rows, columns = np.nonzero((pixels == rgb).all(axis=-1))
        assert len(rows) == width * height and (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
        boxes[number] = (rows.min(), columns.min())
        frame = (pixels == tuple(bytes.fromhex(PALETTE[number][1:]))).all(axis=-1)
        assert frame.sum() == (width + 8) * (height + 8) - width * height
    assert boxes[0][0] == boxes[1][0] < boxes[2][0] == boxes[3][0], "rows"
    assert boxes[0][1] < boxes[1][1] == boxes[2][1] < boxes[3][1], "columns, one place of the second row left empty"
    assert (pixels[boxes[0][0] + 36 : boxes[2][0] - 4] < 128).any(), "captions are written below the pictures"


@pytest.mark.parametrize(("size", "side", "expected"), [(32, 192, 192), (50, 192, 150), (224, 192, 192), (1, 5, 5)])
def test_pictures_grow_by_whole_factors(size: int, side: int, expected: int) -> None:
    assert zoomed(plain("red", size, size), size=size, side=side).size == (expected, expected)
    half = zoomed(plain("red", 2 * size, size), size=2 * size, side=side)
    assert half.width == pytest.approx(2 * half.height, abs=1)


@pytest.mark.parametrize("text", ["short", "x" * 200, "многобуквенный/путь" * 9, "a\udcffb", "\n tab\tand line ", ""])
def test_captions_fit_and_keep_their_end(text: str) -> None:
    short = shortened(text, 100)
    assert font().getlength(short) <= 100 and "\n" not in short
    if len(text) > 50:
        assert short.startswith("…") and text.endswith(short[1:])

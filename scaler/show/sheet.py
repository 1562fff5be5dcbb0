"""Sheets of small pictures with captions, drawn by Pillow pixel by pixel: what is shown is what there is.

    draw_sheet([[Cell(picture, ["0.93  cat"], frame=RIGHT), …], …], title="nearest images").save("sheet.png")

A row's cells stand under the cells of the row above; pictures are enlarged by whole factors only, so that a pixel stays
a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which people with any colour vision tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#555555")
RIGHT, WRONG = PALETTE[0], PALETTE[1]

_GAP, _FRAME, _MARGIN = 8, 4, 16
_INK, _FAINT, _PAPER = "#1a1a1a", "#5f5f5f", "#ffffff"
_NARROWEST = 104  # pixels of a column, for its captions


@dataclass(frozen=True)
class Cell:
    """A picture, the lines below it, and the colour of its frame (None: no frame)."""

    picture: Image.Image
    caption: Sequence[str] = ()
    frame: str | None = None


@cache
def font(size: int = 12) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """uint8 [h, w, 3] as a picture."""
    return Image.fromarray(np.ascontiguousarray(pixels))


def zoomed(picture: Image.Image, *, size: int, side: int) -> Image.Image:
    """A picture enlarged by the whole factor, or made smaller by the factor, that brings `size` pixels to `side`; the
    same for pictures of several sizes keeps their proportions."""
    if size <= side:
        factor = max(1, side // size)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    shape = (max(1, round(length * side / size)) for length in picture.size)
    return picture.resize((next(shape), next(shape)), Image.Resampling.LANCZOS)


def draw_sheet(
    rows: Sequence[Sequence[Cell | None]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Image.Image:
    """One picture of all rows, RGB on white.

    Args:
        rows: cells from left to right; None leaves a place empty.
        title, notes: lines above the rows.
        columns: a heading for each column.
    """
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line, head = _line_height(12), _line_height(16)
    count = max(map(len, rows), default=0)
    widths = [1] * count
    for row in rows:
        for column, cell in enumerate(row):
            if cell is not None:
                widths[column] = max(widths[column], cell.picture.width + 2 * _FRAME, _NARROWEST if cell.caption else 1)
    heights = [
        max((c.picture.height + 2 * _FRAME + line * len(c.caption) for c in row if c), default=0) + _GAP for row in rows
    ]
    top = _MARGIN + (head + 4 if title else 0) + line * len(notes) + (4 if notes else 0)
    above = line + 4 if any(columns) else 0
    text = max([pen.textlength(title, font(16)), *(pen.textlength(note, font()) for note in notes)])
    width = max(sum(widths) + _GAP * (count - 1), int(text)) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, top + above + sum(heights) + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, font=font(16), fill=_INK)
    for number, note in enumerate(notes):
        y = _MARGIN + (head + 4 if title else 0) + line * number
        pen.text((_MARGIN, y), note, font=font(), fill=_FAINT)
    lefts = [_MARGIN + sum(widths[:column]) + _GAP * column for column in range(count)]
    for left, wide, name in zip(lefts, widths, columns, strict=False):
        pen.text((left + _FRAME, top), shortened(name, wide), font=font(), fill=_FAINT)
    top += above
    for row, height in zip(rows, heights, strict=True):
        for left, wide, cell in zip(lefts, widths, row, strict=False):
            if cell is None:
                continue
            shape = (left, top, left + cell.picture.width + 2 * _FRAME, top + cell.picture.height + 2 * _FRAME)
            if cell.frame is not None:
                pen.rectangle((shape[0], shape[1], shape[2] - 1, shape[3] - 1), fill=cell.frame)
            sheet.paste(cell.picture, (left + _FRAME, top + _FRAME))
            for number, words in enumerate(cell.caption):
                pen.text((left + _FRAME, shape[3] + line * number), shortened(words, wide), font=font(), fill=_INK)
        top += height
    return sheet


def shortened(text: str, width: int) -> str:
    """As much of a line as fits in so many pixels, from its end, where names of files differ."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if font().getlength(text) <= width:
        return text
    while text and font().getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


def _line_height(size: int) -> int:
    ascent, descent = font(size).getmetrics()
    return ascent + descent + 1

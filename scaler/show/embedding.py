"""A map of images: features in the plane by t-SNE, each image at its place, none above another.

embedding_map(model, open_images("photos/val"), num=400).save("embedding.png")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.nn import functional as F

from scaler.evals.checkpoints import EvaluationModel
from scaler.show.pixels import class_name, load_images, pooled_features, spread, to_pixels
from scaler.show.projections import plane
from scaler.show.sheet import font, shortened, to_image
from shards.index import ShardIndex

_SIDE = 1400  # pixels of the map
_FILLED = 0.4  # share of it that pictures cover
_SIZES = (20, 112)  # pixels of a picture with its frame: smallest, largest
_FRAME = 3
_REACH = 3  # places that a picture may be moved by
_MOST_CLASSES = 20  # that have colours of their own
_LEGEND, _MARGIN, _HEAD = 200, 16, 64


def embedding_map(
    model: EvaluationModel, index: ShardIndex, *, num: int, crop_fraction: float = 0.875, what: str = "model"
) -> Image.Image:
    """Images of `index`, evenly spread, where t-SNE of their features puts them; frames tell up to 20 classes apart.

    A picture is moved to the next free place of a grid; one without a free place near it is a dot.

    Args:
        what: the model's name, for the title.

    Raises:
        ValueError: no image that can be decoded.
    """
    ids = spread(index, num)
    images = load_images(index, ids, image_size=model.image_size, crop_fraction=crop_fraction)
    points = plane(F.normalize(pooled_features(model, images.pixels), dim=1)).numpy()
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (points - low) / np.maximum(high - low, 1e-12).max()  # one scale for both axes: distances keep their ratio
    cell = int(np.clip(_SIDE * math.sqrt(_FILLED / max(1, len(unit))), *_SIZES))
    places = on_grid(unit, num_cells=_SIDE // cell, reach=_REACH)
    names = [class_name(index, label) for label in images.labels.tolist()]
    colors = _colors(names)
    sheet = Image.new("RGB", (_SIDE + 2 * _MARGIN + (_LEGEND if colors else 0), _SIDE + _HEAD + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = to_pixels(images.pixels, normalization=model.method.normalization)
    dots = 0
    for place, point, picture, name in zip(places.tolist(), unit.tolist(), pixels, names, strict=True):
        color = colors.get(name, "#9a9a9a")
        if place[0] < 0:
            dots += 1
            x, y = (_MARGIN + point[0] * (_SIDE - cell) + cell / 2, _HEAD + point[1] * (_SIDE - cell) + cell / 2)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color, outline="white")
            continue
        x, y = _MARGIN + place[0] * cell, _HEAD + place[1] * cell
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=color)
        inner = cell - 1 - 2 * _FRAME
        kind = Image.Resampling.BICUBIC if picture.shape[0] >= inner else Image.Resampling.NEAREST
        sheet.paste(to_image(picture).resize((inner, inner), kind), (x + _FRAME, y + _FRAME))
    pen.text((_MARGIN, 12), f"Map of features of {what}", font=font(18), fill="#1a1a1a")
    moved = f"; {dots} of them as dots, for want of a free place" if dots else ""
    line = (
        f"t-SNE of the features of {len(unit)} of {index.num_samples:,} images{moved}; near is alike, far says little"
    )
    pen.text((_MARGIN, 38), line, font=font(13), fill="#5f5f5f")
    for row, (name, color) in enumerate(colors.items()):
        y = _HEAD + row * 24
        pen.rectangle((_SIDE + 2 * _MARGIN, y, _SIDE + 2 * _MARGIN + 14, y + 14), fill=color)
        words = shortened(str(name), _LEGEND - 3 * _MARGIN)
        pen.text((_SIDE + 2 * _MARGIN + 22, y), words, font=font(), fill="#1a1a1a")
    return sheet


def on_grid(points: NDArray[np.float32], *, num_cells: int, reach: int) -> NDArray[np.int64]:
    """A cell of its own for each point [n, 2] of the unit square, int64 [n, 2] (column, row) in a grid of so many cells
    each way: the nearest free one within `reach` cells, in the order of the points; (-1, -1) where there is none.
    """
    taken = np.zeros((num_cells, num_cells), dtype=bool)
    found = np.full((len(points), 2), -1, dtype=np.int64)
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    for i, exact in enumerate(points * (num_cells - 1)):
        cells = np.round(exact).astype(np.int64) + offsets
        cells = cells[((cells >= 0) & (cells < num_cells)).all(axis=1)]
        cells = cells[~taken[cells[:, 0], cells[:, 1]]]
        if len(cells):
            found[i] = cells[np.square(cells - exact).sum(axis=1).argmin()]
            taken[tuple(found[i])] = True
    return found


def _colors(names: Sequence[str | None]) -> dict[str | None, str]:
    """A colour for each class, in the order of the names; none where there are too many or no classes."""
    known = sorted({name for name in names if name is not None})
    if not 1 <= len(known) <= _MOST_CLASSES:
        return {}
    colors = matplotlib.colormaps["tab10" if len(known) <= 10 else "tab20"]
    return {name: matplotlib.colors.to_hex(colors(number)) for number, name in enumerate(known)}

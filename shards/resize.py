"""Crop, antialiased resize and flip of a decoded picture, straight into a batch.

Two paths give the same pixels but for rounding: `cut_with_kernel`, a small C extension (shards/_kernel.c) that `pip
install` builds where there is a compiler, and `cut_with_torch`, which works everywhere. `cut` is the first of them that
there is. Filters, borders and rounding are those of Pillow's `resize(reducing_gap=None)` and of torchvision's v2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

try:
    from shards import _kernel  # type: ignore[attr-defined]
except ImportError:  # installed without a compiler
    _kernel = None

Pixels = NDArray[np.uint8]
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Cut(NamedTuple):
    """One view of a picture: its box is resized to `resized_height` x `resized_width`; of that a square is kept, whose
    top left corner is (`offset_y`, `offset_x`), and mirrored if `flip`. In a picture that was decoded at a part of its
    size the box may begin and end within a pixel."""

    top: float
    left: float
    height: float
    width: float
    resized_height: int
    resized_width: int
    offset_y: int = 0
    offset_x: int = 0
    flip: bool = False


def cut_with_kernel(out: Pixels, picture: Pixels, cuts: Sequence[Cut], *, interpolation: str) -> None:
    """Cut all views `cuts` of `picture` (uint8 [h, w, 3]) into `out` (uint8 [len(cuts), 3, size, size]).

    The last three axes of `out` are contiguous, and so are the pixels of a row of `picture`. `interpolation` is bicubic
    or bilinear.

    Raises:
        ValueError: a box outside of the picture, or arrays laid out in another way.
    """
    _kernel.resize_into(out, picture, np.array(cuts, dtype=np.float64), interpolation == "bicubic")


def cut_with_torch(out: Pixels, picture: Pixels, cuts: Sequence[Cut], *, interpolation: str) -> None:
    """The same by torch's antialiased resize, which is fastest on a channels-last view of the picture, and by Pillow's
    for boxes that begin or end within a pixel, of which torch knows nothing."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]  # [1, 3, h, w]
    size = out.shape[-1]
    for target, c in zip(torch.from_numpy(out), cuts, strict=True):
        top, left, bottom, right = int(c.top), int(c.left), ceil(c.top + c.height), ceil(c.left + c.width)
        if (bottom - top, right - left) == (c.height, c.width):
            part = pixels[..., top:bottom, left:right]
            image = F.interpolate(part, (c.resized_height, c.resized_width), mode=interpolation, antialias=True)[0]
        else:
            whole = Image.fromarray(picture[top:bottom, left:right])
            box = (c.left - left, c.top - top, c.left - left + c.width, c.top - top + c.height)
            resized = whole.resize((c.resized_width, c.resized_height), _PILLOW[interpolation], box=box)
            image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if image.shape[1:] != target.shape[1:]:
            image = image[:, c.offset_y : c.offset_y + size, c.offset_x : c.offset_x + size]
        target.copy_(image.flip(2) if c.flip else image)


cut = cut_with_torch if _kernel is None else cut_with_kernel

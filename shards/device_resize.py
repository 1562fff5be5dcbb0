"""Crop, antialiased resize and flip of whole decoded pictures on the device that holds them, straight into a batch.

Filters, borders and rounding are those of shards/resize.py: a pass along the rows, what lies between cut to [0, 255]
with 6 bits after the point, then a pass down the columns; pixels differ from its by 1 grey level at most, since its
weights are rounded to 14 bits. Two paths: two Triton kernels for all cuts of a size (shards/device_resize_kernels.py),
and torch, picture by picture, where there is no Triton. `cut_on_device` is the one that a device has.

Boxes are of whole pixels: a device decodes in full.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shards.order import Ints
from shards.resize import Cut

_FRACTIONS = 64  # steps of a grey level that are kept between the passes


@functools.cache
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton is there for `device`; it comes with torch where torch comes with CUDA."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def cut_on_device(
    out: Tensor, pictures: Sequence[Tensor], cuts: Ints, *, rows: Sequence[int], interpolation: str
) -> None:
    """Cut a view's copies of each picture into the picture's row of a batch.

    Args:
        out: uint8 [count, m, 3, size, size], contiguous, on the device.
        pictures: uint8 [3, h, w] each, on the device.
        cuts: int64 [pictures, count, 9] on the CPU, a `shards.resize.Cut` each, with boxes within the pictures.
        rows: of each picture, in 0 … m - 1.
        interpolation: bicubic or bilinear.
    """
    cut = cut_with_triton if runs_kernels(out.device) else cut_with_torch
    cut(out, pictures, cuts, rows=rows, interpolation=interpolation)


def cut_with_triton(
    out: Tensor, pictures: Sequence[Tensor], cuts: Ints, *, rows: Sequence[int], interpolation: str
) -> None:
    """`cut_on_device` by two kernels for all cuts."""
    from shards.device_resize_kernels import cut_all

    cut_all(out, pictures, cuts, rows=rows, cubic=interpolation == "bicubic")


def cut_with_torch(
    out: Tensor, pictures: Sequence[Tensor], cuts: Ints, *, rows: Sequence[int], interpolation: str
) -> None:
    """`cut_on_device` by torch operations, one cut after the other."""
    size, cubic = out.shape[-1], interpolation == "bicubic"
    for picture, copies, row in zip(pictures, cuts.tolist(), rows, strict=True):
        for copy, numbers in enumerate(copies):
            c = Cut(*numbers)
            box = picture[:, int(c.top) : int(c.top + c.height), int(c.left) : int(c.left + c.width)].float()
            along = _resampled(box, c.resized_width, c.offset_x, size, cubic=cubic)
            between = (along * _FRACTIONS + 0.5).floor().clamp(0, 255 * _FRACTIONS) / _FRACTIONS
            down = _resampled(between.transpose(1, 2), c.resized_height, c.offset_y, size, cubic=cubic)
            image = (down.transpose(1, 2) + 0.5).floor().clamp(0, 255)
            out[copy, row] = image.flip(2) if c.flip else image


def _resampled(lines: Tensor, resized: int, offset: int, size: int, *, cubic: bool) -> Tensor:
    """float32 [3, n, length] → [3, n, size]: the last axis resized, and a part of that kept."""
    length = lines.shape[-1]
    scale = length / resized
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    at = torch.arange(offset, offset + size, dtype=torch.float64, device=lines.device)
    centre = (at + 0.5) * scale
    first = (centre - support + 0.5).long().clamp(min=0)
    total = torch.zeros((), device=lines.device)
    sums = lines.new_zeros((*lines.shape[:-1], size))
    for tap in range(2 * math.ceil(support) + 1):
        k = first + tap
        x = ((k - centre + 0.5) / stretch).abs()
        weight = torch.where(k < length, _bicubic(x) if cubic else (1 - x).clamp(min=0), 0.0).float()
        sums += weight * lines[..., k.clamp(max=length - 1)]
        total = total + weight
    return sums / total


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5 of distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))

"""The Triton kernels of shards/device_resize.py: one launch for each of the two passes, for all cuts of a size.

Along an axis, `extent` pixels of the box are resized to `resized`, of which `size` are kept from `offset` on. With
s = max(extent / resized, 1), output i is the sum over pixels k of filter((k + ½ - c) / s) × pixel k, divided by the sum
of these weights, where c = (offset + i + ½) × extent / resized and the taps that lie outside of the box are left out.
c is divided in integers, so that its part within a pixel is exact in any picture, and weights are made where they are
used: nothing but the boxes comes from the host.

A program takes 32 × 32 positions of one cut, three channels each; cuts of fewer tiles than the largest leave programs
without work, which end at once. 32 columns are a warp's loads of neighbouring bytes, and what is wasted at the borders
of 96, 98 and 224 pixels is little. Sums are in float32 and in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from shards.order import Ints

# Columns of the table, int64 [cuts, _COLUMNS]: those of a Cut, then where its picture, what lies between the passes and
# its pixels begin, and height and width of the picture.
_TOP, _LEFT, _HEIGHT, _ACROSS, _RESIZED_HEIGHT, _RESIZED_WIDTH, _OFFSET_Y, _OFFSET_X, _FLIP, _FROM, _BETWEEN, _TO = (
    tl.constexpr(column) for column in range(12)
)
_PICTURE_HEIGHT, _PICTURE_WIDTH = tl.constexpr(12), tl.constexpr(13)
_COLUMNS = 14
_WIDTH = tl.constexpr(_COLUMNS)
_FRACTIONS = tl.constexpr(64)
_MOST = tl.constexpr(255 * 64)
_TILE = 32
_NUM_WARPS = 8  # 4 positions a thread: no more than 72 registers
_MOST_CUTS = 65535  # of a launch


def cut_all(out: Tensor, pictures: Sequence[Tensor], cuts: Ints, *, rows: Sequence[int], cubic: bool) -> None:
    """See `shards.device_resize.cut_on_device`."""
    count, size = out.shape[0], out.shape[-1]
    if not len(pictures):
        return
    flat = [picture.reshape(-1) for picture in pictures]
    table = np.empty((len(pictures), count, _COLUMNS), dtype=np.int64)
    table[..., :9] = cuts
    table[..., 9] = np.cumsum([0, *(len(pixels) for pixels in flat[:-1])])[:, None]
    heights = cuts[..., 2]
    lengths = 3 * size * heights
    table[..., 10] = (np.cumsum(lengths) - lengths.reshape(-1)).reshape(lengths.shape)
    table[..., 11] = (np.arange(count) * out.shape[1] + np.asarray(rows)[:, None]) * 3 * size * size
    table[..., 12:] = np.array([picture.shape[1:] for picture in pictures])[:, None]
    lines, packed = torch.from_numpy(table).view(-1, _COLUMNS), torch.cat(flat)
    for part in lines.split(_MOST_CUTS):
        if out.is_cuda:
            part = part.pin_memory()
        _cut(out, packed, part.to(out.device, non_blocking=True), int(lengths.sum()), int(heights.max()), cubic)


@torch.library.custom_op("shards::cut", mutates_args=("out",), device_types=("cpu", "cuda"))  # cpu: as interpreted
def _cut(out: Tensor, packed: Tensor, table: Tensor, num_between: int, most_rows: int, cubic: bool) -> None:
    size = out.shape[-1]
    between = torch.empty(num_between, dtype=torch.int16, device=out.device)
    across = triton.cdiv(size, _TILE)
    constants = {"CUBIC": cubic, "TILE": _TILE, "num_warps": _NUM_WARPS}
    _along[(triton.cdiv(most_rows, _TILE) * across, len(table))](packed, between, table, size, **constants)
    _down[(across * across, len(table))](between, out, table, size, **constants)


@_cut.register_fake
def _(out: Tensor, packed: Tensor, table: Tensor, num_between: int, most_rows: int, cubic: bool) -> None:
    return None


@triton.jit
def _along(packed, between, table, size, CUBIC: tl.constexpr, TILE: tl.constexpr):
    """A tile of [rows of the box, columns of the view]: from packed pictures [3, h, w] to `between` [3, rows, size]."""
    row = table + tl.program_id(1).to(tl.int64) * _WIDTH
    blocks = tl.cdiv(size, TILE)
    tile = tl.program_id(0)
    height = tl.load(row + _HEIGHT).to(tl.int32)
    y = tile // blocks * TILE + tl.arange(0, TILE)
    x = tile % blocks * TILE + tl.arange(0, TILE)
    if tile // blocks * TILE < height:
        extent, resized = tl.load(row + _ACROSS), tl.load(row + _RESIZED_WIDTH)
        offset = tl.load(row + _OFFSET_X)
        whole, part, first, past, taps, stretch = _places(x, size, offset, extent, resized, CUBIC)
        picture_height, width = tl.load(row + _PICTURE_HEIGHT), tl.load(row + _PICTURE_WIDTH)
        line = packed + tl.load(row + _FROM) + (tl.load(row + _TOP) + y) * width + tl.load(row + _LEFT)
        plane = picture_height * width
        inside = (y < height)[:, None] & (x < size)[None, :]
        red, green, blue = (
            tl.zeros((TILE, TILE), tl.float32),
            tl.zeros((TILE, TILE), tl.float32),
            tl.zeros((TILE, TILE), tl.float32),
        )
        total = tl.zeros((TILE,), tl.float32)
        for tap in range(taps):
            k = first + tap
            weight = tl.where(k < past, _filter((k - whole).to(tl.float32) + 0.5 - part, stretch, CUBIC), 0.0)
            total += weight
            there = line[:, None] + k[None, :]
            known = inside & (k < past)[None, :]
            red += weight[None, :] * tl.load(there, mask=known, other=0).to(tl.float32)
            green += weight[None, :] * tl.load(there + plane, mask=known, other=0).to(tl.float32)
            blue += weight[None, :] * tl.load(there + 2 * plane, mask=known, other=0).to(tl.float32)
        to = between + tl.load(row + _BETWEEN) + y[:, None] * size + x[None, :]
        tl.store(to, _fixed(red / total[None, :]), mask=inside)
        tl.store(to + height * size, _fixed(green / total[None, :]), mask=inside)
        tl.store(to + 2 * height * size, _fixed(blue / total[None, :]), mask=inside)


@triton.jit
def _down(between, out, table, size, CUBIC: tl.constexpr, TILE: tl.constexpr):
    """A tile of a view: from `between` [3, rows, size] to `out` [3, size, size], mirrored if wanted."""
    row = table + tl.program_id(1).to(tl.int64) * _WIDTH
    blocks = tl.cdiv(size, TILE)
    tile = tl.program_id(0)
    height = tl.load(row + _HEIGHT)
    y = tile // blocks * TILE + tl.arange(0, TILE)
    x = tile % blocks * TILE + tl.arange(0, TILE)
    resized = tl.load(row + _RESIZED_HEIGHT)
    offset = tl.load(row + _OFFSET_Y)
    whole, part, first, past, taps, stretch = _places(y, size, offset, height, resized, CUBIC)
    line = between + tl.load(row + _BETWEEN) + x
    plane = height * size
    inside = (y < size)[:, None] & (x < size)[None, :]
    red, green, blue = (
        tl.zeros((TILE, TILE), tl.float32),
        tl.zeros((TILE, TILE), tl.float32),
        tl.zeros((TILE, TILE), tl.float32),
    )
    total = tl.zeros((TILE,), tl.float32)
    for tap in range(taps):
        k = first + tap
        weight = tl.where(k < past, _filter((k - whole).to(tl.float32) + 0.5 - part, stretch, CUBIC), 0.0)
        total += weight
        there = line[None, :] + (k * size)[:, None]
        known = inside & (k < past)[:, None]
        red += weight[:, None] * tl.load(there, mask=known, other=0).to(tl.float32)
        green += weight[:, None] * tl.load(there + plane, mask=known, other=0).to(tl.float32)
        blue += weight[:, None] * tl.load(there + 2 * plane, mask=known, other=0).to(tl.float32)
    column = tl.where(tl.load(row + _FLIP) != 0, size - 1 - x, x)
    to = out + tl.load(row + _TO) + y[:, None] * size + column[None, :]
    scale = total[:, None] * _FRACTIONS
    tl.store(to, _byte(red / scale), mask=inside)
    tl.store(to + size * size, _byte(green / scale), mask=inside)
    tl.store(to + 2 * size * size, _byte(blue / scale), mask=inside)


@triton.jit
def _places(i, size, offset, extent, resized, CUBIC: tl.constexpr):
    """Of output positions i, [TILE] each: the centre as a whole pixel and a part of one, the first tap and the one past
    the last; and for all, how many taps there are at most, and by how much the filter is stretched."""
    numerator = (2 * (offset + tl.minimum(i, size - 1)) + 1) * extent  # positions past the end are those of the last
    whole = numerator // (2 * resized)
    part = (numerator - whole * 2 * resized).to(tl.float32) / (2 * resized).to(tl.float32)
    whole = whole.to(tl.int32)
    stretch = tl.maximum(extent.to(tl.float32) / resized.to(tl.float32), 1.0)
    support = 2.0 * stretch if CUBIC else stretch
    first = tl.maximum(whole + tl.floor(part - support + 0.5).to(tl.int32), 0)
    past = tl.minimum(whole + tl.floor(part + support + 0.5).to(tl.int32), extent.to(tl.int32))
    taps = 2 * tl.ceil(support).to(tl.int32) + 1
    return whole, part, first, past, taps, stretch


@triton.jit
def _filter(distance, stretch, CUBIC: tl.constexpr):
    """The weight of a pixel at such a distance: a triangle, or Keys' cubic with a = -0.5."""
    x = tl.abs(distance / stretch)
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return weight


@triton.jit
def _fixed(value):
    """Cut to [0, 255] and rounded to 1/64, as a whole number of these."""
    return tl.minimum(tl.maximum(tl.floor(value * _FRACTIONS + 0.5), 0.0), _MOST).to(tl.int16)


@triton.jit
def _byte(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.uint8)

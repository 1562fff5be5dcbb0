"""iBOT's block masks, spread over the crops of the whole global batch.

Of the 2B global crops of a batch, int(2B · probability) get a mask. The interval of ratios is cut into that many equal
bins; one ratio is drawn in each, and the crops are dealt the bins, or no mask, by one shuffle of the global batch. All
numbers are keyed by (seed, step, crop), so a rank draws the masks of its own crops and every layout agrees.

A mask is a union of rectangles (BEiT, arXiv 2106.08254). A rectangle's area is drawn between 4 patches and what is
missing to the target, at most half of all patches; its aspect ratio is log-uniform in 0.3 … 1/0.3; it gets 10 tries to
add new patches without passing the target. When none succeeds the mask ends short of the target. (Rounding the sides,
and a target fewer than 4 patches away, can make a rectangle smaller than 4.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shards.random import keyed_permutation, keyed_uniform

_MIN_BLOCK = 4
_MIN_ASPECT = 0.3
_TRIES = 10


def mask_ratios(
    *, num_crops: int, ratio: tuple[float, float], probability: float, seed: int, step: int
) -> NDArray[np.float64]:
    """The share of patches to mask in each global crop of the global batch, [num_crops]; 0: no mask."""
    num_masked = int(num_crops * probability)
    ratios = np.zeros(num_crops)
    bins = np.linspace(ratio[0], ratio[1], num_masked + 1)
    u = keyed_uniform("mask_ratio", seed, step, count=num_masked)
    chosen = keyed_permutation(num_crops, "mask_crops", seed, step)[:num_masked]
    ratios[chosen] = bins[:-1] + u * np.diff(bins)
    return ratios


def block_masks(
    grid: tuple[int, int], *, num_patches: Sequence[int], seed: int, step: int, crops: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The masks [n, h, w] of the global crops with these numbers [n], with at most so many patches each.

    A mask is an integer while it grows, one bit a patch: of so few patches, that is ten times as fast as arrays are.
    """
    height, width = grid
    columns = [sum(1 << row * width for row in range(h)) for h in range(height)]  # the first bits of so many rows
    masks = [0] * len(crops)
    growing, block = [i for i, count in enumerate(num_patches) if count > 0], 0
    while growing:
        draws = keyed_uniform("mask_block", seed, step, crops[growing], block, count=4 * _TRIES).tolist()
        still = []
        for i, numbers in zip(growing, draws, strict=True):
            added = _block(masks[i], num_patches[i], numbers, columns, width=width)
            masks[i] |= added
            if added and masks[i].bit_count() < num_patches[i]:
                still.append(i)
        growing, block = still, block + 1
    size = height * width
    packed = b"".join(mask.to_bytes(-(-size // 8), "little") for mask in masks)
    rows = np.frombuffer(packed, dtype=np.uint8).reshape(len(masks), -1)
    return np.unpackbits(rows, axis=1, count=size, bitorder="little").view(bool).reshape(-1, height, width)


def _block(mask: int, num_patches: int, numbers: Sequence[float], columns: Sequence[int], *, width: int) -> int:
    """The next rectangle of a mask, bit `row * width + column` of an integer; 0 where no try succeeds."""
    height = len(columns)
    missing = num_patches - mask.bit_count()
    span, log_aspect = min(missing, 0.5 * height * width) - _MIN_BLOCK, math.log(_MIN_ASPECT)
    for t in range(0, 4 * _TRIES, 4):
        area_u, aspect_u, top_u, left_u = numbers[t : t + 4]
        area = _MIN_BLOCK + span * area_u
        aspect = math.exp(log_aspect * (1 - 2 * aspect_u))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(top_u * (height - h + 1)), int(left_u * (width - w + 1))
        block = columns[h] * ((1 << w) - 1) << (top * width + left)
        if 0 < (block & ~mask).bit_count() <= missing:
            return block
    return 0


def batch_masks(
    positions: NDArray[np.int64],
    *,
    global_batch_size: int,
    grid: tuple[int, int],
    ratio: tuple[float, float],
    probability: float,
    seed: int,
    step: int,
) -> NDArray[np.bool_]:
    """Masks [2m, h · w] of the two global crops of the images at `positions` [m] of the global batch, crop-major.

    Global crop c of the image at position i is number c · B + i of the batch.
    """
    ratios = mask_ratios(num_crops=2 * global_batch_size, ratio=ratio, probability=probability, seed=seed, step=step)
    crops = (np.arange(2)[:, None] * global_batch_size + positions).ravel()
    num_patches = (grid[0] * grid[1] * ratios[crops]).astype(np.int64).tolist()
    return block_masks(grid, num_patches=num_patches, seed=seed, step=step, crops=crops).reshape(len(crops), -1)

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


def block_mask(grid: tuple[int, int], *, num_patches: int, seed: int, step: int, crop: int) -> NDArray[np.bool_]:
    """The mask [h, w] of global crop number `crop`, with at most `num_patches` patches."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    largest = 0.5 * height * width
    log_aspect = math.log(_MIN_ASPECT)
    block = 0
    while (missing := num_patches - int(mask.sum())) > 0:
        tries = keyed_uniform("mask_block", seed, step, crop, block, count=4 * _TRIES).reshape(_TRIES, 4).tolist()
        for area_u, aspect_u, top_u, left_u in tries:
            area = _MIN_BLOCK + (min(missing, largest) - _MIN_BLOCK) * area_u
            aspect = math.exp(log_aspect * (1 - 2 * aspect_u))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = int(top_u * (height - h + 1)), int(left_u * (width - w + 1))
            window = mask[top : top + h, left : left + w]
            if 0 < h * w - int(window.sum()) <= missing:
                window[:] = True
                break
        else:
            break
        block += 1
    return mask


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
    masks = np.zeros((len(crops), *grid), dtype=bool)
    for mask, crop in zip(masks, crops.tolist(), strict=True):
        num_patches = int(grid[0] * grid[1] * ratios[crop])
        if num_patches:
            mask[:] = block_mask(grid, num_patches=num_patches, seed=seed, step=step, crop=crop)
    return masks.reshape(len(crops), -1)

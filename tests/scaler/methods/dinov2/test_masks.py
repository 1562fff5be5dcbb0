"""Masks: how many crops, which ratios, what shapes, and the same on every layout."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.models.utils import random_block_mask_image

from scaler.methods.dinov2.masks import batch_masks, block_masks, mask_ratios


def masks(positions: np.ndarray, *, batch: int, grid: tuple[int, int] = (14, 14), **options: object) -> np.ndarray:
    defaults = {"ratio": (0.1, 0.5), "probability": 0.5, "seed": 0, "step": 0}
    return batch_masks(positions, global_batch_size=batch, grid=grid, **(defaults | options))  # type: ignore[arg-type]


def block_mask(grid: tuple[int, int], *, num_patches: int, crop: int) -> np.ndarray:
    return block_masks(grid, num_patches=[num_patches], seed=0, step=0, crops=np.array([crop]))[0]


@settings(max_examples=30, deadline=None)
@given(
    num_crops=st.integers(2, 400), probability=st.floats(0, 1), low=st.floats(0, 0.4), width=st.floats(0, 0.5),
    step=st.integers(0, 10**6),
)  # fmt: skip
def test_one_ratio_in_each_bin(num_crops: int, probability: float, low: float, width: float, step: int) -> None:
    high = low + width
    ratios = mask_ratios(num_crops=num_crops, ratio=(low, high), probability=probability, seed=1, step=step)
    num_masked = int(num_crops * probability)
    nonzero = np.sort(ratios)[num_crops - num_masked :]
    bounds = np.linspace(low, high, num_masked + 1)
    assert len(ratios) == num_crops and (np.sort(ratios)[: num_crops - num_masked] == 0).all()
    assert (bounds[:-1] <= nonzero + 1e-12).all() and (nonzero <= bounds[1:] + 1e-12).all()


def test_the_deal_is_fair_and_changes_with_every_key() -> None:
    draws = [
        mask_ratios(num_crops=64, ratio=(0.1, 0.5), probability=0.5, seed=seed, step=step)
        for seed in range(2)
        for step in range(300)
    ]
    assert len({tuple(d) for d in draws}) == 600
    share = np.mean([d > 0 for d in draws], axis=0)
    assert abs(share - 0.5).max() < 0.1  # five standard deviations of 600 coin throws
    mean = np.mean([d.sum() / 32 for d in draws])
    assert abs(mean - 0.3) < 0.002


def test_masks_reach_their_ratios_and_never_exceed_them() -> None:
    batch = 128
    ratios = mask_ratios(num_crops=2 * batch, ratio=(0.1, 0.5), probability=0.5, seed=0, step=0)
    drawn = masks(np.arange(batch), batch=batch)
    targets = (196 * ratios).astype(int)
    counts = drawn.sum(axis=1)
    assert drawn.shape == (256, 196) and (counts <= targets).all() and ((counts == 0) == (targets == 0)).all()
    assert (counts[targets > 0] / targets[targets > 0]).mean() > 0.95
    assert (counts > 0).sum() == batch


def test_masks_are_unions_of_blocks() -> None:
    single, inside = 0, 0
    for crop in range(200):
        mask = block_mask((14, 14), num_patches=60, crop=crop)
        padded = np.pad(mask, 1)
        neighbours = padded[:-2, 1:-1].astype(int) + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        single += int((mask & (neighbours == 0)).sum())
        inside += int((mask & (neighbours >= 2)).sum())
        total = int(mask.sum())
        assert 4 <= total <= 60
    assert single / (200 * 60) < 0.005  # single patches only fill the last gaps; thrown at random, 24 % would be single
    assert inside / (200 * 60) > 0.8  # thrown at random, 35 %


def test_no_block_takes_more_than_half_and_all_places_are_used() -> None:
    covered = np.zeros((8, 8))
    for crop in range(1000):
        mask = block_mask((8, 8), num_patches=16, crop=crop)
        covered += mask
    assert covered.min() > 0.15 * covered.mean()  # corners less than the middle, but none left out
    for crop in range(50):
        mask = block_mask((8, 8), num_patches=64, crop=crop)
        assert not (mask.all(axis=0).all())  # the rest is never closed by one block of everything


@pytest.mark.parametrize("layout", [[16], [4, 4, 4, 4], [8, 4, 4]])
def test_every_layout_draws_the_same_masks(layout: list[int]) -> None:
    whole = masks(np.arange(16), batch=16, step=7).reshape(2, 16, -1)
    start = 0
    for size in layout:
        part = masks(np.arange(start, start + size), batch=16, step=7).reshape(2, size, -1)
        assert (part == whole[:, start : start + size]).all()
        start += size
    assert (masks(np.arange(16), batch=16, step=8).reshape(2, 16, -1) != whole).any()


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 8), (3, 5)])
def test_tiny_grids_end(grid: tuple[int, int]) -> None:
    mask = block_mask(grid, num_patches=grid[0] * grid[1], crop=0)
    assert mask.shape == grid


def test_probability_zero_masks_nothing() -> None:
    assert not masks(np.arange(8), batch=8, probability=0.0).any()


@pytest.mark.parametrize("num_patches", [20, 59, 98])  # the least, the mean and the most of 0.1 … 0.5 of 196
def test_masks_are_distributed_as_lightlys(num_patches: int) -> None:
    random.seed(0)
    ours = [block_mask((14, 14), num_patches=num_patches, crop=crop) for crop in range(300)]
    theirs = [random_block_mask_image((14, 14), num_patches).numpy() for _ in range(300)]
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "patches": lambda mask: mask.sum(),
        "edges": lambda mask: (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum(),
        "rows": lambda mask: mask.any(axis=1).sum(),
        "columns": lambda mask: mask.any(axis=0).sum(),
        "longest row": lambda mask: mask.sum(axis=1).max(),
        "corners": lambda mask: mask[[0, 0, -1, -1], [0, -1, 0, -1]].sum(),
        "middle": lambda mask: mask[6:8, 6:8].sum(),
        "upper half": lambda mask: mask[:7].sum(),
        "left half": lambda mask: mask[:, :7].sum(),
    }
    for name, statistic in statistics.items():
        a, b = (np.array([statistic(mask) for mask in masks], dtype=float) for masks in (ours, theirs))
        error = np.sqrt((a.var() + b.var()) / len(a))
        assert abs(a.mean() - b.mean()) < 4 * error + 1e-9, (name, a.mean(), b.mean(), error)


def test_the_draws_are_those_of_the_runs_that_there_are() -> None:
    """Their checksums: a run that is resumed with a newer version goes on with the same masks."""
    drawn = [masks(np.arange(16, 48), batch=64, grid=grid, step=11) for grid in ((14, 14), (5, 7), (37, 37))]
    assert [zlib.crc32(np.packbits(x).tobytes()) for x in drawn] == [1128342053, 4100082618, 4255914173]

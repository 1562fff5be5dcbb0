"""Rows kept by drop path: a pure function of the keys, by group of the global batch."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaler.nn.drop_path import kept_rows


def rows(positions: np.ndarray, **options: object) -> Tensor:
    defaults = {
        "num_blocks": 3, "rate": 0.3, "group_size": 4, "copies": 2, "seed": 0, "step": 0, "kind": "global",
    }  # fmt: skip
    return kept_rows(positions, **(defaults | options))


def as_pairs(kept: Tensor, positions: np.ndarray) -> list[list[tuple[int, int]]]:
    """Kept (copy, position in the global batch) of every block and branch."""
    m = len(positions)
    return [sorted((r // m, int(positions[r % m])) for r in line) for line in kept.flatten(0, 1).tolist()]


@settings(max_examples=50, deadline=None)
@given(
    group_size=st.integers(1, 6), groups=st.integers(1, 6), copies=st.integers(1, 4), rate=st.floats(0, 0.99),
    step=st.integers(0, 10**6), data=st.data(),
)  # fmt: skip
def test_micro_batches_of_whole_groups_keep_what_the_whole_batch_keeps(
    group_size: int, groups: int, copies: int, rate: float, step: int, data: st.DataObject
) -> None:
    options = {"group_size": group_size, "copies": copies, "rate": rate, "step": step}
    positions = np.arange(group_size * groups)
    whole = as_pairs(rows(positions, **options), positions)
    parts: list[list[tuple[int, int]]] = [[] for _ in whole]
    cuts = data.draw(st.sets(st.integers(1, max(1, groups - 1))))
    for stretch in np.split(positions, [c * group_size for c in sorted(cuts) if c < groups]):
        for total, part in zip(parts, as_pairs(rows(stretch, **options), stretch), strict=True):
            total += part
    assert [sorted(part) for part in parts] == whole
    expected = max(1, int(copies * group_size * (1 - rate)))
    for line in whole:
        assert len(set(line)) == len(line)
        for group in range(groups):
            assert sum(position // group_size == group for _, position in line) == expected


def test_every_key_matters_and_repeats_are_equal() -> None:
    positions = np.arange(64)
    base = rows(positions, group_size=64)
    assert torch.equal(base, rows(positions, group_size=64))
    for change in ({"seed": 1}, {"step": 1}, {"kind": "local"}):
        assert not torch.equal(base, rows(positions, group_size=64, **change))
    lines = base.flatten(0, 1)
    assert len({tuple(line) for line in lines.tolist()}) == 6  # blocks and branches
    assert not torch.equal(base, rows(positions + 64, group_size=64))  # another group


def test_rows_are_kept_equally_often() -> None:
    counts = torch.zeros(16)
    for step in range(500):
        counts += torch.bincount(rows(np.arange(8), group_size=8, step=step, rate=0.25).flatten(), minlength=16)
    share = counts / (500 * 6)
    assert (share - 0.75).abs().max() < 0.04  # five standard deviations of a binomial share


def test_a_cut_through_a_group_and_a_bad_rate_are_errors() -> None:
    with pytest.raises(ValueError, match="6 images starting at 0 cuts through groups of 4"):
        rows(np.arange(6))
    with pytest.raises(ValueError, match="starting at 2 cuts through"):
        rows(np.arange(2, 6))
    with pytest.raises(ValueError, match="must be in"):
        rows(np.arange(4), rate=1.0)


def test_the_draws_are_those_of_the_runs_that_there_are() -> None:
    """Their checksum: a run that is resumed with a newer version goes on with the same rows."""
    assert zlib.crc32(rows(np.arange(8, 24), step=7).numpy().tobytes()) == 3911948131

"""Which rows run a residual branch under batch-subset drop path, as a pure function of keys.

As in DINOv2 (arXiv 2304.07193, section 5): instead of zeroing the branch of random rows, the branch runs on a random
subset of int(rows · (1 - rate)) rows, at least one, and its output is scaled by rows / subset. A subset is drawn in
each *group* of `group_size` consecutive images of the global batch, so that every layout that holds whole groups in a
micro-batch computes the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.random import keyed_uniform


def check_groups(positions: NDArray[np.int64], *, group_size: int) -> NDArray[np.int64]:
    """Group numbers, int64 [groups], of a micro-batch at these positions (consecutive) of the global batch.

    Raises:
        ValueError: the micro-batch cuts through a group.
    """
    if len(positions) % group_size or positions[0] % group_size:
        raise ValueError(
            f"a micro-batch of {len(positions)} images starting at {positions[0]} cuts through groups of {group_size};"
            f" choose a micro-batch that method.group_size divides, or a smaller method.group_size"
        )
    assert (np.diff(positions) == 1).all(), "a micro-batch is a consecutive stretch of the global batch"
    return positions[::group_size] // group_size


def kept_rows(
    positions: NDArray[np.int64],
    *,
    num_blocks: int,
    rate: float,
    group_size: int,
    copies: int,
    seed: int,
    step: int,
    kind: str,
) -> Tensor:
    """The rows of a crop batch that run each branch of each block, int64 [num_blocks, 2, s], ascending.

    The crop batch has `copies` crops of every image, crop-major (row = copy · m + image), and is named `kind`.
    `positions` [m] are the images' places in the global batch.

    Raises:
        ValueError: the micro-batch cuts through a group, or `rate` is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop path {rate} must be in [0, 1)")
    groups = check_groups(positions, group_size=group_size)
    num_rows = copies * group_size
    subset = max(1, int(num_rows * (1 - rate)))
    blocks, branches = np.arange(num_blocks)[:, None, None], np.arange(2)[:, None]
    u = keyed_uniform("drop_path", seed, step, kind, blocks, branches, groups, count=num_rows)
    # The subset of smallest numbers, of equal ones the first; selecting is several times as fast as sorting.
    largest = np.partition(u, subset - 1, axis=-1)[..., subset - 1, None]
    below, equal = u < largest, u == largest
    below |= equal & (equal.cumsum(axis=-1) <= subset - below.sum(axis=-1, keepdims=True))
    chosen = below.nonzero()[-1].reshape(*u.shape[:-1], subset)  # [blocks, 2, groups, subset], rows of the group
    images = np.arange(len(groups))[:, None] * group_size + chosen % group_size
    rows = (chosen // group_size) * len(positions) + images
    return torch.from_numpy(np.sort(rows.reshape(num_blocks, 2, -1), axis=-1))

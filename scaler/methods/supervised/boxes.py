"""Rectangles of many images at once: where they lie is known on the host, and they are one mask on the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sides(boxes: NDArray[np.int64], *, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows, bool [m, height], and which columns, bool [m, width], of each image are inside its box.

    `boxes` int64 [m, 4] are top, bottom, left and right, the second of either pair no longer inside.
    """
    top, bottom, left, right = boxes.T[:, :, None]
    rows, columns = np.arange(height), np.arange(width)
    return torch.from_numpy((rows >= top) & (rows < bottom)), torch.from_numpy((columns >= left) & (columns < right))


def inside(rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of the boxes whose `sides` these are, bool [m, 1, height, width]."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]

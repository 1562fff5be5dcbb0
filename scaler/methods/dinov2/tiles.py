"""Tiles: so many samples at a time that their scores against all prototypes take no more than a budget of memory.

On a GPU a tile costs its matrix products and one or two kernels for all else, if the run compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Most scores in memory at a time where nobody says how many: 1 GiB in fp32 on a GPU, where more rows at a time mean
# fewer passes over the prototypes' gradient; elsewhere 64 MiB.
_ELEMENTS = {"cuda": 1 << 28}
_ELEMENTS_ELSEWHERE = 1 << 24


def default_tile_elements(device: torch.device) -> int:
    """Scores that a tile takes on this device."""
    return _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE)


@functools.cache
def compiled(function: Callable[..., Tensor], *, spends: int) -> Callable[..., Tensor]:
    """A function of tiles [..., s, K], compiled once for any number of samples s.

    The many passes over the scores that it is written in become one or two. Its first arguments, so many as it
    `spends`, stay as they were: what is between the first value and the last needs no memory.
    """

    def pure(*args: Any) -> Tensor:
        return function(*(x.clone() for x in args[:spends]), *args[spends:])

    fused = torch.compile(pure, fullgraph=True)

    def call(*args: Any) -> Tensor:
        for x in args:
            if isinstance(x, Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
        return fused(*args)

    return call

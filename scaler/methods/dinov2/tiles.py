"""Tiles: so many samples at a time that their scores against all prototypes take no more than a budget of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Most scores in memory at a time where nobody says how many: 1 GiB in fp32 on a GPU, where more rows at a time mean
# fewer passes over the prototypes' gradient; elsewhere 64 MiB.
_ELEMENTS = {"cuda": 1 << 28}
_ELEMENTS_ELSEWHERE = 1 << 24


def default_tile_elements(device: torch.device) -> int:
    """Scores that a tile takes on this device."""
    return _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE)


def tiles(num_samples: int, *, at_most: int) -> Iterator[slice]:
    """Ranges of about equally many of the samples, at most so many (but at least one)."""
    count = -(-num_samples // max(1, at_most))
    for i in range(count):
        yield slice(i * num_samples // count, (i + 1) * num_samples // count)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tiles [..., s, K], compiled once for any number of samples s: the many passes over the scores that
    it is written in become one or two.
    """
    import torch._dynamo  # takes seconds, and most processes compile nothing

    fused = torch.compile(function, fullgraph=True)
    # Else dynamo, inside of DDP's forward, looks for the borders of its buckets.
    alone = torch._dynamo.config.patch(optimize_ddp=False)

    def call(*args: Any) -> Tensor:
        if is_in_torch_dispatch_mode(include_infra_modes=False):  # one that looks at every operation
            return function(*args)
        for x in args:
            if isinstance(x, Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
        with alone:
            return fused(*args)

    return call

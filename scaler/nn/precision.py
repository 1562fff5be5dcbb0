"""Where mixed precision must not reach: losses and normalisations that need fp32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A region without autocast on the device of `x`; the meta device knows of none."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)

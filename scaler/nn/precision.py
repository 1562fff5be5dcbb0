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


def product_dtype(x: Tensor) -> torch.dtype:
    """What the factors of `product` are rounded to: bf16 where autocast says so, which has the range of fp32; fp16 has
    not, and `x`, at least fp32, stays as it is.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    return x.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, at least fp32: also of bf16 numbers, which tensor cores multiply exactly and add in fp32.

    Rounded once, before: a product that is rounded to bf16 itself is off by up to 0.4 %, which after the division by a
    temperature of 0.04 is up to 10 % of a probability.
    """
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()

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


def product_dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What the factors of `product` are rounded to: those of scores, and those of gradients.

    Where autocast says bf16, on a GPU fp16 and bf16: vectors about as long as one fit into fp16, which has three bits
    more; gradients need the range of fp32. A CPU has no fast product of fp16 numbers, and its scores stay as exact as
    `x`. Without autocast both have the precision of `x`, at least fp32, and under fp16 too: the scale that keeps its
    gradients from rounding to zero comes only in the backward pass.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.bfloat16:
        return x.dtype, x.dtype
    return torch.float16 if device == "cuda" else x.dtype, torch.bfloat16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, at least fp32; on a GPU of half-precision ones too, which tensor cores multiply exactly
    and add up in fp32. (Autocast's products are rounded themselves: in bf16 by up to 0.4 %, which the division by a
    temperature of 0.04 turns into 10 % of a probability.)
    """
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return at_least_fp32(a @ b)

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

    Where autocast says bf16, fp16 and bf16: vectors about as long as one fit into fp16, which has three digits (of two)
    more; gradients need the range of fp32. Else, under fp16 too, whose backward pass has a scale that gradients formed
    in the forward pass have not, both stay in the precision of `x`, at least fp32.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return torch.float16, torch.bfloat16
    return x.dtype, x.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, at least fp32; of half-precision ones too, which tensor cores multiply exactly and add up
    in fp32. (Autocast's products are rounded themselves: in bf16 by up to 0.4 %, which the division by a temperature of
    0.04 turns into 10 % of a probability.)
    """
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()

"""Whether Triton's kernels are to be had; the modules that hold some are imported only where they are."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it comes with torch where torch comes with CUDA."""
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels are there for the device that holds `x`."""
    return x.is_cuda and has_triton()

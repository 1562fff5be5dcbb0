"""One file that torch.jit.load opens, in Python or C++, without this package or timm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scaler.export.encoder import Encoder, PlainEncoder


def write(encoder: Encoder, place: Path, *, dynamic_size: bool) -> None:
    """Trace the model: any number of images, of other sizes too where the model itself looks at none (a CNN)."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that TorchScript is old, and that sizes become constants: it is run afterwards
        size = encoder.image_size
        program = torch.jit.trace(PlainEncoder(encoder.model).eval(), torch.zeros(2, 3, size, size), check_trace=False)
        torch.jit.save(torch.jit.freeze(program), str(place))


def read(place: Path, encoder: Encoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The program, as anyone would load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Callable[[Tensor], tuple[Tensor, ...]] = torch.jit.load(str(place), map_location="cpu")
    return program

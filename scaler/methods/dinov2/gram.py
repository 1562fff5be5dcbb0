"""Gram anchoring (DINOv3, arXiv 2508.10104): the similarities between an image's patches stay as an earlier, frozen
teacher had them, while the class token goes on learning. Long runs and large crops need it, whose patch features
otherwise lose their place.

Shapes: n crops, h · w = p patches of the student's grid, f times finer for the gram teacher, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scaler.nn.precision import at_least_fp32, full_precision

_SIMILARITIES = 1 << 25  # most in memory at a time: 128 MiB in fp32


def gram_loss(student: Tensor, teacher: Tensor, *, similarities: int = _SIMILARITIES) -> Tensor:
    """The mean over crops of the mean squared difference of their p² cosine similarities, student's and teacher's.

    Args:
        student: patch features [n, p, d], those of masked patches included.
        teacher: [n, p, d'] of the same patches.
        similarities: most values in memory at a time; more crops are taken in chunks, recomputed in the backward pass.
    """
    with full_precision(student):
        x, y = (F.normalize(at_least_fp32(patches), dim=-1) for patches in (student, teacher))
        chunks = list(zip(*(z.split(max(1, similarities // x.shape[1] ** 2)) for z in (x, y)), strict=True))
        if len(chunks) == 1:
            return _squares(x, y) / len(x)
        sums = [checkpoint(_squares, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(sums).sum() / len(x)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Sum over crops of the mean squared difference of x xᵀ and y yᵀ."""
    return (x @ x.mT - y @ y.mT).square().mean(dim=(1, 2)).sum()


@torch.no_grad()
def to_grid(patches: Tensor, *, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Patch features [n, p', d] of a grid of `old` patches, bicubically on one of `new` patches: [n, p, d]."""
    if old == new:
        return patches
    image = at_least_fp32(patches).unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(image, size=new, mode="bicubic").flatten(2).mT

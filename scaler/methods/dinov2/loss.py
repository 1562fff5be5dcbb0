"""The three losses of DINOv2 (arXiv 2304.07193), as pure functions that run in float64 when they are fed float64.

Shapes: n images, L local crops, b bottleneck width, K prototypes, T masked tokens, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaler.methods.dinov2.prototypes import Comparison, Teacher
from scaler.nn.precision import at_least_fp32

_DUPLICATE = 1e-6  # unit vectors closer than this are one image twice: at fp32 their difference is rounding


def dino(student: Tensor, teacher: Teacher, *, scale: float = 1.0) -> Comparison:
    """DINO's loss (arXiv 2104.14294), for `cross_entropy`: the mean over images and 2 + 2·L pairs of crops.

    Each global crop is compared with the teacher's *other* global crop, each local crop with both.

    Args:
        student: bottlenecks [2 + L, n, b], global crops first.
        teacher: of the two global crops.
        scale: the loss's weight.
    """
    num_crops, n, _ = student.shape
    first, second, both = slice(0, 1), slice(1, 2), slice(0, 2)
    pairs = [(first, second), (second, first), *[(slice(2, num_crops), both)] * (num_crops > 2)]
    weights = student.new_full((n,), 1 / (n * (2 + 2 * (num_crops - 2))))
    return Comparison(student, teacher, pairs, weights, scale=scale, signals=True)


def ibot(student: Tensor, teacher: Teacher, *, weights: Tensor, num_crops: int, scale: float = 1.0) -> Comparison:
    """iBOT's loss (arXiv 2111.07832), for `cross_entropy`: of masked tokens, first averaged in each crop, then over
    crops.

    Args:
        student: bottlenecks [T, b] of the masked tokens; T may be 0.
        teacher: of the same tokens, unmasked, as one crop.
        weights: [T], one over the number of masked tokens in the token's crop.
        num_crops: global crops of the batch, those without a mask included.
        scale: the loss's weight.
    """
    whole = slice(0, 1)
    return Comparison(student[None], teacher, [(whole, whole)], weights / num_crops, scale=scale)


def koleo_loss(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """KoLeo (arXiv 1806.03198) of each group: minus the mean log distance to the nearest neighbour in the group.

    Features are L2-normalised; distances are torch's `pairwise_distance` with the same eps, as in DINOv2. A feature
    whose nearest neighbour is its duplicate adds a constant and no gradient, which would be rounding noise of size
    1/distance.

    Args:
        features: [..., n, d], groups in the leading dimensions.
        eps: of the normalisation, the distance and the logarithm.

    Returns:
        [...], one loss for each group; zero for groups of a single image.
    """
    x = F.normalize(at_least_fp32(features), dim=-1, eps=eps)
    n, d = x.shape[-2:]
    if n == 1:
        return x.sum(dim=(-2, -1)) * 0.0
    with torch.no_grad():  # differences, not products: 1 - cos has no digits left between close neighbours
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        nearest = distances.argmin(dim=-1, keepdim=True)
    neighbours = x.gather(-2, nearest.expand(*x.shape[:-1], d))
    distance = F.pairwise_distance(x, neighbours, eps=eps)
    return -(distance.clamp(min=_DUPLICATE) + eps).log().mean(dim=-1)

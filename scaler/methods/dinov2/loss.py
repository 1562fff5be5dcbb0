"""The three losses of DINOv2 (arXiv 2304.07193), as pure functions that run in float64 when they are fed float64.

Shapes: n images, L local crops, K prototypes, T masked tokens, d features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaler.nn.precision import at_least_fp32

_DUPLICATE = 1e-6  # unit vectors closer than this are one image twice: at fp32 their difference is rounding


def teacher_probabilities(scores: Tensor, *, shift: Tensor, temperature: float) -> Tensor:
    """softmax(scores / temperature + shift), [..., K]; `shift` [K] comes from Sinkhorn-Knopp or from the centre."""
    return (at_least_fp32(scores) / temperature + shift).softmax(dim=-1)


def cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """-Σ teacher · log softmax(student / temperature) over K; scores [..., K] and probabilities [..., K] → [...]."""
    return -(teacher * F.log_softmax(at_least_fp32(student) / temperature, dim=-1)).sum(dim=-1)


def dino_loss(student_global: Tensor, student_local: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """DINO's loss of each image, [n]: the mean over 2 + 2·L pairs of a student's and a teacher's crop.

    Each global crop is compared with the teacher's *other* global crop, each local crop with both.

    Args:
        student_global: scores [2, n, K].
        student_local: scores [L, n, K], L may be 0.
        teacher: probabilities [2, n, K].
        temperature: of the student.
    """
    num_pairs = 2 + 2 * student_local.shape[0]
    total = cross_entropy(student_global, teacher.flip(0), temperature=temperature).sum(dim=0)
    if student_local.shape[0]:
        total = total + cross_entropy(student_local, teacher.sum(dim=0), temperature=temperature).sum(dim=0)
    return total / num_pairs


def ibot_loss(student: Tensor, teacher: Tensor, *, weights: Tensor, num_crops: int, temperature: float) -> Tensor:
    """iBOT's loss (arXiv 2111.07832): cross-entropy on masked tokens, first averaged in each crop, then over crops.

    Args:
        student: scores [T, K] of the masked tokens.
        teacher: probabilities [T, K] of the same tokens, unmasked.
        weights: [T], one over the number of masked tokens in the token's crop.
        num_crops: global crops of the batch, those without a mask included.
        temperature: of the student.
    """
    return (cross_entropy(student, teacher, temperature=temperature) * weights).sum() / num_crops


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

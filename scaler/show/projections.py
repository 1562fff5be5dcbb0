"""Features in the plane and on their principal axes, the same for the same features."""

from __future__ import annotations

import torch
from sklearn.manifold import TSNE
from torch import Tensor


def plane(features: Tensor) -> Tensor:
    """Features [n, d] in the plane, float32 [n, 2], by t-SNE (van der Maaten & Hinton, JMLR 2008).

    It starts from the principal components and draws no random numbers, so the same features give the same picture.
    Fewer than 5 samples stay on their principal components.
    """
    start = principal_components(features, num=2)
    if len(features) < 5:
        return start.float()
    start *= 1e-4 / start[:, 0].std().clamp(min=1e-12)
    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init=start.float().numpy(), random_state=0)
    return torch.from_numpy(tsne.fit_transform(features.float().numpy()))


def principal_components(features: Tensor, *, num: int) -> Tensor:
    """Coordinates of features [n, d] on their first `num` principal axes, float64 [n, num].

    An axis may point either way; here the coordinate of largest size is positive. Axes that do not exist (fewer samples
    or dimensions than `num`) are zero.
    """
    centered = features.double() - features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)  # ascending
    coordinates = centered @ vectors.flip(1)[:, :num]
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))
    coordinates = coordinates * torch.where(largest < 0, -1.0, 1.0)
    return torch.nn.functional.pad(coordinates, (0, num - coordinates.shape[1]))

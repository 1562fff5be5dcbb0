"""Weighted k-nearest-neighbour accuracy of frozen features, as in DINO (arXiv:2104.14294, appendix F; Wu et al. 2018).

Features are L2-normalised, the k most similar training samples vote for their class with weight exp(similarity / τ).
Ties go to the lower training index and the lower class, so the result is a function of its input alone. Memory is
bounded whatever the number of samples: similarities are computed block by block and only the best k are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
    block: tuple[int, int] = (256, 65536),
) -> dict[str, float]:
    """Fraction of test samples whose class gets the most votes (`top1`), or is among the five classes with most.

    Args:
        train_features, test_features: float [N, d] and [M, d] on one device.
        train_labels, test_labels: int64 [N] and [M], from 0 to num_classes - 1.
        block: test rows and training rows whose similarities are held at once.

    A class without any vote is never a prediction, so `top5` equals the chance of a vote where k is small.

    Raises:
        ValueError: shapes or labels that do not fit, k above N, features that are not finite.
    """
    _check(train_features, train_labels, num_classes, name="training")
    _check(test_features, test_labels, num_classes, name="test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"training features have {train_features.shape[1]} dimensions and test features {test_features.shape[1]}; "
            "both must come from the same checkpoint"
        )
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, but it must lie between 1 and the {len(train_features)} training samples; lower k")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but similarities are divided by it: it must be above 0")
    test_rows, train_rows = block
    train = F.normalize(train_features.float(), dim=1)
    correct = torch.zeros(2, dtype=torch.int64, device=train.device)
    for start in range(0, len(test_features), test_rows):
        queries = F.normalize(test_features[start : start + test_rows].float(), dim=1)
        similarity, neighbours = nearest(queries, train, k=k, block=train_rows)
        votes = _votes(similarity, train_labels.to(train.device)[neighbours], temperature, num_classes)
        place = _place(votes, test_labels[start : start + test_rows].to(train.device))
        correct += torch.stack([(place < 1).sum(), (place < 5).sum()])
    top1, top5 = (correct.double() / len(test_features)).tolist()
    return {"top1": top1, "top5": top5}


def nearest(queries: Tensor, keys: Tensor, *, k: int, block: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query and their key indices, both [m, k], largest first, ties by index.

    Args:
        queries: float [m, d]. keys: float [n, d], n ≥ k. block: keys that are compared at once.
    """
    best = queries.new_empty((len(queries), 0))
    index = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, len(keys), block):
        values, found = _top(queries @ keys[start : start + block].T, k)
        # Earlier blocks stand first and the sort is stable: equal values keep the order of their indices.
        best, index = torch.cat([best, values], dim=1), torch.cat([index, found + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order)[:, :k]
    return best, index


def _top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k (or all) largest values of each row of x [m, n] and their columns, ties by column.

    `topk` alone may pick any of several equal values, so rows with a tie at the border are sorted in full.
    """
    if x.shape[1] <= k:
        return x.sort(dim=1, descending=True, stable=True)
    values, index = x.topk(k + 1, dim=1)
    tied = values[:, k] == values[:, k - 1]
    values, index = values[:, :k], index[:, :k]
    index, order = index.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    for row in tied.nonzero()[:, 0].tolist():
        full, columns = x[row].sort(descending=True, stable=True)
        values[row], index[row] = full[:k], columns[:k]
    return values, index


def _votes(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Votes of k neighbours, float64 [m, num_classes]; one column at a time, since that sums in a fixed order."""
    weights = (similarity.double() / temperature).exp()
    votes = weights.new_zeros((len(labels), num_classes))
    for column in range(labels.shape[1]):
        votes.scatter_add_(1, labels[:, column, None], weights[:, column, None])
    return votes


def _place(votes: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 [m]; num_classes where the true one has no vote."""
    own = votes.gather(1, labels[:, None])
    before = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    place = ((votes > own) | ((votes == own) & before)).sum(dim=1)
    return torch.where(own[:, 0] > 0, place, max(votes.shape[1], 5))


def _check(features: Tensor, labels: Tensor, num_classes: int, *, name: str) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        raise ValueError(
            f"{name} features and labels are {list(features.shape)} and {list(labels.shape)}; they must be [n, d] and "
            "[n] with n above 0"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"a {name} sample has no label; kNN needs shards made from class folders")
    if high >= num_classes:
        raise ValueError(
            f"a {name} sample has class {high}, but there are {num_classes} classes (0 to {num_classes - 1})"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} features are not finite; the checkpoint has diverged: take an earlier one")

"""Weighted k-nearest-neighbour accuracy of frozen features, as in DINO (arXiv:2104.14294, appendix F; Wu et al. 2018).

The k training samples of highest cosine similarity vote for their class with weight exp(similarity / τ). The result is
that of the definition in float64: similarities in single precision only choose candidates, with a bound on their error
that says when more of them are needed. Ties go to the lower training sample and the lower class. So predictions are
scikit-learn's (`KNeighborsClassifier` with cosine distances and these weights), and the same on any number of ranks,
each of which holds a part of the samples; memory is bounded whatever their number.

Shapes: m queries, n keys, d dimensions, c candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scaler.collectives import World
from scaler.evals.features import Part

BLOCK = (256, 65536)  # queries of all ranks together, and keys of one, whose similarities are held at once
_SPARE = 16  # candidates more than neighbours
_MOST_TIED = 4096  # equally near neighbours among which the lower sample is sure to be found
_REFINED = 1 << 24  # elements of float64 at once


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
    block: tuple[int, int] = BLOCK,
) -> dict[str, float]:
    """`knn_scores` for one k, of features that are all here: float [N, d] and [M, d], labels int64 [N] and [M].

    Raises:
        ValueError: see `knn_scores`.
    """
    parts = [
        Part(torch.arange(len(labels), device=features.device), labels, features)
        for features, labels in ((train_features, train_labels), (test_features, test_labels))
    ]
    return knn_scores(*parts, ks=[k], temperature=temperature, num_classes=num_classes, block=block)[k]


@torch.no_grad()
def knn_scores(
    train: Part,
    test: Part,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int,
    world: World | None = None,
    leave_out: bool = False,
    block: tuple[int, int] = BLOCK,
) -> dict[int, dict[str, float]]:
    """For each k the fraction of test samples whose class gets the most votes (`top1`), or is among the five classes
    with most (`top5`); called by all ranks together, on the same result on each.

    A class without any vote is never a prediction, so `top5` equals the chance of a vote where k is small.

    Args:
        train, test: this rank's parts, on one device; labels from 0 to num_classes - 1.
        leave_out: no sample votes on itself: for `test` the same samples as `train`.
        block: queries (of all ranks together) and keys whose similarities are held at once.

    Raises:
        ValueError: shapes or labels that do not fit, k above the training samples, features that are not finite.
    """
    world = world or World()
    _check(train, num_classes, name="training")
    _check(test, num_classes, name="test")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"training features have {train.features.shape[1]} dimensions and test features "
            f"{test.features.shape[1]}; both must come from the same checkpoint"
        )
    counts = torch.tensor([len(train.ids), len(test.ids)], device=train.features.device)
    num_train, num_test = world.sum_(counts).tolist()
    for name, count in (("training", num_train), ("test", num_test)):
        if not count:
            raise ValueError(f"there are no {name} features; their number must be above 0")
    for k in ks:
        if not 1 <= k <= num_train - leave_out:
            raise ValueError(f"k is {k}, but it must lie between 1 and the {num_train} training samples; lower k")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but similarities are divided by it: it must be above 0")
    correct = torch.zeros((len(ks), 2), dtype=torch.int64, device=train.features.device)
    start = 0
    for similarity, labels in neighbours(train, test, k=max(ks), world=world, leave_out=leave_out, block=block):
        truth = test.labels[start : start + len(labels)].to(labels.device)
        for row, k in enumerate(ks):
            place = _place(votes(similarity[:, :k], labels[:, :k], temperature, num_classes), truth)
            correct[row] += torch.stack([(place < 1).sum(), (place < 5).sum()])
        start += len(labels)
    shares = (world.sum_(correct).double() / num_test).tolist()
    return {k: {"top1": top1, "top5": top5} for k, (top1, top5) in zip(ks, shares, strict=True)}


@torch.no_grad()
def neighbours(
    train: Part, test: Part, *, k: int, world: World, leave_out: bool = False, block: tuple[int, int] = BLOCK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities float64 [m, k] of this rank's test samples to their nearest training samples on all ranks, and
    these samples' labels int64 [m, k]; nearest first, block by block of test samples.

    All ranks must take all blocks: each asks the others about its queries.
    """
    rows, columns = max(1, block[0] // world.size), block[1]
    keys, device = train.features.float(), train.features.device
    lengths = _lengths(keys)
    (longest,) = world.max_(torch.tensor([len(test.ids)], device=device)).tolist()
    wanted = k + leave_out
    for start in range(0, longest, rows):
        part = slice(start, start + rows)
        queries, own = test.features[part].to(device), test.ids[part].to(device)
        size = len(queries)
        asked = world.all_gather(_padded(queries.float(), min(rows, longest - start), 0.0))
        found, index = nearest(asked, keys, k=min(wanted, len(keys)), block=columns, lengths=lengths)
        facts = [found, train.ids.to(device)[index], train.labels.to(device)[index]]
        fill = (-torch.inf, torch.iinfo(torch.int64).max, -1)  # where a rank has fewer samples than that
        facts = [_padded(fact.T, wanted, value).T for fact, value in zip(facts, fill, strict=True)]
        if world.size > 1:  # [ranks that answer, ranks that ask, m, k] → what was answered to this one, [m, ranks · k]
            shape = (world.size, world.size, -1, wanted)
            facts = [world.all_gather(f.contiguous()).view(shape)[:, world.rank] for f in facts]
            facts = [f.transpose(0, 1).flatten(1) for f in facts]
        similarity, ids, labels = (fact[:size] for fact in facts)
        if leave_out:
            similarity = similarity.masked_fill(ids == own[:, None], -torch.inf)
        order = ids.argsort(dim=1)
        best = similarity.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :k]
        order = order.gather(1, best)
        yield similarity.gather(1, order), labels.gather(1, order)


@torch.no_grad()
def nearest(
    queries: Tensor, keys: Tensor, *, k: int, block: int = BLOCK[1], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest cosine similarities of each query, float64 [m, k] and exact, and the indices of their keys, int64
    [m, k]; largest first, ties by index.

    Args:
        queries: float32 [m, d]. keys: float32 [n, d], n ≥ k. block: keys that are compared at once.
        lengths: of the keys, float64 [n], where the caller knows them.
    """
    lengths = _lengths(keys) if lengths is None else lengths
    lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny)
    units = F.normalize(queries.double(), dim=1)
    best = torch.zeros((len(queries), k), dtype=torch.float64, device=keys.device)
    index = torch.arange(k, device=keys.device).repeat(len(queries), 1)
    rows = units.any(dim=1).nonzero()[:, 0]  # to a query of nothing but zeros all keys are equally near
    dtype, count = torch.float32, k + _SPARE
    while len(rows) and k:
        count = min(count, len(keys))
        found, least = _candidates(units[rows].to(dtype), keys, lengths, count=count, block=block)
        found = found.sort(dim=1).values  # so that the stable sort leaves ties in order of their indices
        exact = _similarity(units[rows], keys, lengths, found)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        best[rows], index[rows] = exact[:, :k], found.gather(1, order)[:, :k]
        if count == len(keys):
            break
        error = (keys.shape[1] + 16) * torch.finfo(dtype).eps  # twice the worst of a sum of d products, and more
        rows = rows[exact[:, k - 1] <= least.double() + error]  # what was left out may be as near
        if dtype is torch.float64:
            count *= 4
        dtype = torch.float64
        if count > max(_MOST_TIED, k + _SPARE):
            break
    return best, index


def _candidates(units: Tensor, keys: Tensor, lengths: Tensor, *, count: int, block: int) -> tuple[Tensor, Tensor]:
    """The keys [m, c] of highest similarity in the precision of `units` [m, d], and the lowest of these, [m]."""
    best = units.new_empty((len(units), 0))
    index = torch.empty((len(units), 0), dtype=torch.int64, device=keys.device)
    for start in range(0, len(keys), block):
        part = slice(start, start + block)
        values = (units @ keys[part].to(units.dtype).T) / lengths[part].to(units.dtype)
        values, found = values.topk(min(count, values.shape[1]), dim=1)
        best, index = torch.cat([best, values], dim=1), torch.cat([index, found + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return index, best[:, -1]


def _similarity(units: Tensor, keys: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
    """Cosine similarity float64 [m, c] of float64 `units` [m, d] to the keys at `index` [m, c].

    Every element is a sum of its own over one row, so that its bits do not depend on what else is computed with it.
    """
    out = torch.empty(index.shape, dtype=torch.float64, device=keys.device)
    columns = max(1, _REFINED // keys.shape[1])
    for row in range(0, len(index), max(1, columns // index.shape[1])):
        rows = slice(row, row + max(1, columns // index.shape[1]))
        for column in range(0, index.shape[1], columns):
            at = index[rows, column : column + columns]
            products = units[rows, None, :] * keys[at].double()
            out[rows, column : column + columns] = products.sum(dim=2) / lengths[at]
    return out


def _lengths(keys: Tensor) -> Tensor:
    """Of each key, float64 [n]."""
    return torch.cat([part.double().norm(dim=1) for part in keys.split(BLOCK[1])])


def _padded(x: Tensor, rows: int, value: float) -> Tensor:
    """`x` with rows of `value` at its end, [rows, …]."""
    return torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), value)]) if len(x) < rows else x


def votes(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Votes of k neighbours, float64 [m, num_classes]; one column at a time, since that sums in a fixed order."""
    weights = (similarity.double() / temperature).exp()
    found = weights.new_zeros((len(labels), num_classes))
    for column in range(labels.shape[1]):
        found.scatter_add_(1, labels[:, column, None], weights[:, column, None])
    return found


def _place(found: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 [m]; num_classes where the true one has no vote."""
    own = found.gather(1, labels[:, None])
    before = torch.arange(found.shape[1], device=found.device) < labels[:, None]
    place = ((found > own) | ((found == own) & before)).sum(dim=1)
    return torch.where(own[:, 0] > 0, place, max(found.shape[1], 5))


def _check(part: Part, num_classes: int, *, name: str) -> None:
    features, labels = part.features, part.labels
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name} features and labels are {list(features.shape)} and {list(labels.shape)}; they must be [n, d] and "
            "[n]"
        )
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"a {name} sample has no label; kNN needs shards made from class folders")
    if high >= num_classes:
        raise ValueError(
            f"a {name} sample has class {high}, but there are {num_classes} classes (0 to {num_classes - 1})"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} features are not finite; the checkpoint has diverged: take an earlier one")

"""Weighted kNN against a plain float64 loop and scikit-learn's classifier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from scaler.collectives import World
from scaler.evals.features import Part
from scaler.evals.knn import knn_accuracy, knn_scores, nearest, neighbours, votes


def make(seed: int, n: int, m: int, dim: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    train_labels = torch.randint(classes, (n,), generator=generator)
    test_labels = torch.randint(classes, (m,), generator=generator)
    train = centers[train_labels] + 1.5 * torch.randn(n, dim, generator=generator)
    test = centers[test_labels] + 1.5 * torch.randn(m, dim, generator=generator)
    return train, train_labels, test, test_labels


def naive(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float, classes: int
) -> dict[str, float]:
    """The definition, one sample at a time, in Python floats."""
    keys = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in train.double().tolist()]
    hits = [0, 0]
    for query, truth in zip(test.double().tolist(), test_labels.tolist(), strict=True):
        norm = math.sqrt(sum(y * y for y in query))
        similarity = [sum(a * b for a, b in zip(query, key, strict=True)) / norm for key in keys]
        neighbours = sorted(range(len(keys)), key=lambda i: (-similarity[i], i))[:k]
        votes: dict[int, float] = {}
        for i in neighbours:
            label = int(train_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity[i] / temperature)
        ranking = sorted(votes, key=lambda label: (-votes[label], label))
        hits[0] += truth in ranking[:1]
        hits[1] += truth in ranking[:5]
    return {"top1": hits[0] / len(test), "top5": hits[1] / len(test)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    m=st.integers(1, 20),
    k=st.integers(1, 30),
    classes=st.integers(1, 12),
    temperature=st.sampled_from([0.03, 0.07, 1.0]),
    block=st.tuples(st.integers(1, 25), st.integers(1, 70)),
)
def test_matches_the_definition_for_any_blocks(
    seed: int, n: int, m: int, k: int, classes: int, temperature: float, block: tuple[int, int]
) -> None:
    data = make(seed, n, m, 6, classes)
    k = min(k, n)
    got = knn_accuracy(*data, k=k, temperature=temperature, num_classes=classes, block=block)
    assert got == pytest.approx(naive(*data, k, temperature, classes), abs=1e-12)


def test_matches_scikit_learn() -> None:
    train, train_labels, test, test_labels = make(7, 500, 300, 16, 10)
    model = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    model.fit(train.double().numpy(), train_labels.numpy())
    scores = model.predict_proba(test.double().numpy())
    order = np.argsort(-scores, axis=1, kind="stable")
    truth = test_labels.numpy()[:, None]
    voted = np.take_along_axis(scores, truth, axis=1)[:, 0] > 0
    got = knn_accuracy(train, train_labels, test, test_labels, k=20, temperature=0.07, num_classes=10)
    assert got["top1"] == pytest.approx((order[:, :1] == truth).any(axis=1).mean())
    assert got["top5"] == pytest.approx(((order[:, :5] == truth).any(axis=1) & voted).mean())
    assert 0.2 < got["top1"] < got["top5"] < 1.0  # neither trivial nor perfect, so that the comparison can fail


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), k=st.integers(1, 12), block=st.integers(1, 65))
def test_ties_go_to_the_lower_index(data: st.DataObject, n: int, k: int, block: int) -> None:
    k = min(k, n)
    directions = {0.0: (0.0, 2.0), 0.6: (3.0, 4.0), 1.0: (1.0, 0.0)}  # by their cosine with (1, 0)
    values = data.draw(st.lists(st.sampled_from(sorted(directions)), min_size=n, max_size=n))
    lengths = data.draw(st.lists(st.sampled_from([0.25, 1.0, 8.0]), min_size=n, max_size=n))
    keys = torch.tensor([directions[value] for value in values]) * torch.tensor(lengths)[:, None]
    best, index = nearest(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), keys, k=k, block=block)
    expected = sorted(range(n), key=lambda i: (-values[i], i))[:k]
    assert index.tolist() == [expected, list(range(k))]  # to nothing all are equally near
    assert best.tolist() == [[values[i] for i in expected], [0.0] * k]


def scikit_learn(train: Part, test: Part, k: int, temperature: float) -> list[int]:
    """What scikit-learn predicts from the same features."""
    model = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    return model.fit(train.features.double(), train.labels).predict(test.features.double()).tolist()


def close_together(seed: int, n: int) -> tuple[Part, Part]:
    """Samples whose cosines differ from 1 by 1e-6, as a fresh ViT's do: single precision cannot order them."""
    train, labels, test, truth = make(seed, n, 90, 24, 7)
    offset = 300 * torch.ones(24)
    return Part(torch.arange(n), labels, train + offset), Part(torch.arange(90), truth, test + offset)


def test_predictions_are_those_of_scikit_learn() -> None:
    """On any number of ranks: test_ranks.py."""
    train, test = close_together(seed=5, n=400)
    (found,) = (
        torch.cat(pair) for pair in [[votes(*r, 0.07, 7) for r in neighbours(train, test, k=20, world=World())]]
    )
    expected = scikit_learn(train, test, 20, 0.07)
    assert found.argmax(dim=1).tolist() == expected
    alone = knn_scores(train, test, ks=[1, 5, 20], num_classes=7)
    assert alone[20]["top1"] == np.mean(np.array(expected) == test.labels.numpy())
    for k, scores in alone.items():
        assert scores["top1"] == np.mean(np.array(scikit_learn(train, test, k, 0.07)) == test.labels.numpy())
    assert 0.2 < alone[1]["top1"] < alone[20]["top1"] < 1


def test_no_sample_votes_on_itself_when_left_out() -> None:
    train, _ = close_together(seed=9, n=120)
    again = Part(*(torch.cat([tensor, tensor[:5]]) for tensor in train))._replace(ids=torch.arange(125))  # duplicates
    found = knn_scores(again, again, ks=[1, 3], num_classes=7, leave_out=True)
    hits = 0
    for i in range(125):
        rest = Part(*(tensor[torch.arange(125) != i] for tensor in again))
        hits += scikit_learn(rest, Part(*(tensor[i : i + 1] for tensor in again)), 3, 0.07) == [int(again.labels[i])]
    assert found[3]["top1"] == pytest.approx(hits / 125)
    assert knn_scores(again, again, ks=[1], num_classes=7)[1]["top1"] == 1.0
    with pytest.raises(ValueError, match="k is 125"):
        knn_scores(again, again, ks=[125], num_classes=7, leave_out=True)


def test_equal_votes_go_to_the_lower_class() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([2, 1])
    query = torch.tensor([[3.0, 0.0]])
    for truth, expected in ((1, 1.0), (2, 0.0)):
        got = knn_accuracy(train, labels, query, torch.tensor([truth]), k=2, num_classes=8)
        assert got == {"top1": expected, "top5": 1.0}


def test_a_class_without_votes_is_no_prediction() -> None:
    train, labels = torch.eye(2), torch.tensor([0, 0])
    got = knn_accuracy(train, labels, torch.eye(2), torch.tensor([1, 0]), k=2, num_classes=3)
    assert got == {"top1": 0.5, "top5": 0.5}


def test_length_of_features_does_not_matter_and_the_input_stays() -> None:
    train, train_labels, test, test_labels = make(3, 100, 50, 8, 4)
    scale = torch.linspace(0.1, 50, 100)[:, None]
    before = train.clone()
    plain = knn_accuracy(train, train_labels, test, test_labels, num_classes=4)
    assert plain == knn_accuracy(train * scale, train_labels, test * 7, test_labels, num_classes=4)
    assert torch.equal(train, before)


BAD = {
    "k": (dict(k=4), r"k is 4.* 3 training samples"),
    "k0": (dict(k=0), r"k is 0"),
    "temperature": (dict(temperature=0.0), "temperature is 0.0"),
    "unlabelled": (dict(train_labels=torch.tensor([0, -1, 1])), "training sample has no label"),
    "class": (dict(test_labels=torch.tensor([0, 5])), "test sample has class 5.*0 to 1"),
    "dimensions": (dict(test_features=torch.ones(2, 4)), "3 dimensions and test features 4"),
    "shape": (dict(test_labels=torch.tensor([0])), r"test features and labels are \[2, 3\] and \[1\]"),
    "empty": (dict(test_features=torch.ones(0, 3), test_labels=torch.ones(0, dtype=torch.int64)), "above 0"),
    "nan": (dict(train_features=torch.full((3, 3), math.nan)), "training features are not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    change, message = BAD[name]
    arguments = dict(
        train_features=torch.eye(3), train_labels=torch.tensor([0, 1, 1]), test_features=torch.eye(3)[:2],
        test_labels=torch.tensor([0, 1]), k=2, num_classes=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    data = make(11, 3000, 500, 32, 10)
    assert knn_accuracy(*(x.cuda() for x in data), num_classes=10) == pytest.approx(
        knn_accuracy(*data, num_classes=10), abs=0.004
    )

"""Linear classifiers against scikit-learn's logistic regression and torch's SGD."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scaler.collectives import World
from scaler.evals.features import Part
from scaler.evals.linear import MOMENTUM, _batches, _Heads, _Samples, linear_scores


def digits() -> tuple[Part, Part]:
    """scikit-learn's digits as features of 64 dimensions: 1,197 to train on, 600 to test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    features, labels = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    ids = torch.arange(len(labels))
    return Part(ids[600:], labels[600:], features[600:]), Part(ids[:600], labels[:600], features[:600])


def test_as_good_as_logistic_regression() -> None:
    """The best of the grid, chosen without a look at the test images, and far better than what the grid has at its low
    end; an input of noise is not chosen, and features of any scale give the same."""
    train, test = digits()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train.features, train.labels)
    expected = model.score(test.features, test.labels)
    noise = torch.randn(1797, 8, generator=torch.Generator().manual_seed(1))
    parts = [part._replace(features=torch.cat([100 * part.features, noise[part.ids]], dim=1)) for part in (train, test)]
    inputs = {"noise": slice(64, 72), "digits": slice(0, 64)}
    rates = (1e-5, 1e-2, 0.1, 0.5)
    found = linear_scores(*parts, inputs=inputs, num_classes=10, learning_rates=rates)
    assert abs(found.scores["top1"] - expected) <= 0.003
    assert found.scores["top1"] < found.scores["top5"] and 0 < found.scores["loss"] < 0.3
    assert len(found.grid) == 8 and found.grid[0].input == "digits"
    top1 = {(row.input, row.lr): row.top1 for row in found.grid}
    assert top1["noise", 0.1] < 0.25 and top1["digits", 1e-5] < found.grid[0].top1 - 0.02


def test_every_head_is_trained_as_torch_would_train_it_alone() -> None:
    train, _ = digits()
    positions, steps, size = torch.arange(0, 1197, 3), 30, 40
    heads = _Heads(
        _Samples(train, world=World(), device="cpu"),
        positions,
        {"all": slice(None), "half": slice(10, 42)},
        (1e-3, 0.1),
        num_classes=10,
    )
    heads.train(batch_size=size, steps=steps, seed=3)
    order = train.ids.argsort()
    features, labels = train.features[order][positions], train.labels[order][positions]
    features = (features - features.mean(dim=0)) / features.std(dim=0, unbiased=False).clamp(min=1e-6)
    for row, columns in enumerate([slice(None), slice(10, 42)]):
        for column, lr in enumerate((1e-3, 0.1)):
            x = features[:, columns]
            model = torch.nn.Linear(x.shape[1], 10)
            torch.nn.init.zeros_(model.weight)
            torch.nn.init.zeros_(model.bias)
            groups = [{"params": [model.weight], "weight_decay": 1 / len(x)}, {"params": [model.bias]}]
            optimizer = torch.optim.SGD(groups, lr=lr * size / 256, momentum=MOMENTUM)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)
            for batch in _batches(len(x), batch_size=size, steps=steps, seed=3):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(heads.weights[row][:, column].T, model.weight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(heads.biases[row][column], model.bias, rtol=1e-4, atol=1e-6)


def test_batches_are_epochs() -> None:
    rows = torch.cat(list(_batches(10, batch_size=4, steps=5, seed=0))).tolist()
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]


def test_bad_input_is_refused() -> None:
    train, test = digits()
    few = Part(*(tensor[:3] for tensor in train))
    with pytest.raises(ValueError, match="3 training images, of which 10% are to choose by: that is 0"):
        linear_scores(few, test, inputs={"all": slice(None)}, num_classes=10)
    bad = train._replace(features=train.features.clone().fill_(math.nan))
    with pytest.raises(ValueError, match="training features are not finite"):
        linear_scores(bad, test, inputs={"all": slice(None)}, num_classes=10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    train, test = digits()
    options = {"inputs": {"all": slice(None)}, "num_classes": 10, "min_steps": 300}
    found, expected = (linear_scores(train, test, device=device, **options).scores for device in ("cuda", "cpu"))
    assert found["top1"] == pytest.approx(expected["top1"], abs=0.004)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)

"""Linear classifiers on frozen features, as DINOv2 measures its own (arXiv:2304.07193): a whole grid of them, learning
rates × what of the network's last blocks they see, trained together in one pass over features that are there already.

All rates of one input share one matrix product, and the gradient of the cross-entropy is written out, so a step is two
products for each input. Features stay on the rank that has them: a batch is put together by one sum over ranks, and
each rank trains its share of the rates, in the same arithmetic as one rank would train them.

The grid is trained on a part of the training images and chosen by the others; what was chosen is trained once more, on
all of them, and only then meets the images on which it is reported. Features are standardised per channel, which a
linear classifier can undo and which makes one grid of rates fit features of any scale. A weight decay of one over the
number of images, the prior of scikit-learn's `LogisticRegression`, keeps small sets from being learned by heart; of a
million images nothing is left of it, as in DINOv2.

Shapes: n samples, d channels of an input, r rates, c classes, b samples a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scaler.collectives import World
from scaler.evals.features import Part
from shards.random import keyed_permutation

# At 256 images a batch: DINOv2's thirteen, and three above them for small sets, on which a training is short.
LEARNING_RATES = (*(float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 2, 5)), 1.0)
MOMENTUM = 0.9
_BLOCK = 4096  # samples that are classified, or counted, at once


@dataclass(frozen=True)
class Classifier:
    """One of the grid.

    Attributes:
        input: which features it sees; lr: its learning rate at 256 images a batch.
        top1, loss: on the held-out training images.
    """

    input: str
    lr: float
    top1: float
    loss: float


@dataclass(frozen=True)
class LinearResult:
    """The grid, best first, and the scores of the best on the test images, when trained on all training images."""

    grid: list[Classifier]
    scores: dict[str, float]


@torch.no_grad()
def linear_scores(
    train: Part,
    test: Part,
    *,
    inputs: Mapping[str, slice],
    num_classes: int,
    device: torch.device | str = "cpu",
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: float = 10.0,
    min_steps: int = 3000,
    batch_size: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    world: World | None = None,
) -> LinearResult:
    """Train the grid and score the best of it; called by all ranks together, with the same result on each.

    Args:
        train, test: this rank's parts; labels from 0 to num_classes - 1.
        inputs: names of columns of the features.
        epochs, min_steps: length of a training: the longer of the two.
        batch_size: images a step, fewer of small sets: an epoch has 8 steps or more.
        held_out: the part of the training images by which is chosen.

    Raises:
        ValueError: too few training images, or features that are not finite.
    """
    world = world or World()
    samples, count = _Samples(train, world=world, device=device), 0
    order = torch.from_numpy(keyed_permutation(len(samples.labels), seed, "held out"))
    count = round(held_out * len(order))
    if not 0 < count < len(order):
        raise ValueError(
            f"{len(order)} training images, of which {held_out:.0%} are to choose by: that is {count}; give more images"
        )
    for part, name in ((train, "training"), (test, "test")):
        if not part.features.isfinite().all():
            raise ValueError(f"{name} features are not finite; the checkpoint has diverged: take an earlier one")
    chosen_by, trained_on = order[:count].sort().values, order[count:].sort().values
    own = list(learning_rates)[world.rank :: world.size]

    def trained(positions: Tensor, wanted: Mapping[str, slice], rates: Sequence[float]) -> _Heads:
        size = min(batch_size, max(1, len(positions) // 8))
        heads = _Heads(samples, positions, wanted, rates, num_classes=num_classes)
        heads.train(batch_size=size, steps=max(min_steps, math.ceil(epochs * len(positions) / size)), seed=seed)
        return heads

    heads, sums = trained(trained_on, inputs, own), torch.zeros(len(inputs), len(own), 3, dtype=torch.float64)
    for at in chosen_by.split(_BLOCK):
        sums += heads.sums(samples.features(at), samples.labels[at].to(device)).cpu()
    rows = [
        Classifier(name, lr, *(sums[i, j, [0, 2]] / count).nan_to_num(nan=math.inf).tolist())
        for i, name in enumerate(inputs)
        for j, lr in enumerate(own)
    ]
    del heads
    grid = [row for rows_of_rank in world.gather_objects(rows) for row in rows_of_rank]
    grid.sort(key=lambda row: (-row.top1, row.loss, row.lr))
    # So few images cannot tell those apart whose accuracy is within a standard error of the best; their loss can.
    least = grid[0].top1 - math.sqrt(grid[0].top1 * (1 - grid[0].top1) / count)
    best = min((row for row in grid if row.top1 >= least), key=lambda row: row.loss)
    grid.remove(best)
    grid.insert(0, best)
    final = trained(order.sort().values, {best.input: inputs[best.input]}, [best.lr])
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for features, labels in zip(test.features.split(_BLOCK), test.labels.split(_BLOCK), strict=True):
        totals += final.sums(features.to(device), labels.to(device))[0, 0]
    num_test = world.sum_(torch.tensor([len(test.labels)], device=device))
    top1, top5, loss = (world.sum_(totals) / num_test).tolist()
    return LinearResult(grid, {"top1": top1, "top5": top5, "loss": loss})


class _Samples:
    """The samples of all ranks by their position in the order of ids; their features stay where they are."""

    def __init__(self, part: Part, *, world: World, device: torch.device | str) -> None:
        facts = world.gather_objects((part.ids.cpu(), part.labels.cpu()))
        ids, labels = (torch.cat(column) for column in zip(*facts, strict=True))
        self.labels = labels[ids.argsort()]
        self.rows = torch.full((len(ids),), -1, dtype=torch.int64)  # of `part`, by position
        self.rows[torch.searchsorted(ids.sort().values, part.ids.cpu().contiguous())] = torch.arange(len(part.ids))
        self.part, self.world, self.device = part, world, device

    def own(self, positions: Tensor) -> Tensor:
        """The features, float32 on the device, of those samples at `positions` that this rank has."""
        rows = self.rows[positions]
        return self.part.features[rows[rows >= 0].to(self.part.features.device)].to(self.device)

    def features(self, positions: Tensor) -> Tensor:
        """The features [b, …] of the samples at these positions, on every rank."""
        out = torch.zeros((len(positions), self.part.features.shape[1]), device=self.device)
        out[(self.rows[positions] >= 0).to(self.device)] = self.own(positions)
        return self.world.sum_(out)

    def moments(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, in float64."""
        mean = self._mean(positions, lambda x: x)
        return mean, self._mean(positions, lambda x: (x - mean).square()).sqrt()

    def _mean(self, positions: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(self.part.features.shape[1], dtype=torch.float64, device=self.device)
        for at in positions.split(_BLOCK):
            total += value(self.own(at).double()).sum(dim=0)
        return self.world.sum_(total) / len(positions)


class _Heads:
    """Classifiers of every input at every rate, all zeros, which is where a convex problem may begin.

    Args:
        positions: the samples that they are trained on, by whose moments features are standardised.
    """

    def __init__(
        self,
        samples: _Samples,
        positions: Tensor,
        inputs: Mapping[str, slice],
        rates: Sequence[float],
        *,
        num_classes: int,
    ) -> None:
        self.samples, self.positions, self.inputs = samples, positions, inputs
        mean, deviation = samples.moments(positions)
        self.shift, self.scale = mean.float(), 1 / deviation.clamp(min=1e-6).float()
        self.rates = torch.tensor(list(rates), device=samples.device)
        shape = (len(rates), num_classes)
        widths = [len(range(*columns.indices(len(mean)))) for columns in inputs.values()]
        self.weights = [torch.zeros((width, *shape), device=samples.device) for width in widths]
        self.biases = [torch.zeros(shape, device=samples.device) for _ in widths]

    def train(self, *, batch_size: int, steps: int, seed: int) -> None:
        """SGD with momentum and a cosine to 0, by the loss of each classifier alone; images drawn by the seed."""
        tensors = [*self.weights, *self.biases]
        momenta = [torch.zeros_like(tensor) for tensor in tensors]
        batches = _batches(len(self.positions), batch_size=batch_size, steps=steps, seed=seed)
        for step, rows in enumerate(batches):
            at = self.positions[rows]
            x, labels = self._standardised(self.samples.features(at)), self.samples.labels[at].to(self.samples.device)
            if not len(self.rates):
                continue  # more ranks than rates: this one only lends its features
            errors = []
            for columns, weight, bias in zip(self.inputs.values(), self.weights, self.biases, strict=True):
                scores = torch.addmm(bias.flatten(), x[:, columns], weight.flatten(1)).view(len(x), *bias.shape)
                error = scores.softmax(dim=2).div_(len(x))  # [b, r, c]
                error[torch.arange(len(x), device=x.device), :, labels] -= 1 / len(x)
                errors.append(error)
            gradients = [
                (x[:, columns].T @ error.flatten(1)).view_as(weight)
                for columns, error, weight in zip(self.inputs.values(), errors, self.weights, strict=True)
            ]
            gradients += [error.sum(dim=0) for error in errors]
            torch._foreach_mul_(momenta, MOMENTUM)
            torch._foreach_add_(momenta, gradients)
            torch._foreach_add_(momenta[: len(self.weights)], self.weights, alpha=1 / len(self.positions))
            rate = self.rates * (batch_size / 256 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for tensor, momentum in zip(tensors, momenta, strict=True):
                tensor.addcmul_(momentum, rate[:, None], value=-1)

    def sums(self, features: Tensor, labels: Tensor) -> Tensor:
        """Of each input and rate, [inputs, r, 3]: hits at the first and among the first five, and the loss, summed."""
        x, out = self._standardised(features), []
        for columns, weight, bias in zip(self.inputs.values(), self.weights, self.biases, strict=True):
            scores = torch.addmm(bias.flatten(), x[:, columns], weight.flatten(1)).view(len(x), *bias.shape)
            hits = scores.topk(min(5, scores.shape[2]), dim=2).indices == labels[:, None, None]
            losses = -F.log_softmax(scores, dim=2)[torch.arange(len(x), device=x.device), :, labels]
            facts = [hits[:, :, 0], hits.any(dim=2), losses]
            out.append(torch.stack([fact.double().sum(dim=0) for fact in facts], dim=1))
        return torch.stack(out)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.shift) * self.scale


def _batches(count: int, *, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of the batches: every `count` of them are all rows once, in an order of their own."""
    waiting, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting, epoch = np.concatenate([waiting, keyed_permutation(count, seed, "linear", epoch)]), epoch + 1
        yield torch.from_numpy(waiting[:batch_size])
        waiting = waiting[batch_size:]

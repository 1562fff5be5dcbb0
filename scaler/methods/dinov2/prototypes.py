"""Cross-entropy between a student's and a teacher's softmax over very many prototypes, within a budget of memory.

A step of DINOv2 has thousands of rows, each scored against 65,536 or more prototypes: kept for the backward pass, the
scores would be by far the largest thing in memory. So rows are taken in tiles: a tile's scores turn into its share of
the loss *and of the gradient* before the next tile begins, which also spares the backward pass a second look at them.

Shapes: v crops of the student, t of the teacher, n samples, b bottleneck width, K prototypes; in a tile g crops of the
student, s samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaler.methods.dinov2.tiles import compiled, default_tile_elements, tiles
from scaler.nn.precision import full_precision, product, product_dtypes

Pairs = Sequence[tuple[slice, slice]]


@dataclass(frozen=True)
class Teacher:
    """What a student's softmax is compared with: softmax(bottlenecks · prototypes / temperature + shift).

    Attributes:
        bottlenecks: [t, n, b].
        prototypes: [K, b].
        shift: [K], from Sinkhorn-Knopp or from the centre.
        temperature: of the scores.
    """

    bottlenecks: Tensor
    prototypes: Tensor
    shift: Tensor
    temperature: float


@dataclass(frozen=True)
class Comparison:
    """Crops of the student and the teacher's that they are compared with; its loss is the weighted sum of all pairs'.

    Attributes:
        student: bottlenecks [v, n, b], fp32 or float64; n may be 0.
        teacher: of the same n samples.
        pairs: ranges of the student's crops, in order and together all of them, each with the range of the teacher's
            crops that every one of them is compared with.
        weights: of the samples, [n].
        scale: of this comparison in a sum of several.
        signals: whether entropy and agreement are wanted.
    """

    student: Tensor
    teacher: Teacher
    pairs: Pairs
    weights: Tensor
    scale: float = 1.0
    signals: bool = False


class CrossEntropy(NamedTuple):
    """Detached scalars of a comparison: `loss`; and where signals were asked for (else 0), means over the crops that
    have one partner: the partner's `entropy` over log K, 1 uniform and 0 certain, and the `agreement` with it on the
    highest prototype.
    """

    loss: Tensor
    entropy: Tensor
    agreement: Tensor


def cross_entropy(
    comparisons: Sequence[Comparison],
    prototypes: Tensor,
    *,
    temperature: float,
    tile_elements: int | None = None,
    fused: bool = False,
) -> tuple[Tensor, list[CrossEntropy]]:
    """Of all pairs, -Σ teacher · log softmax(student · prototypes / temperature): the scaled sum of the comparisons,
    which is differentiable, and each one's loss and signals.

    Under bf16 autocast the factors of products are rounded (see `product_dtypes`); all else is in the precision of
    the student's bottlenecks. Comparisons with the same prototypes belong into one call, since its gradient is as
    large as they are. The graph can run backward once.

    Args:
        comparisons: of a student with these prototypes.
        prototypes: [K, b], of the bottlenecks' dtype.
        temperature: of the student.
        tile_elements: most scores in memory at a time, the teacher's included (but at least those of one sample);
            None: as suits the device.
        fused: whether the passes over a tile's scores are compiled into a few.
    """
    students = [comparison.student for comparison in comparisons]
    tile_elements = tile_elements or default_tile_elements(prototypes.device)
    compare_tile = compiled(_compare_tile) if fused else _compare_tile_
    total, values = _CrossEntropy.apply(comparisons, temperature, tile_elements, compare_tile, prototypes, *students)
    return total, [CrossEntropy(*row.unbind()) for row in values]


class _Keys(NamedTuple):
    """The student's prototypes [K, b], rounded as factors of scores and as those of gradients."""

    of_scores: Tensor
    of_gradients: Tensor


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        comparisons: Sequence[Comparison],
        temperature: float,
        tile_elements: int,
        compare_tile: Callable[..., Tensor],
        prototypes: Tensor,
        *students: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dtypes = product_dtypes(prototypes)
        keys = _Keys(*(prototypes.to(dtype) for dtype in dtypes))
        ctx.gradients = None
        if any(ctx.needs_input_grad):
            ctx.gradients = [torch.zeros_like(x) for x in (prototypes, *students)]
        with full_precision(prototypes):
            rows = [
                _compare(
                    comparison,
                    keys,
                    temperature=temperature,
                    tile_elements=tile_elements,
                    compare_tile=compare_tile,
                    gradients=None if ctx.gradients is None else (ctx.gradients[0], ctx.gradients[1 + number]),
                )
                for number, comparison in enumerate(comparisons)
            ]
        values = torch.stack(rows)
        ctx.mark_non_differentiable(values)
        losses = [comparison.scale * row[0] for comparison, row in zip(comparisons, rows, strict=True)]
        return torch.stack(losses).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the graph of this loss runs backward once"
        return None, None, None, None, *[gradient.mul_(grad) for gradient in gradients]  # in place: the first is large


def _compare(
    comparison: Comparison,
    keys: _Keys,
    *,
    temperature: float,
    tile_elements: int,
    compare_tile: Callable[..., Tensor],
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Loss, entropy and agreement, [3]; `gradients`, of prototypes and student, get those of the scaled loss."""
    student, teacher, pairs = comparison.student, comparison.teacher, comparison.pairs
    (v, n, _), t = student.shape, len(teacher.bottlenecks)
    z, teacher_z, teacher_keys = student / temperature, teacher.bottlenecks / teacher.temperature, teacher.prototypes
    (num_keys, _), dtype, gradient_dtype = keys.of_scores.shape, keys.of_scores.dtype, keys.of_gradients.dtype
    teacher_z, teacher_keys = teacher_z.to(dtype), teacher_keys.to(dtype)
    values = student.new_zeros(3)
    # A crop with two partners has the mean of their probabilities as its target, and twice the weight.
    weights = student.new_empty(v, n)
    for crops, partners in pairs:
        weights[crops] = comparison.weights * len(range(t)[partners])
    singles = sum(len(range(v)[crops]) for crops, partners in pairs if len(range(t)[partners]) == 1)
    # In memory at once: the student's scores, those of a range's partners and their mean, and products of the two.
    most = max(len(range(v)[crops]) + 2 * len(range(t)[partners]) - 1 for crops, partners in pairs)
    size = tile_elements // ((v + most) * num_keys)

    def add_tile(samples: slice) -> None:
        """Its own function, so that a tile's scores are gone before the next one's come."""
        rows = z[:, samples]
        scores = _scores(rows.to(dtype), keys.of_scores)
        in_place = scores.dtype == gradient_dtype and compare_tile is _compare_tile_
        delta = scores if in_place else torch.empty_like(scores, dtype=gradient_dtype)
        losses = []
        for crops, partners in pairs:
            signals = comparison.signals and len(range(t)[partners]) == 1
            logits = _scores(teacher_z[partners, samples], teacher_keys)
            found = compare_tile(scores[crops], logits, teacher.shift, None if in_place else delta[crops], signals)
            del logits
            losses.append(found[0])
            if signals:
                values[1:] += found[1:].sum(dim=(1, 2)) / (n * singles)
        values[0] += (torch.cat(losses) * weights[:, samples]).sum()
        if gradients is not None:
            flat = delta.flatten(0, 1)
            scaled = rows * (comparison.scale * weights[:, samples, None])
            _add_product_(gradients[0], flat.mT, scaled.to(gradient_dtype).flatten(0, 1))
            gradients[1][:, samples] = product(flat, keys.of_gradients).view_as(rows)

    for samples in tiles(n, at_most=size):
        add_tile(samples)
    if gradients is not None:
        gradients[1].mul_(weights[:, :, None] * (comparison.scale / temperature))
    return values


def _scores(rows: Tensor, keys: Tensor) -> Tensor:
    """[g, s, b] → [g, s, K]."""
    return product(rows.flatten(0, 1), keys.mT).unflatten(0, rows.shape[:2])


def _compare_tile_(scores: Tensor, logits: Tensor, shift: Tensor, delta: Tensor | None, signals: bool) -> Tensor:
    """Of student scores [g, s, K] and those of the t partners that all g crops have, [t, s, K], which are spent, the
    losses and, where signals are wanted, entropies over log K and agreements: [1 or 3, g, s]. The scores become the
    losses' gradient, softmax - target, which is also written to `delta` [g, s, K], in its precision.
    """
    logits += shift
    target = logits.softmax(dim=-1)
    target = target[0] if len(target) == 1 else target.mean(dim=0)
    found = []
    if signals:
        entropy = torch.special.entr(target).sum(dim=-1) / math.log(target.shape[-1])
        agreement = scores.argmax(dim=-1) == target.argmax(dim=-1)
        found = [entropy.expand_as(agreement), agreement.to(entropy.dtype)]
    scores -= scores.amax(dim=-1, keepdim=True)
    own = torch.mul(scores, target, out=logits if logits.shape == scores.shape else None).sum(dim=-1)
    total = scores.exp_().sum(dim=-1, keepdim=True)
    scores /= total
    scores -= target
    if delta is not None:
        delta.copy_(scores)
    return torch.stack([total.squeeze(-1).log() - own, *found])


def _compare_tile(scores: Tensor, logits: Tensor, *args: Any) -> Tensor:
    """The same, to be compiled: what is in between, these copies too, then takes no memory."""
    return _compare_tile_(scores.clone(), logits.clone(), *args)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b)

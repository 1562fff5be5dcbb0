"""Cross-entropy between a student's and a teacher's softmax over very many prototypes, within a budget of memory.

A step of DINOv2 has thousands of rows, each scored against 65,536 or more prototypes: kept for the backward pass, the
scores would be by far the largest thing in memory. So rows are taken in tiles: a tile's scores turn into its share of
the loss *and of the gradient* before the next tile begins, which also spares the backward pass a second look at them.

Shapes: v crops of the student, t of the teacher, n samples, b bottleneck width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaler.nn.precision import at_least_fp32, full_precision

Partners = Sequence[tuple[int, ...]]


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

    @torch.no_grad()
    def probabilities(self, samples: slice = slice(None)) -> Tensor:
        """[t, samples, K] in the precision of the bottlenecks, at least fp32."""
        z = at_least_fp32(self.bottlenecks[:, samples]) / self.temperature
        with full_precision(z):
            logits = torch.addmm(self.shift, z.flatten(0, 1), self.prototypes.mT).unflatten(0, z.shape[:2])
            return logits.softmax(dim=-1)


@dataclass(frozen=True)
class Comparison:
    """Crops of the student and the teacher's that they are compared with; its loss is the weighted sum of all pairs'.

    Attributes:
        student: bottlenecks [v, n, b], fp32 or float64; n may be 0.
        teacher: of the same n samples.
        partners: for every crop of the student, the crops of the teacher that it is compared with.
        weights: of the samples, [n].
        scale: of this comparison in a sum of several.
        signals: whether entropy and agreement are wanted.
    """

    student: Tensor
    teacher: Teacher
    partners: Partners
    weights: Tensor
    scale: float = 1.0
    signals: bool = False


class CrossEntropy(NamedTuple):
    """Detached scalars of a comparison: `loss`; and where signals were asked for (else 0), the mean `entropy` of the
    teacher over log K, 1 uniform and 0 certain, and the `agreement` on the highest prototype of crops that have one
    partner.
    """

    loss: Tensor
    entropy: Tensor
    agreement: Tensor


def cross_entropy(
    comparisons: Sequence[Comparison], prototypes: Tensor, *, temperature: float, tile_elements: int
) -> tuple[Tensor, list[CrossEntropy]]:
    """Of all pairs, -Σ teacher · log softmax(student · prototypes / temperature): the scaled sum of the comparisons,
    which is differentiable, and each one's loss and signals.

    Scores are computed in bf16 where autocast says so, all else in the precision of the student's bottlenecks; under
    fp16 they too, since gradients are formed before a loss scale could keep them from rounding to zero. Comparisons
    with the same prototypes belong into one call, since its gradient is as large as they are. The graph can run
    backward once.

    Args:
        comparisons: of a student with these prototypes.
        prototypes: [K, b], of the bottlenecks' dtype.
        temperature: of the student.
        tile_elements: most scores in memory at a time, the teacher's included (but at least those of one sample).
    """
    students = [comparison.student for comparison in comparisons]
    total, values = _CrossEntropy.apply(comparisons, temperature, tile_elements, prototypes, *students)
    return total, [CrossEntropy(*row.unbind()) for row in values]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        comparisons: Sequence[Comparison],
        temperature: float,
        tile_elements: int,
        prototypes: Tensor,
        *students: Tensor,
    ) -> tuple[Tensor, Tensor]:
        kind, precision = prototypes.device.type, prototypes.dtype
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != torch.float16:
            precision = torch.get_autocast_dtype(kind)
        ctx.gradients = None
        if any(ctx.needs_input_grad):
            ctx.gradients = [torch.zeros_like(x) for x in (prototypes, *students)]
        with full_precision(prototypes):
            keys = prototypes.to(precision)
            rows = [
                _compare(
                    comparison,
                    keys,
                    temperature=temperature,
                    tile_elements=tile_elements,
                    gradients=None if ctx.gradients is None else (ctx.gradients[0], ctx.gradients[1 + number]),
                )
                for number, comparison in enumerate(comparisons)
            ]
        values = torch.stack(rows)
        ctx.mark_non_differentiable(values)
        scales = values.new_tensor([comparison.scale for comparison in comparisons])
        return (values[:, 0] * scales).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the graph of this loss runs backward once"
        return None, None, None, *[gradient.mul_(grad) for gradient in gradients]  # in place: the first is large


def _compare(
    comparison: Comparison,
    keys: Tensor,
    *,
    temperature: float,
    tile_elements: int,
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Loss, entropy and agreement, [3]; `gradients`, of prototypes and student, get those of the scaled loss."""
    student, teacher, partners = comparison.student, comparison.teacher, comparison.partners
    v, n, _ = student.shape
    z, values = student / temperature, student.new_zeros(3)
    # A crop with two partners has the mean of their probabilities as its target, and twice the weight.
    num_partners = student.new_tensor([len(p) for p in partners])
    weights = comparison.weights.to(z.dtype) * num_partners[:, None]  # [v, n]
    size = max(1, tile_elements // ((v + 2 * len(teacher.bottlenecks)) * len(keys)))

    def add_tile(samples: slice) -> None:
        """Its own function, so that a tile's scores are gone before the next one's come."""
        q = teacher.probabilities(samples)
        scores = (z[:, samples].to(keys.dtype) @ keys.mT).to(z.dtype)
        if comparison.signals:
            values[1:] += _signals(scores, q, partners) / n
        losses = _softmax_minus_(scores, _targets(q, partners))
        values[0] += (losses * weights[:, samples]).sum()
        if gradients is not None:
            delta = scores.to(keys.dtype).flatten(0, 1)
            scaled = z[:, samples] * (comparison.scale * weights[:, samples, None])
            _add_product_(gradients[0], delta.mT, scaled.to(keys.dtype).flatten(0, 1))
            gradients[1][:, samples] = (delta @ keys).view(v, -1, keys.shape[1])

    for start in range(0, n, size):
        add_tile(slice(start, start + size))
    if gradients is not None:
        gradients[1].mul_(weights[:, :, None] * (comparison.scale / temperature))
    return values


def _targets(q: Tensor, partners: Partners) -> list[Tensor]:
    """[s, K] for every crop of the student: the mean probabilities [t, s, K] of its partners; equal ones are one."""
    means = {p: q[p[0]] if len(p) == 1 else q[list(p)].mean(dim=0) for p in set(partners)}
    return [means[p] for p in partners]


def _softmax_minus_(scores: Tensor, targets: list[Tensor]) -> Tensor:
    """Scores [v, s, K] become softmax - target, the gradient of the cross-entropies [v, s], which are returned."""
    scores -= scores.amax(dim=-1, keepdim=True)
    own = torch.stack([torch.linalg.vecdot(crop, target) for crop, target in zip(scores, targets, strict=True)])
    total = scores.exp_().sum(dim=-1, keepdim=True)
    scores /= total
    for crop, target in zip(scores, targets, strict=True):
        crop -= target
    return total.squeeze(-1).log() - own


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _signals(scores: Tensor, q: Tensor, partners: Partners) -> Tensor:
    """Σ over samples of the teacher's entropy over log K and of the agreement, each a mean over crops, [2]."""
    entropy = torch.special.entr(q).sum(dim=-1).mean(dim=0) / math.log(q.shape[-1])
    student, teacher = scores.argmax(dim=-1), q.argmax(dim=-1)
    pairs = [(crop, p[0]) for crop, p in enumerate(partners) if len(p) == 1]
    same = torch.stack([student[crop] == teacher[partner] for crop, partner in pairs]).to(q.dtype).mean(dim=0)
    return torch.stack([entropy.sum(), same.sum()])

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


class CrossEntropy(NamedTuple):
    """Scalars: `loss`, differentiable; where signals were asked for (else 0), the mean `entropy` of the teacher over
    log K, 1 uniform and 0 certain, and the `agreement` on the highest prototype of crops that have one partner.
    """

    loss: Tensor
    entropy: Tensor
    agreement: Tensor


def cross_entropy(
    student: Tensor,
    prototypes: Tensor,
    *,
    teacher: Teacher,
    partners: Partners,
    weights: Tensor,
    temperature: float,
    tile_elements: int,
    signals: bool = False,
) -> CrossEntropy:
    """Σ over samples of weight · Σ over pairs of crops of -Σ teacher · log softmax(student · prototypes / temperature).

    Scores are computed in autocast's precision where that is on, all else in that of the student's bottlenecks. The
    graph can run backward once.

    Args:
        student: bottlenecks [v, n, b], fp32 or float64; n may be 0.
        prototypes: [K, b] of the same dtype.
        teacher: of the same samples.
        partners: for every crop of the student, the crops of the teacher that it is compared with.
        weights: [n].
        temperature: of the student.
        tile_elements: most scores in memory at a time, the teacher's included (but at least those of one sample).
        signals: whether entropy and agreement are wanted.
    """
    return CrossEntropy(
        *_CrossEntropy.apply(student, prototypes, weights, teacher, partners, temperature, tile_elements, signals)
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        weights: Tensor,
        teacher: Teacher,
        partners: Partners,
        temperature: float,
        tile_elements: int,
        signals: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (v, n, _), kind = student.shape, student.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student.dtype
        gradients = [torch.zeros_like(x) for x in (student, prototypes)] if any(ctx.needs_input_grad) else None
        loss, seen = student.new_zeros(()), student.new_zeros(2)
        # A crop with two partners has the mean of their probabilities as its target, and twice the weight.
        weights = weights * weights.new_tensor([len(p) for p in partners])[:, None]  # [v, n]
        with full_precision(student):
            z, keys = student / temperature, prototypes.to(precision)
            size = max(1, tile_elements // ((v + 2 * len(teacher.bottlenecks)) * len(prototypes)))
            for samples in (slice(start, start + size) for start in range(0, n, size)):
                q = teacher.probabilities(samples)
                scores = (z[:, samples].to(precision) @ keys.mT).to(z.dtype)
                if signals:
                    seen += _signals(scores, q, partners)
                losses = _softmax_minus_(scores, _targets(q, partners))
                loss += (losses * weights[:, samples]).sum()
                if gradients is not None:
                    delta = scores.to(precision)
                    gradients[0][:, samples] = delta @ keys
                    rows = (z[:, samples] * weights[:, samples, None]).to(precision)
                    _add_product_(gradients[1], delta.flatten(0, 1).mT, rows.flatten(0, 1))
        if gradients is not None:
            gradients[0] *= weights[:, :, None] / temperature
        ctx.gradients = gradients
        entropy, agreement = seen / max(1, n)
        ctx.mark_non_differentiable(entropy, agreement)
        return loss, entropy, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are as large as all prototypes
        assert gradients is not None, "the graph of this loss runs backward once"
        return gradients[0].mul_(grad), gradients[1].mul_(grad), *[None] * 6


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

"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709), over the global batch.

Every one of the 2B embeddings of a global batch is an anchor: its positive, the other view of the same image, is
scored by cosine similarity over temperature against all 2B - 1 other embeddings. A rank computes the mean over its own
anchors; the wrappers' average over ranks is then the loss of the global batch.

The similarity matrix is never in memory: its tiles are computed twice, once for the sums of the softmaxes and once for
the gradient. Since scores are symmetric, with t_i the sum of anchor i,

    temperature · ∂/∂z_i of the loss of all anchors = Σ_j exp(score_ij) (1/t_i + 1/t_j) z_j - 2 z_positive

is one matrix product, which needs of the other ranks no more than their z and their sums; and a tile between own
anchors serves both of its sides. Scores lie within ±1/temperature, so exponentials need no shift by a row's maximum.

Shapes: a anchors of this rank (both views of m images), n keys of all ranks, own ones first, d channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaler.collectives import World
from scaler.nn.precision import at_least_fp32, full_precision

_SIDES = {"cpu": 1024}  # rows and columns of a tile: what stays in a core's cache
_SIDE = 4096  # on an accelerator: 64 MiB in fp32


class NTXent(NamedTuple):
    """Scalars: `loss`, differentiable; `accuracy`, the share of anchors whose positive scores highest, ties not
    counted; `embedding_std`, √d times the mean deviation of a normalised embedding's channels: 1 spread, 0 collapsed.
    """

    loss: Tensor
    accuracy: Tensor
    embedding_std: Tensor


def nt_xent(embeddings: Tensor, *, temperature: float, world: World, side: int | None = None) -> NTXent:
    """The loss of this rank's anchors against the keys of all ranks.

    Args:
        embeddings: [2m, d], the first view of m images and then, in the same order, the second; every rank has the
            same m. Computed in fp32, or in float64 where they are, or where the temperature needs its range.
        temperature: divides the cosine similarities.
        world: the ranks that share the global batch.
        side: rows and columns of the tiles of scores; None: what suits the device.

    Raises:
        ValueError: a global batch of one image, which leaves no negatives; a temperature whose exponentials overflow.
    """
    a = embeddings.shape[0]
    assert a % 2 == 0, "embeddings are two views, one after the other"
    if a * world.size < 4:
        raise ValueError(f"a global batch of {a * world.size // 2} image has no negatives; NT-Xent needs at least 2")
    with full_precision(embeddings):
        z = F.normalize(at_least_fp32(embeddings), dim=1)
        z = z.to(_wide_enough(z.dtype, temperature=temperature, num_keys=a * world.size))
        loss, accuracy, std = _Loss.apply(z, temperature, world, side or _SIDES.get(z.device.type, _SIDE))
    return NTXent(loss.to(torch.promote_types(embeddings.dtype, torch.float32)), accuracy, std)


def _wide_enough(dtype: torch.dtype, *, temperature: float, num_keys: int) -> torch.dtype:
    """The dtype in which a sum of exp(1/temperature) is finite and exp(-1/temperature) is not rounded off."""
    for wide, largest in ((dtype, math.log(torch.finfo(dtype).max) - 2), (torch.float64, 700.0)):
        if 1 / temperature + math.log(num_keys) <= largest:
            return wide
    raise ValueError(f"temperature {temperature:g} is too low for NT-Xent of {num_keys} embeddings; take 0.002 or more")


class _Loss(torch.autograd.Function):
    """Of unit vectors z [a, d]: the loss, the accuracy and the spread of all ranks' vectors."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, world: World, side: int) -> tuple[Tensor, Tensor, Tensor]:
        a = len(z)
        keys = _own_first(world.all_gather(z), a, world)
        std = keys.std(dim=0, correction=0).mean() * keys.shape[1] ** 0.5
        own = (z * z.roll(a // 2, dims=0)).sum(dim=1) / temperature  # the positive's score
        best, others = own.new_full((a,), -torch.inf), own.new_zeros(a)  # of the keys that are neither i nor positive
        for rows, columns, scores, mirrored in _tiles(z, keys, temperature, side):
            sides = [(rows, 1), (columns, 0)] if mirrored else [(rows, 1)]
            for anchor, dim in sides:
                torch.maximum(best[anchor], scores.amax(dim=dim), out=best[anchor])
            scores.exp2_()
            for anchor, dim in sides:
                others[anchor] += scores.sum(dim=dim)
        loss = torch.logaddexp(others.log() - own, own.new_zeros(())).mean()  # precise where it is almost 0
        accuracy = (own - best * math.log(2) > 8 * torch.finfo(z.dtype).eps / temperature).to(z.dtype).mean()
        if ctx.needs_input_grad[0]:
            total = others + own.exp()
            gradient = _gradient(z, keys, total, others / total, temperature=temperature, world=world, side=side)
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(accuracy, std)
        return loss, accuracy, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _gradient(
    z: Tensor, keys: Tensor, total: Tensor, missing: Tensor, *, temperature: float, world: World, side: int
) -> Tensor:
    """Of all ranks' losses together with respect to this rank's anchors, [a, d], from the sums of their softmaxes and
    the share of them that is not the positive's, [a].
    """
    a = len(z)
    inverse = _own_first(world.all_gather(1 / total), a, world)
    # A positive's weight is p_i + p_j - 2: written so, nothing cancels where these probabilities are almost 1.
    gradient = -(missing + missing.roll(a // 2))[:, None] * z.roll(a // 2, dims=0)
    for rows, columns, scores, mirrored in _tiles(z, keys, temperature, side):
        weights = scores.exp2_().mul_(inverse[rows, None] + inverse[columns])
        gradient[rows].addmm_(weights, keys[columns])
        if mirrored:
            gradient[columns].addmm_(weights.T, z[rows])
    return gradient.div_(a * temperature)


def _own_first(gathered: Tensor, a: int, world: World) -> Tensor:
    """What was gathered rank by rank, `a` rows each, in an order that begins with this rank's."""
    return gathered.roll(-a * world.rank, dims=0) if world.rank else gathered


def _tiles(z: Tensor, keys: Tensor, temperature: float, side: int) -> Iterator[tuple[slice, slice, Tensor, bool]]:
    """Every pair's score once, in tiles: rows (anchors), columns (keys), scores [≤ side, ≤ side], mirrored.

    Scores are divided by ln 2, since torch has exp2 several times as fast as exp.

    A tile above the diagonal also stands for the one below it (mirrored); an anchor's scores with itself and with its
    positive are -inf. Scores are to be changed in place: the next tile takes their memory.
    """
    a, n = len(z), len(keys)
    memory = z.new_empty(min(side, a) * min(side, n))
    for r in range(0, a, side):
        rows = slice(r, min(r + side, a))
        for c in (*range(r, a, side), *range(a, n, side)):
            columns = slice(c, min(c + side, a if c < a else n))
            shape = (rows.stop - r, columns.stop - c)
            scores = memory[: shape[0] * shape[1]].view(shape)
            scores.addmm_(z[rows], keys[columns].T, beta=0, alpha=1 / (temperature * math.log(2)))
            if c < a:
                for partner in (0, a // 2, -(a // 2)):
                    scores.diagonal(r + partner - c).fill_(-torch.inf)
            yield rows, columns, scores, r < c < a

"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709), over the global batch.

Every one of the 2B embeddings of a global batch is an anchor: its positive, the other view of the same image, is
scored by cosine similarity over temperature against all 2B - 1 other embeddings. A rank computes the mean over its own
anchors; the wrappers' average over ranks is then the loss of the global batch.

The similarity matrix is never in memory: its scores are computed twice, once for the sums of the softmaxes and once for
the gradient. Since scores are symmetric, with t_i the sum of anchor i,

    temperature · ∂/∂z_i of the loss of all anchors = Σ_j exp(score_ij) (1/t_i + 1/t_j) z_j - 2 z_positive

is one matrix product, which needs of the other ranks no more than their z and their sums. Scores lie within
±1/temperature, so exponentials need no shift by a row's maximum. What is summed over all pairs comes from one of two:
Triton's kernels (`scaler.methods.simclr.loss_kernels`) where `runs_kernels` says so, and otherwise tiles of scores in
plain torch, where a tile between own anchors serves both of its sides. All else is the same code.

Shapes: a anchors of this rank (both views of m images), n keys of all ranks, own ones first, d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaler.collectives import World
from scaler.nn.kernels import has_triton
from scaler.nn.precision import at_least_fp32, full_precision

_SIDES = {"cpu": 1024}  # rows and columns of a tile: what stays in a core's cache
_SIDE = 4096  # on an accelerator: 64 MiB in fp32
_WIDEST, _SHARED_MEMORY = 512, 227 * 1024  # channels that the kernels have blocks for, and bytes that these take


class NTXent(NamedTuple):
    """Scalars: `loss`, differentiable; `accuracy`, the share of anchors whose positive scores highest, ties not
    counted; `embedding_std`, √d times the mean deviation of a normalised embedding's channels: 1 spread, 0 collapsed.
    """

    loss: Tensor
    accuracy: Tensor
    embedding_std: Tensor


def nt_xent(
    embeddings: Tensor, *, temperature: float, world: World, side: int | None = None, kernels: bool | None = None
) -> NTXent:
    """The loss of this rank's anchors against the keys of all ranks.

    Args:
        embeddings: [2m, d], the first view of m images and then, in the same order, the second; every rank has the
            same m. Computed in fp32, or in float64 where they are, or where the temperature needs its range. Under
            autocast to bf16 or fp16, or where they are themselves, the kernels round scores to fp16's precision.
        temperature: divides the cosine similarities.
        world: the ranks that share the global batch.
        side: rows and columns of the tiles of scores; None: what suits the device.
        kernels: whether Triton's kernels run; None: where `runs_kernels` says so.

    Raises:
        ValueError: a global batch of one image, which leaves no negatives; a temperature whose exponentials overflow.
    """
    a = embeddings.shape[0]
    assert a % 2 == 0, "embeddings are two views, one after the other"
    if a * world.size < 4:
        raise ValueError(f"a global batch of {a * world.size // 2} image has no negatives; NT-Xent needs at least 2")
    exact = not _is_half(embeddings)
    with full_precision(embeddings):
        z = F.normalize(at_least_fp32(embeddings), dim=1)
        z = z.to(_wide_enough(z.dtype, temperature=temperature, num_keys=a * world.size))
        if kernels is None:
            kernels = runs_kernels(z, temperature=temperature, num_keys=a * world.size)
        pairs: Callable[..., Pairs]
        if kernels:
            from scaler.methods.simclr.loss_kernels import KernelPairs  # needs Triton

            pairs = partial(KernelPairs, exact=exact)
        else:
            pairs = partial(TiledPairs, side=side or _SIDES.get(z.device.type, _SIDE))
        loss, accuracy, std = _Loss.apply(z, temperature, world, pairs)
    return NTXent(loss.to(torch.promote_types(embeddings.dtype, torch.float32)), accuracy, std)


def runs_kernels(z: Tensor, *, temperature: float, num_keys: int) -> bool:
    """Whether the pairs of unit vectors z [a, d] with all keys are Triton's: fp32 on a GPU with the shared memory of a
    Hopper or a later data centre's, at most 512 channels, and a temperature that leaves room for the weights' scale
    (0.016 or more with 131,072 keys).
    """
    return (
        z.is_cuda
        and z.dtype == torch.float32
        and z.shape[1] <= _WIDEST
        and 1 / temperature + math.log(num_keys) <= 76
        and has_triton()
        and (
            not torch.cuda.is_available()  # z is fake
            or torch.cuda.get_device_properties(z.device).shared_memory_per_block_optin >= _SHARED_MEMORY
        )
    )


def _is_half(x: Tensor) -> bool:
    """Whether x, or autocast where it is, has 16 bits; the meta device has no autocast."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device).itemsize == 2
    return x.dtype.itemsize == 2


def _wide_enough(dtype: torch.dtype, *, temperature: float, num_keys: int) -> torch.dtype:
    """The dtype in which a sum of exp(1/temperature) is finite and exp(-1/temperature) is not rounded off."""
    for wide, largest in ((dtype, math.log(torch.finfo(dtype).max) - 2), (torch.float64, 700.0)):
        if 1 / temperature + math.log(num_keys) <= largest:
            return wide
    raise ValueError(f"temperature {temperature:g} is too low for NT-Xent of {num_keys} embeddings; take 0.002 or more")


class Pairs(Protocol):
    """What is computed of an anchor's pairs with all keys but itself and its positive. Made of z [a, d], of keys [n, d]
    and of the temperature.
    """

    def sums(self) -> tuple[Tensor, Tensor]:
        """Of every anchor Σ exp(score) and the highest score, [a]."""

    def are_ahead(self, positives: Tensor, best: Tensor) -> Tensor:
        """Whether the positives' scores are above the others' best, [a]; what may be rounding is a tie."""

    def add_weighted(self, gradient: Tensor, inverse: Tensor, missing: Tensor) -> None:
        """Add Σ_j exp(score_ij) (1/t_i + 1/t_j) z_j to gradient [a, d]; of all keys 1/t, and the share of t that is not
        the positive's, [n].
        """


class _Loss(torch.autograd.Function):
    """Of unit vectors z [a, d]: the loss, the accuracy and the spread of all ranks' vectors."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, temperature: float, world: World, make: Callable[..., Pairs]
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = len(z)
        keys = _own_first(world.all_gather(z), a, world)
        std = keys.std(dim=0, correction=0).mean() * keys.shape[1] ** 0.5
        own = (z * z.roll(a // 2, dims=0)).sum(dim=1) / temperature  # the positive's score
        pairs = make(z, keys, temperature=temperature)
        others, best = pairs.sums()
        loss = torch.logaddexp(others.log() - own, own.new_zeros(())).mean()  # precise where it is almost 0
        accuracy = pairs.are_ahead(own, best).to(z.dtype).mean()
        if ctx.needs_input_grad[0]:
            total = others + own.exp()
            ctx.save_for_backward(_gradient(z, pairs, total, others / total, temperature=temperature, world=world))
        ctx.mark_non_differentiable(accuracy, std)
        return loss, accuracy, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _gradient(z: Tensor, pairs: Pairs, total: Tensor, missing: Tensor, *, temperature: float, world: World) -> Tensor:
    """Of all ranks' losses together with respect to this rank's anchors, [a, d], from the sums of their softmaxes and
    the share of them that is not the positive's, [a].
    """
    a = len(z)
    of_all = _own_first(world.all_gather(torch.stack([1 / total, missing], dim=1)), a, world).T.contiguous()
    # A positive's weight is p_i + p_j - 2: written so, nothing cancels where these probabilities are almost 1.
    gradient = -(missing + missing.roll(a // 2))[:, None] * z.roll(a // 2, dims=0)
    pairs.add_weighted(gradient, *of_all)
    return gradient.div_(a * temperature)


def _own_first(gathered: Tensor, a: int, world: World) -> Tensor:
    """What was gathered rank by rank, `a` rows each, in an order that begins with this rank's."""
    return gathered.roll(-a * world.rank, dims=0) if world.rank else gathered


class TiledPairs:
    """`Pairs` in plain torch, on any device and in any precision: two tiles of scores, [≤ side, ≤ side], in memory."""

    def __init__(self, z: Tensor, keys: Tensor, *, temperature: float, side: int) -> None:
        self._z, self._keys, self._temperature, self._side = z, keys, temperature, side

    def sums(self) -> tuple[Tensor, Tensor]:
        """See `Pairs.sums`."""
        a = len(self._z)
        best, others = self._z.new_full((a,), -torch.inf), self._z.new_zeros(a)
        for rows, columns, scores, mirrored in self._tiles():
            sides = [(rows, 1), (columns, 0)] if mirrored else [(rows, 1)]
            for anchor, dim in sides:
                torch.maximum(best[anchor], scores.amax(dim=dim), out=best[anchor])
            scores.exp2_()
            for anchor, dim in sides:
                others[anchor] += scores.sum(dim=dim)
        return others, best * math.log(2)

    def are_ahead(self, positives: Tensor, best: Tensor) -> Tensor:
        """See `Pairs.are_ahead`."""
        return positives - best > 8 * torch.finfo(best.dtype).eps / self._temperature

    def add_weighted(self, gradient: Tensor, inverse: Tensor, missing: Tensor) -> None:
        """See `Pairs.add_weighted`."""
        for rows, columns, scores, mirrored in self._tiles():
            weights = scores.exp2_().mul_(inverse[rows, None] + inverse[columns])
            gradient[rows].addmm_(weights, self._keys[columns])
            if mirrored:
                gradient[columns].addmm_(weights.T, self._z[rows])

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor, bool]]:
        """Every pair's score once, in tiles: rows (anchors), columns (keys), scores [≤ side, ≤ side], mirrored.

        Scores are divided by ln 2, since torch has exp2 several times as fast as exp.

        A tile above the diagonal also stands for the one below it (mirrored); an anchor's scores with itself and with
        its positive are -inf. Scores are to be changed in place: the next tile takes their memory.
        """
        z, keys, side = self._z, self._keys, self._side
        a, n = len(z), len(keys)
        memory = z.new_empty(min(side, a) * min(side, n))
        for r in range(0, a, side):
            rows = slice(r, min(r + side, a))
            for c in (*range(r, a, side), *range(a, n, side)):
                columns = slice(c, min(c + side, a if c < a else n))
                shape = (rows.stop - r, columns.stop - c)
                scores = memory[: shape[0] * shape[1]].view(shape)
                scores.addmm_(z[rows], keys[columns].T, beta=0, alpha=1 / (self._temperature * math.log(2)))
                if c < a:
                    for partner in (0, a // 2, -(a // 2)):
                        scores.diagonal(r + partner - c).fill_(-torch.inf)
                yield rows, columns, scores, r < c < a

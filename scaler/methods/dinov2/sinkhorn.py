"""Sinkhorn-Knopp over the whole global batch, in memory that does not grow with it.

Sinkhorn-Knopp (Cuturi, arXiv 1306.0895; for prototypes: SwAV, arXiv 2006.09882) alternately scales the prototypes and
the samples of exp(scores / temperature) to equal sums, ending with the samples. So its result is a softmax of every
sample with *one* number per prototype added:

    probabilities = softmax(scores / temperature + log_scaling)

and `log_scaling` [K] is all that the samples of other micro-batches and ranks contribute. Each iteration needs only
the sums of the prototypes: scores are recomputed from the heads' bottlenecks tile by tile (but those of a single tile
are kept), and the sums are all-reduced. The number of samples is a constant factor, which cancels.

Shapes: n samples, b bottleneck width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from scaler.collectives import World
from scaler.methods.dinov2.tiles import compiled, default_tile_elements, tiles
from scaler.nn.precision import full_precision, product, product_dtypes


@torch.no_grad()
def sinkhorn_log_scaling(
    bottlenecks: Sequence[Tensor],
    prototypes: Tensor,
    *,
    temperature: float,
    world: World,
    num_iterations: int = 3,
    tile_elements: int | None = None,
    fused: bool = False,
) -> Tensor:
    """The prototypes' log scaling [K] for the samples of all micro-batches and ranks together.

    Under bf16 autocast scores are, on a GPU, products of numbers rounded to fp16 (see `product_dtypes`).

    Args:
        bottlenecks: [n, b] of every local micro-batch; a rank may have no samples.
        prototypes: [K, b], equal on all ranks, of the bottlenecks' dtype.
        temperature: of the teacher.
        world: collectives.
        num_iterations: scalings of prototypes and samples, 3 in DINOv2.
        tile_elements: most scores in memory at a time (but at least those of one sample); None: as suits the device.
        fused: whether the passes over a tile's scores are compiled into a few.

    Returns:
        [K], equal on all ranks; zeros when there is no sample at all.
    """
    column_log_sums: Callable[..., Tensor] = compiled(_column_log_sums) if fused else _column_log_sums_
    column_sums: Callable[..., Tensor] = compiled(_column_sums) if fused else _column_sums_
    rows = (tile_elements or default_tile_elements(prototypes.device)) // len(prototypes)
    parts = [part[samples] for part in bottlenecks for samples in tiles(len(part), at_most=rows)]
    keys = prototypes.to(product_dtypes(prototypes)[0]).mT

    def score(part: Tensor) -> Tensor:
        return product((part / temperature).to(keys.dtype), keys)

    with full_precision(prototypes):
        # Scores that need no second tile are kept; what spends them gets a copy, for which there must be room too.
        keep = len(parts) == 1 and (fused or 2 * len(parts[0]) <= rows)
        kept = [score(part) for part in parts if keep]

        def all_scores() -> Iterable[Tensor]:
            if not keep:
                return map(score, parts)
            return kept if fused else [scores.clone() for scores in kept]

        log_scaling = prototypes.new_zeros(len(prototypes))
        for iteration in range(num_iterations):
            if iteration == 0:
                log_sums = torch.full_like(log_scaling, -torch.inf)
                for scores in all_scores():
                    log_sums = torch.logaddexp(log_sums, column_log_sums(scores))
                    del scores  # before there are the next ones
                log_sums = _over_ranks(log_sums, world)
            else:
                # Σ over samples of a prototype's probabilities. It cannot vanish: dividing by the last sums made every
                # prototype's column sum to one, and a sample's normaliser is at most K, so each new sum is at least
                # 1/K.
                sums = torch.zeros_like(log_scaling)
                for scores in all_scores():
                    sums += column_sums(scores, log_scaling)
                    del scores
                log_sums = world.sum_(sums).log()
            log_scaling -= torch.where(log_sums.isneginf(), 0.0, log_sums)
    return log_scaling


def _column_log_sums_(scores: Tensor) -> Tensor:
    """[s, K], which are spent → log Σ over samples of exp(scores), [K]; nothing overflows, whatever the scores."""
    largest = scores.amax(dim=0)
    scores -= largest
    return largest + scores.exp_().sum(dim=0).log()


def _column_sums_(scores: Tensor, log_scaling: Tensor) -> Tensor:
    """[s, K], which are spent → Σ over samples of softmax(scores + log_scaling), [K]."""
    scores += log_scaling
    scores -= scores.amax(dim=1, keepdim=True)
    return torch.mv(scores.exp_().mT, 1 / scores.sum(dim=1))


def _column_log_sums(scores: Tensor) -> Tensor:
    """The same, to be compiled: what is in between, the copy too, then takes no memory."""
    return _column_log_sums_(scores.clone())


def _column_sums(scores: Tensor, log_scaling: Tensor) -> Tensor:
    """The same, to be compiled."""
    return _column_sums_(scores.clone(), log_scaling)


def _over_ranks(log_sums: Tensor, world: World) -> Tensor:
    """log Σ over ranks of exp(log_sums); -inf where a rank has no samples."""
    largest = world.max_(log_sums.clone())
    shift = torch.where(largest.isneginf(), 0.0, largest)
    return shift + world.sum_((log_sums - shift).exp()).log()

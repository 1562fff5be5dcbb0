"""Sinkhorn-Knopp over the whole global batch, in memory that does not grow with it.

Sinkhorn-Knopp (Cuturi, arXiv 1306.0895; for prototypes: SwAV, arXiv 2006.09882) alternately scales the prototypes and
the samples of exp(scores / temperature) to equal sums, ending with the samples. So its result is a softmax of every
sample with *one* number per prototype added:

    probabilities = softmax(scores / temperature + log_scaling)

and `log_scaling` [K] is all that the samples of other micro-batches and ranks contribute. Each iteration needs only
the sums of the prototypes: scores are recomputed from the heads' bottlenecks tile by tile, and the sums are
all-reduced. The number of samples is a constant factor, which cancels.

Shapes: n samples, b bottleneck width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scaler.collectives import World
from scaler.nn.precision import full_precision


@torch.no_grad()
def sinkhorn_log_scaling(
    bottlenecks: Sequence[Tensor],
    prototypes: Tensor,
    *,
    temperature: float,
    world: World,
    num_iterations: int = 3,
    tile_elements: int = 1 << 24,
) -> Tensor:
    """The prototypes' log scaling [K] for the samples of all micro-batches and ranks together.

    Args:
        bottlenecks: [n, b] of every local micro-batch; a rank may have no samples.
        prototypes: [K, b], equal on all ranks, of the bottlenecks' dtype.
        temperature: of the teacher.
        world: collectives.
        num_iterations: scalings of prototypes and samples, 3 in DINOv2.
        tile_elements: most scores in memory at a time.

    Returns:
        [K], equal on all ranks; zeros when there is no sample at all.
    """
    num_prototypes = prototypes.shape[0]
    log_scaling = prototypes.new_zeros(num_prototypes)
    rows = min(max(1, tile_elements // num_prototypes), max((len(part) for part in bottlenecks), default=0))
    memory = prototypes.new_empty(rows, num_prototypes)
    for iteration in range(num_iterations):
        tiles = _scores(bottlenecks, prototypes / temperature, memory)
        if iteration == 0:
            log_sums = _log_sums(tiles, prototypes.new_full((num_prototypes,), -torch.inf), world=world)
        else:
            # Σ over samples of a prototype's probabilities. It cannot vanish: dividing by the last sums made every
            # prototype's column sum to one, and a sample's normaliser is at most K, so each new sum is at least 1/K.
            sums = prototypes.new_zeros(num_prototypes)
            for scores in tiles:
                scores += log_scaling
                scores -= scores.amax(dim=1, keepdim=True)
                sums.addmv_(scores.exp_().mT, 1 / scores.sum(dim=1))
            log_sums = world.sum_(sums).log()
        log_scaling -= torch.where(log_sums.isneginf(), 0.0, log_sums)
    return log_scaling


def _scores(bottlenecks: Sequence[Tensor], prototypes: Tensor, memory: Tensor) -> Iterator[Tensor]:
    """Scores [≤ rows, K] of all samples, tile by tile in the same memory [rows, K], to be changed in place."""
    with full_precision(prototypes):
        for part in bottlenecks:
            for tile in part.split(len(memory)) if len(part) else ():
                yield torch.mm(tile, prototypes.mT, out=memory[: len(tile)])


def _log_sums(tiles: Iterator[Tensor], log_sums: Tensor, *, world: World) -> Tensor:
    """log Σ over samples of exp(scores) for every prototype, [K]; nothing overflows, whatever the scores."""
    for scores in tiles:
        largest = scores.amax(dim=0)
        scores -= largest
        log_sums = torch.logaddexp(log_sums, largest + scores.exp_().sum(dim=0).log())
    largest = world.max_(log_sums.clone())
    shift = torch.where(largest.isneginf(), 0.0, largest)
    return shift + world.sum_((log_sums - shift).exp()).log()

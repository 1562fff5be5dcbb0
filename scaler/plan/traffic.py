"""What a rank sends in a step, and the seconds that it takes at given bandwidths.

All collectives are counted as rings, which are optimal in bandwidth (Patarasuk & Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009): an all-gather or reduce-scatter of S bytes over n ranks makes each send
S (n - 1)/n, an all-reduce twice that. Over several machines with g GPUs and a network link for each, NCCL lays g rings,
so that of V bytes that a rank sends, V/g leave a machine through each link. What the losses themselves exchange
(embeddings, sums over prototypes) is some MB and left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from scaler.plan.memory import LIVE, Setup
from scaler.plan.model import ROOT, Model
from scaler.plan.trace import Trace
from scaler.strategies.base import DTYPES

_FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step: in rings over all ranks, inside a group of `shard_ranks`, and over groups."""

    everywhere: int = 0
    inside: int = 0
    across: int = 0

    @property
    def sent(self) -> int:
        """All of it."""
        return self.everywhere + self.inside + self.across

    def seconds(self, *, nodes: int, gpus: int, intra: float, inter: float) -> float:
        """How long it takes at these bandwidths, bytes a second of one GPU in one direction: inside a machine, and
        between machines. Groups smaller than all ranks are taken to be machines."""
        if nodes == 1:
            return self.sent / intra
        everywhere = max(self.everywhere / intra, self.everywhere / (gpus * inter))
        return everywhere + self.inside / intra + self.across / inter


def traffic_of(name: str, model: Model, trace: Trace, setup: Setup) -> Traffic:
    """What the strategy `name` makes a rank send."""
    n, count = setup.ranks, setup.num_micro_batches
    trained = model.count(model.trained)
    # Gradients of the micro-batches before the last, where these are exchanged too.
    all_gradients = trained + (count - 1) * model.count_of(trace.early)
    if name == "ddp":
        return Traffic(everywhere=_ring(2 * _FP32 * trained, n))
    if name in ("zero1", "zero2"):
        reduced = trained if name == "zero1" else all_gradients
        return Traffic(everywhere=_ring(2 * _gradient_size(setup) * reduced + _FP32 * trained, n))
    keeps = name == "zero3" and not trace.observe and model.count(model.weights.values()) <= LIVE
    passes, again = _passes(trace, model, count)
    if name == "zero3":
        passes[ROOT] = count * (1 if keeps else 2 + bool(trace.observe))
        gathered = sum((passes[unit] + (not keeps) * again[unit]) * size for unit, size in model.units.items())
        if not keeps:  # a teacher's head observes each micro-batch; its prototypes are gathered once more in all
            frozen = sum(w.numel for w in model.frozen if w.unit == ROOT)
            gathered -= (passes[ROOT] - (count + 1)) * frozen
        return Traffic(everywhere=_ring(_FP32 * gathered + _gradient_size(setup) * all_gradients, n))
    passes[ROOT], after = count, setup.settings.reshard_after_forward
    if after:
        again[max(again)] = 0  # the last trained block is not freed between its forward and its backward
    gathered, twice = (sum(times[unit] * size for unit, size in model.units.items()) for times in (passes, again))
    near = not isinstance(after, bool)  # gathered again from so many ranks
    gathered += twice if after and not near else 0
    if not after:  # gathered once, a trained block until its backward, and the others until the weights change
        gathered = sum((count if again[unit] or unit == ROOT else 1) * size for unit, size in model.units.items())
    size = DTYPES[setup.settings.precision].itemsize
    reduced = _FP32 if size == _FP32 else DTYPES[setup.settings.reduce_precision].itemsize
    width = setup.shard_ranks
    inside = _ring(size * gathered + reduced * trained, width)
    nearby = _ring(size * twice, int(after)) if near else 0
    if width == n:
        return Traffic(everywhere=inside, inside=nearby)
    return Traffic(inside=inside + nearby, across=_ring(2 * reduced * -(-trained // width), n // width))


def _passes(trace: Trace, model: Model, count: int) -> tuple[Counter[int], Counter[int]]:
    """How often each block's weights are gathered in a step: for every forward, and again for its backward."""
    learns = {w.unit for w in model.trained}
    forwards = {unit: count * (trace.observed[unit] + trace.learned[unit]) for unit in model.units}
    return Counter(forwards), Counter({unit: count * trace.learned[unit] for unit in learns})


def _gradient_size(setup: Setup) -> int:
    """Bytes of a gradient on its way under DeepSpeed: under autocast in the precision of the product."""
    return DTYPES[setup.settings.precision].itemsize if setup.settings.precision == "bf16" else _FP32


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank sends of `size` in a ring, once round."""
    return size * (ranks - 1) // ranks

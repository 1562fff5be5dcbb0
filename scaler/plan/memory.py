"""Bytes on the fullest rank, by part, at the fullest moment of a step: a strategy's arithmetic around a trace.

    memory = memory_of("fsdp2", model, trace, setup)
    memory.peak, memory.when, memory.parts                # parts sum to peak

The model's own forward and backward are traced (`scaler.plan.trace`); what is added here is what a strategy keeps and
gathers. Sources: torch's reducer (gradients are its buckets), FSDP2's `_fsdp_param_group.py` (a unit is gathered flat,
then copied out; the next one is prefetched; gradients are copied flat for their reduce-scatter), DeepSpeed's
`stage_1_and_2.py` and `stage3.py` (buckets, partitions, prefetching); ZeRO itself is arXiv 1910.02054.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scaler.plan.model import ROOT, Model, Weight
from scaler.plan.trace import Segment, Trace
from scaler.strategies.base import DTYPES
from scaler.strategies.deepspeed_config import merged_config

_FP32 = 4  # bytes: weights, gradients and optimiser states are kept in fp32 under every strategy
LIVE = 1_000_000_000  # elements that ZeRO-3 leaves gathered (DeepSpeed's stage3_max_live_parameters)
_AHEAD = 50_000_000  # elements that it gathers ahead of need (its stage3_prefetch_bucket_size)

Sides = tuple[dict[str, int], Iterator["_Moment"]]  # what is always there, and the candidates for the fullest moment

PARTS = ("parameters", "gradients", "optimizer", "teacher", "inputs", "activations", "gathered", "buffers")


@dataclass(frozen=True)
class Setup:
    """What decides the memory beside model and trace.

    Attributes:
        settings: the recipe's strategy section, without "auto".
        ranks: of the whole run.
        shard_ranks: that hold one copy of the model between them.
        num_micro_batches: of each rank.
        device: "cuda" or "cpu", whose optimisers differ: torch's AdamW is one kernel on the first.
    """

    settings: Any
    ranks: int
    shard_ranks: int
    num_micro_batches: int
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: the most at any moment, which moment that is, and the parts it is made of, by `PARTS`.

    `inputs` are the loader's views and augmented micro-batches (one; on a GPU two), `activations` all that forward and
    backward make (losses, targets and observations included), `gathered` whole weights that belong to other ranks,
    `buffers` what gradients travel in and what the optimiser needs while it steps.
    """

    peak: int
    when: str
    parts: dict[str, int]


@dataclass(frozen=True)
class _Moment:
    """A candidate for the fullest moment."""

    name: str
    gradients: int = 0
    activations: int = 0
    gathered: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.gathered + self.buffers


def memory_of(name: str, model: Model, trace: Trace, setup: Setup) -> Memory:
    """What the strategy `name` needs on the fullest rank."""
    held, moments = _STRATEGIES[name](model, trace, setup)
    fullest = max(moments, key=lambda moment: moment.total)
    kept = 0 if fullest.name == "update" else trace.kept
    ahead = int(setup.device == "cuda")  # a GPU gets batches ahead of need, and makes the next one's floats meanwhile
    waiting = setup.num_micro_batches + 2 * ahead
    parts = {
        **held,
        "inputs": (1 + ahead) * trace.inputs + waiting * trace.views,
        "gradients": fullest.gradients,
        "activations": fullest.activations + kept,
        "gathered": fullest.gathered,
        "buffers": fullest.buffers,
    }
    return Memory(peak=sum(parts.values()), when=fullest.name, parts={part: parts[part] for part in PARTS})


def _ddp(model: Model, trace: Trace, setup: Setup) -> Sides:
    """Everything whole. With peers the gradients are the reducer's buckets, which are always there, and those of the
    micro-batches before the last lie beside them until theirs is filled."""
    trained, early = _FP32 * model.count(model.trained), _FP32 * model.count_of(trace.early)
    buckets = trained if setup.ranks > 1 else 0
    held = _held(model, lambda w: w.numel, lambda w: w.numel)

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", buckets, trace.observe - trace.kept)
        yield _Moment("forward", buckets + early, trace.forward)
        for segment, done in _backward(trace):
            beside = sum(w.numel for name, w in model.weights.items() if name in trace.early and name not in done)
            made = 0 if buckets else sum(model.weights[name].numel for name in done)
            yield _Moment("backward", buckets + _FP32 * (beside + made), segment.peak)
        yield _Moment("update", trained, buffers=_update(model, setup, lambda w: w.numel))

    return held, moments()


def _fsdp2(model: Model, trace: Trace, setup: Setup) -> Sides:
    """Shards of everything; units gathered in the run's precision around their use."""
    settings, ranks, size = setup.settings, setup.shard_ranks, DTYPES[setup.settings.precision].itemsize
    reduced = DTYPES[settings.reduce_precision].itemsize if size < _FP32 else _FP32
    held = _held(model, lambda w: w.rows(ranks), lambda w: w.rows(ranks))
    trained = _FP32 * sum(w.rows(ranks) for w in model.trained)
    if settings.cpu_offload:
        held, trained = {**dict.fromkeys(held, 0), "teacher": model.buffer_bytes}, 0
    root = size * model.units[ROOT]
    blocks = [size * count for unit, count in model.units.items() if unit != ROOT]
    # One unit in use, and either the next one with the flat buffer it comes in, or so many buffers ahead.
    block, after = max(blocks, default=0), settings.reshard_after_forward
    learning = {w.unit for w in model.trained} - {ROOT}
    around = min(1 + max(2, settings.prefetch), len(learning)) * block if after else sum(blocks) + 2 * block
    if not isinstance(after, bool):  # after their forward, the ranks of a machine have all of a block between them
        around += size * sum(model.units[unit] for unit in learning) // after
    sizes: Counter[int] = Counter()
    for weight in model.trained:
        sizes[weight.unit] += weight.numel

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", 0, 0, 2 * root)
        yield _Moment("observe", 0, trace.observe - trace.kept, root + around)
        # Between the micro-batches nothing is reduced: whole gradients wait, in the precision they are reduced in.
        waiting = reduced * model.count_of(trace.early)
        yield _Moment("forward", waiting, trace.forward, root + around - block)
        here: Counter[int] = Counter()
        shards = travelling = 0
        in_blocks = False  # until then, of the blocks the last alone is gathered
        for segment in trace.backward:
            weight = model.weights[segment.parameter]
            in_blocks |= weight.unit != ROOT
            gathered = root + (around if in_blocks or not settings.reshard_after_forward else block)
            yield _Moment("backward", waiting + shards, segment.peak, gathered, travelling)
            here[weight.unit] += weight.numel
            waiting += 0 if segment.parameter in trace.early else size * weight.numel
            if here[weight.unit] < sizes[weight.unit]:
                continue
            travelling, own = reduced * sizes[weight.unit], -(-sizes[weight.unit] // ranks)
            gathered = 0 if weight.unit == ROOT else root + around
            yield _Moment("backward", waiting + shards, 0, gathered, travelling + reduced * own)
            shards += 0 if settings.cpu_offload else _FP32 * own
            waiting -= sum(
                (reduced if name in trace.early else size) * w.numel
                for name, w in model.weights.items()
                if w.group is not None and w.unit == weight.unit
            )
        yield _Moment("update", trained, buffers=_update(model, setup, lambda w: w.rows(ranks)))

    return held, moments()


def _zero12(model: Model, trace: Trace, setup: Setup) -> Sides:
    """Whole parameters in flat groups, fp32 masters and optimiser state of a part; gradients travel in buckets, made
    when the first gradient is there.

    Stage 1 keeps whole gradients until the last backward is over, and its buckets from the first one on; stage 2
    reduces every micro-batch's and keeps those of its part.
    """
    stage, ranks, accumulates = int(setup.settings.name[-1]), setup.ranks, setup.num_micro_batches > 1
    held = _held(model, lambda w: w.numel, lambda w: w.part(ranks))
    held["parameters"] += _FP32 * sum(-(-model.count(group) // ranks) for group in model.groups)
    bucket, part = _bucket(model, setup), _FP32 * _touched(model, ranks)
    early = _FP32 * model.count_of(trace.early) if stage == 1 else part * accumulates
    flat = _FP32 * max(-(-model.count(group) // ranks) for group in model.groups)

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", 0, trace.observe - trace.kept)
        made = filled = 0
        buffers = bucket if stage == 1 and accumulates else 0
        yield _Moment("forward", early, trace.forward, 0, buffers)
        for segment in trace.backward:
            kept = made if stage == 1 else part if filled > bucket and not accumulates else 0
            yield _Moment("backward", early + kept, segment.peak, 0, buffers)
            buffers, size = bucket, _FP32 * model.weights[segment.parameter].numel
            filled += size
            made += 0 if segment.parameter in trace.early else size
        yield _Moment("reduction", part * (stage + accumulates * (stage - 1)), 0, 0, bucket)
        yield _Moment("update", part, buffers=flat + _update(model, setup, lambda w: w.part(ranks)))

    return held, moments()


def _touched(model: Model, ranks: int) -> int:
    """Elements of all parameters that have some of theirs in the part of the rank on which these are most: DeepSpeed
    keeps their gradients whole."""
    totals = [0] * ranks
    for group in model.groups:
        width, start = -(-model.count(group) // ranks), 0
        for weight in group:
            for rank in range(start // width, (start + weight.numel - 1) // width + 1):
                totals[rank] += weight.numel
            start += weight.numel
    return max(totals)


def _zero3(model: Model, trace: Trace, setup: Setup) -> Sides:
    """Shards of everything. Where a step is one forward and backward, DeepSpeed learns its order, gathers ahead of use
    and keeps what it will need again; where it has several passes, a module is gathered when its turn has come.
    """
    ranks = setup.ranks
    part = _FP32 * sum(w.part(ranks) for w in model.trained)
    held = _held(model, lambda w: w.part(ranks), lambda w: w.part(ranks))
    bucket, total = _bucket(model, setup), model.count(model.weights.values())
    live, ahead = _FP32 * min(total, LIVE), _FP32 * min(total, _AHEAD)
    trained = model.count(model.trained)
    if not trace.observe:
        before_forward = ahead
    elif model.count_of(trace.early) == trained:  # one micro-batch after the other in the same order: learned as well
        live = _FP32 * min(trained, LIVE)
        before_forward = min(live, ahead) // 2
    else:
        live, before_forward = _FP32 * max(w.numel for w in model.weights.values()), 0
    flat = _FP32 * max(sum(w.part(ranks) for w in group) for group in model.groups)

    def moments() -> Iterator[_Moment]:
        if trace.observe:
            # A short pass between the others: what is ahead of it is gathered, and what is ahead of that is on its way.
            yield _Moment("observe", part, trace.observe - trace.kept, _FP32 * min(total, 2 * _AHEAD), bucket)
        yield _Moment("forward", part, trace.forward, live + before_forward, bucket)
        for segment in trace.backward:
            yield _Moment("backward", part, segment.peak, live, bucket)
        yield _Moment("update", part, buffers=bucket + flat + _update(model, setup, lambda w: w.part(ranks)))

    return held, moments()


_STRATEGIES = {"ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3}


def _held(model: Model, weights: Callable[[Weight], int], states: Callable[[Weight], int]) -> dict[str, int]:
    """What is always there, from the elements of a weight, and of its optimiser state, on a rank."""
    return {
        "parameters": _FP32 * sum(map(weights, model.trained)),
        "optimizer": _FP32 * model.states * sum(map(states, model.trained)),
        "teacher": _FP32 * sum(map(weights, model.frozen)) + model.buffer_bytes,
    }


def _backward(trace: Trace) -> Iterator[tuple[Segment, set[str]]]:
    """Each stretch of the backward, and the parameters whose gradients were done before it (the set grows)."""
    done: set[str] = set()
    for segment in trace.backward:
        yield segment, done
        done.add(segment.parameter)


def _update(model: Model, setup: Setup, local: Callable[[Weight], int]) -> int:
    """What the optimiser makes while it steps over one group after the other."""
    groups = [_FP32 * sum(map(local, group)) for group in model.groups]
    if model.optimizer == "adamw":
        return 0 if setup.device == "cuda" else max(groups)  # square roots of the second moments
    if model.optimizer == "lars":
        return sum(groups) * model.weight_decay + max(groups)  # decayed gradients, and their scaled copies
    return max(groups) * model.weight_decay


def _bucket(model: Model, setup: Setup) -> int:
    """Bytes of the buffers that DeepSpeed collects gradients in."""
    trained = sum(w.numel for w in model.trained)
    stage = int(setup.settings.name[-1])
    zero = merged_config(setup.settings, stage=stage, trained_parameters=trained)["zero_optimization"]
    elements = int(zero["reduce_bucket_size"])
    # Under autocast there are two kinds of them: one for what is computed in half precision.
    sizes = _FP32 + (DTYPES["bf16"].itemsize if setup.settings.precision == "bf16" else 0)
    return elements * sizes * (2 if zero.get("overlap_comm") and stage < 3 else 1)

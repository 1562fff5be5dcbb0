"""Bytes on the fullest rank, by part, at the fullest moment of a step: a strategy's arithmetic around a trace.

    memory = memory_of("fsdp2", model, trace, setup)
    memory.peak, memory.when, memory.parts                # parts sum to peak

The model's own forward and backward are traced (`scaler.plan.trace`); what is added here is what a strategy keeps and
gathers. Sources: torch's reducer (gradients are its buckets), FSDP2's `_fsdp_param_group.py` (a unit is gathered flat,
then copied out; the next one is prefetched; gradients are copied flat for their reduce-scatter), DeepSpeed's
`stage_1_and_2.py` and `stage3.py` (buckets, partitions, prefetching); ZeRO itself is arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scaler.plan.model import ROOT, Model, Weight
from scaler.plan.trace import Segment, Trace
from scaler.strategies.base import DTYPES
from scaler.strategies.deepspeed_config import merged_config

_FP32 = 4
_LIVE = 1_000_000_000  # elements that ZeRO-3 leaves gathered (DeepSpeed's stage3_max_live_parameters)
_AHEAD = 50_000_000  # elements that it gathers ahead of need (its stage3_prefetch_bucket_size)

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

    `inputs` are the loader's views and one augmented micro-batch, `activations` all that forward and backward make
    (losses, targets and observations included), `gathered` whole weights that belong to other ranks, `buffers` what
    gradients travel in and what the optimiser needs while it steps.
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
    parts = {
        **held,
        "inputs": trace.inputs + trace.views,
        "gradients": fullest.gradients,
        "activations": fullest.activations + kept,
        "gathered": fullest.gathered,
        "buffers": fullest.buffers,
    }
    return Memory(peak=sum(parts.values()), when=fullest.name, parts={part: parts[part] for part in PARTS})


def _ddp(model: Model, trace: Trace, setup: Setup) -> tuple[dict[str, int], Iterator[_Moment]]:
    """Everything whole; with peers the gradients are DDP's buckets and always there."""
    trained = _FP32 * sum(w.numel for w in model.trained)
    held = _held(model, lambda w: w.numel, lambda w: w.numel)
    accumulated = trained if setup.ranks > 1 or setup.num_micro_batches > 1 else 0

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", trained if setup.ranks > 1 else 0, trace.observe - trace.kept)
        yield _Moment("forward", accumulated, trace.forward)
        for segment, done in _backward(model, trace):
            yield _Moment("backward", accumulated or _FP32 * done, segment.peak)
        yield _Moment("update", trained, buffers=_update(model, setup, lambda w: w.numel))

    return held, moments()


def _fsdp2(model: Model, trace: Trace, setup: Setup) -> tuple[dict[str, int], Iterator[_Moment]]:
    """Shards of everything; units gathered in the run's precision around their use."""
    ranks, size = setup.shard_ranks, DTYPES[setup.settings.precision].itemsize
    mixed = size < _FP32
    reduced = DTYPES[setup.settings.reduce_precision].itemsize if mixed else _FP32
    held = _held(model, lambda w: w.rows(ranks), lambda w: w.rows(ranks))
    trained = _FP32 * sum(w.rows(ranks) for w in model.trained)
    if setup.settings.cpu_offload:
        held, trained = dict.fromkeys(held, 0) | {"teacher": model.buffer_bytes}, 0
    root = size * model.units[ROOT]
    block = size * max((n for unit, n in model.units.items() if unit != ROOT), default=0)
    blocks = size * (sum(model.units.values()) - model.units[ROOT])
    around = 3 * block if setup.settings.reshard_after_forward else blocks + 2 * block
    # Without a reduction in between, whole gradients pile up, in the precision that they are reduced in.
    whole = max(reduced, size) * sum(w.numel for w in model.trained) if setup.num_micro_batches > 1 else 0
    unit_gradients = {
        unit: sum(w.numel for w in model.trained if w.unit == unit) for unit in {w.unit for w in model.trained}
    }

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", 0, 0, 2 * root)
        yield _Moment("observe", 0, trace.observe - trace.kept, root + around)
        yield _Moment("forward", whole, trace.forward, root + around - block)
        here: dict[int, int] = dict.fromkeys(unit_gradients, 0)
        shards, last = 0, 0  # bytes of reduced gradients; elements of the reduction before
        for segment in trace.backward:
            weight = model.weights[segment.parameter]
            waiting = size * sum(here.values()) if not whole else whole
            yield _Moment("backward", waiting + shards, segment.peak, root + around, reduced * last)
            here[weight.unit] += weight.numel
            done = here[weight.unit]
            if weight.unit != ROOT and done == unit_gradients[weight.unit]:
                yield _Moment(
                    "backward",
                    (whole or size * sum(here.values())) + shards,
                    segment.peak if False else 0,
                    root + around,
                    reduced * (done + last) + reduced * -(-done // ranks),
                )
                here[weight.unit] = 0
                shards += _FP32 * -(-done // ranks)
                last = done
                whole_left = max(reduced, size) * done if whole else 0
                del whole_left
        rest = here.get(ROOT, 0)
        yield _Moment("reduction", size * rest + shards, 0, 0, reduced * (rest + last) + reduced * -(-rest // ranks))
        yield _Moment("update", trained, buffers=_update(model, setup, lambda w: w.rows(ranks)))

    return held, moments()


def _zero12(model: Model, trace: Trace, setup: Setup) -> tuple[dict[str, int], Iterator[_Moment]]:
    """Whole parameters in flat groups, fp32 masters and optimiser state of a part; gradients travel in buckets."""
    stage, ranks = int(setup.settings.name[-1]), setup.ranks
    part = _FP32 * sum(-(-sum(w.numel for w in group) // ranks) for group in model.groups)
    trained = _FP32 * sum(w.numel for w in model.trained)
    held = _held(model, lambda w: w.numel, lambda w: w.part(ranks))
    held["parameters"] += part
    bucket = _bucket(model, setup)
    whole = trained if stage == 1 and setup.num_micro_batches > 1 else 0
    parts = part if stage == 2 and setup.num_micro_batches > 1 else 0
    flat = _FP32 * max(-(-sum(w.numel for w in group) // ranks) for group in model.groups)

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", 0, trace.observe - trace.kept)
        yield _Moment("forward", whole + parts, trace.forward)
        for segment, done in _backward(model, trace):
            kept = (whole or _FP32 * done) if stage == 1 else parts + part * min(1.0, done * _FP32 // bucket)
            yield _Moment("backward", int(kept), segment.peak, 0, bucket)
        yield _Moment("reduction", part, 0, 0, bucket + (part if stage == 2 else 0))
        yield _Moment("update", part, buffers=flat + _update(model, setup, lambda w: w.part(ranks)))

    return held, moments()


def _zero3(model: Model, trace: Trace, setup: Setup) -> tuple[dict[str, int], Iterator[_Moment]]:
    """Shards of everything; DeepSpeed gathers ahead of use and keeps what it will need again soon."""
    ranks = setup.ranks
    part = _FP32 * sum(w.part(ranks) for w in model.trained)
    held = _held(model, lambda w: w.part(ranks), lambda w: w.part(ranks))
    bucket = _bucket(model, setup)
    total = sum(w.numel for w in model.weights.values())
    live, ahead = _FP32 * min(total, _LIVE), _FP32 * min(total, _AHEAD)
    flat = _FP32 * max(sum(w.part(ranks) for w in group) for group in model.groups)

    def moments() -> Iterator[_Moment]:
        yield _Moment("observe", part, trace.observe - trace.kept, live, bucket + ahead)
        yield _Moment("forward", part, trace.forward, live, bucket + ahead)
        for segment, _ in _backward(model, trace):
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


def _backward(model: Model, trace: Trace) -> Iterator[tuple[Segment, int]]:
    """Each stretch of the backward, and the elements of gradients that were done before it."""
    done = 0
    for segment in trace.backward:
        yield segment, done
        done += model.weights[segment.parameter].numel


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

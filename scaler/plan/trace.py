"""What one rank's step of a recipe holds and computes, found by running it on tensors without memory.

    trace = trace_step(recipe, settings, micro_batch_size=64, num_micro_batches=4, ranks=32, gathered=False)
    trace.forward, trace.backward, trace.flops

The method's own code runs, forward and backward, on fake tensors (torch's FakeTensorMode), which have every shape,
dtype and lifetime of real ones: neither a GPU nor the model's memory is needed, and nothing is estimated that the code
itself can say. The kernels are a CPU's (with the same fused attention, which keeps its inputs, its output and one
number a row).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.methods.base import Method
from scaler.plan.live import LiveBytes
from scaler.recipe import Recipe, StrategySettings
from scaler.strategies.base import DTYPES
from scaler.strategies.blocks import arrange_blocks_
from scaler.strategies.ddp import DDP
from scaler.timetable import Timetable
from scaler.train import build_method

_CPU = torch.device("cpu")
NUM_SAMPLES = 1_281_167  # images of an epoch where nobody says how many there are: ImageNet-1k's


@dataclass(frozen=True)
class Segment:
    """A stretch of the backward pass until the gradient of `parameter` is there, and the most bytes held in it, without
    parameters and gradients that were there before."""

    peak: int
    parameter: str


@dataclass(frozen=True)
class Trace:
    """Bytes and operations of one rank's step, without what a strategy adds.

    Attributes:
        micro_batch_size: images of a micro-batch.
        views: bytes of a micro-batch as the loader hands it over.
        inputs: bytes of an augmented one.
        observe: most bytes beside these while all micro-batches are observed and combined; 0: nothing is observed.
        kept: what observations and targets of all micro-batches take while they are learned from.
        forward: most bytes beside `inputs` and `kept` in a forward with gradient.
        activations: of these what it leaves for its backward.
        backward: the stretches of that, in order of time.
        early: parameters that have a gradient already, from the micro-batches before the last.
        observed: times that each of `Method.blocks` runs while a micro-batch is observed.
        learned: times that it does while one is learned from.
        flops: floating-point operations of the whole step, those of activation checkpointing included.
    """

    micro_batch_size: int
    views: int
    inputs: int
    observe: int
    kept: int
    forward: int
    activations: int
    backward: tuple[Segment, ...]
    early: frozenset[str]
    observed: Counter[int]
    learned: Counter[int]
    flops: int

    def towards(self, other: Trace, micro_batch_size: int) -> Trace:
        """The trace of another micro-batch size, on the line through this one and `other`: the same images on a rank,
        in micro-batches of two sizes."""
        if self.micro_batch_size == other.micro_batch_size:
            return self
        share = (micro_batch_size - self.micro_batch_size) / (other.micro_batch_size - self.micro_batch_size)

        def between(a: int, b: int) -> int:
            return round(a + (b - a) * share)

        numbers: dict[str, Any] = {
            f.name: between(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name in _LINEAR
        }
        segments = tuple(
            Segment(between(a.peak, b.peak), a.parameter) for a, b in zip(self.backward, other.backward, strict=True)
        )
        return replace(self, micro_batch_size=micro_batch_size, backward=segments, **numbers)


_LINEAR = ("views", "inputs", "observe", "kept", "forward", "activations", "flops")


class Imagined(World):
    """Ranks that are not there: what they would hand in looks like this one's."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `World.all_gather`."""
        return torch.cat([x] * self.size) if self.size > 1 else x

    def sum(self, x: Tensor) -> Tensor:
        """See `World.sum`."""
        return x.clone()

    def sum_(self, x: Tensor) -> Tensor:
        """See `World.sum_`."""
        return x

    def max_(self, x: Tensor) -> Tensor:
        """See `World.max_`."""
        return x


class Flops(TorchDispatchMode):
    """Counts the operations of products, convolutions and attention by torch's own formulas.

    (Its FlopCounterMode also follows modules, by hooks that keep alive what activation checkpointing recomputes.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = _AS.get(func._overloadpacket, func._overloadpacket)
        if operation in flop_registry:
            self.count += flop_registry[operation](*args, **(kwargs or {}), out_val=out)
        return out


# What torch has formulas for under another name only; those of a CPU's attention are younger than torch 2.11.
_AS = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class _Bare(DDP):
    """One process without optimiser, in the place of any strategy."""

    reads = frozenset(StrategySettings.model_fields)

    def prepare(self, method: Method, make_optimizer: Any = None) -> None:
        """See `Strategy.prepare`."""
        self.method = self.module = method
        arrange_blocks_(method.blocks(), checkpointing=self.settings.activation_checkpointing)

    def _measure_activations(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def meta_method(recipe: Recipe, *, world: World) -> Method:
    """The recipe's method with parameters that have no values and take no memory."""
    with torch.device("meta"):
        return build_method(recipe, world=world)


def trace_step(
    recipe: Recipe, settings: Any, *, micro_batch_size: int, num_micro_batches: int, ranks: int, gathered: bool
) -> Trace:
    """Run one step of the recipe's method, at its last image size, on fake tensors.

    Args:
        recipe: what is trained.
        settings: its strategy section without "auto", of which precision and activation checkpointing count.
        micro_batch_size: images.
        num_micro_batches: of the rank.
        ranks: that share the global batch.
        gathered: whether weights come in the run's precision (FSDP2), instead of being cast where they are used.
    """
    method = meta_method(recipe, world=Imagined(ranks))
    timetable = Timetable(recipe, num_samples=NUM_SAMPLES)
    hyper = timetable.hyper(method, timetable.total - 1)
    method.image_dtype = DTYPES[settings.precision]
    raw = noise(method, micro_batch_size, world=World(), device=torch.device("meta"))
    augmented = method.augment(raw, seed=recipe.run.seed, step=0)
    segments: list[Segment] = []
    with FakeTensorMode():
        make_fake_(method, dtype=DTYPES[settings.precision] if gathered else None)
        strategy = _Bare(settings, world=World(), device=_CPU, clip_norm=None, deterministic=False)
        calls: Counter[int] = Counter()
        for number, block in enumerate(method.blocks()):
            block.register_forward_pre_hook(_counting(calls, number))
        strategy.prepare(method)
        batch = tree_map(fake, augmented)
        memory, flops = LiveBytes(), Flops()

        def note(name: str) -> Callable[[Tensor], None]:
            def ready(parameter: Tensor) -> None:
                segments.append(Segment(memory.peak, name))
                parameter.grad = None
                memory.peak = memory.live

            return ready

        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(note(name))
        with memory, flops:
            targets: list[Any] = [None] * num_micro_batches
            observed, one, observing, combining, peak = Counter[int](), 0, 0, 0, 0
            if method.observes(num_micro_batches):
                observation = strategy("observe", batch, hyper)
                observed, observing, one = calls.copy(), flops.count, memory.live
                # All observations look the same, and are one tensor here: the others' bytes are added below.
                targets = strategy("combine", [observation] * num_micro_batches, hyper)
                combining, peak = flops.count - observing, memory.peak
                del observation
            others = (num_micro_batches - 1) * one
            kept, earlier = memory.live + others, 0
            if num_micro_batches > 1:
                strategy.backward(strategy("learn", batch, targets[0], hyper)["loss"])
                earlier = flops.count - observing - combining
            early = frozenset(segment.parameter for segment in segments)
            segments.clear()
            calls.clear()
            memory.peak, base, before = memory.live, memory.live, flops.count
            out = strategy("learn", batch, targets[-1], hyper)
            activations, forward, learned = memory.live - base, memory.peak - base, calls.copy()
            memory.peak, loss = memory.live, out["loss"]
            del out
            strategy.backward(loss)
        learning = flops.count - before + (num_micro_batches - 1) * earlier
    return Trace(
        micro_batch_size=micro_batch_size,
        views=_nbytes(raw["views"]),
        inputs=_nbytes(augmented),
        observe=peak + others,
        kept=kept,
        forward=forward,
        activations=activations,
        backward=tuple(Segment(s.peak - base, s.parameter) for s in segments),
        early=early,
        observed=observed,
        learned=learned,
        flops=num_micro_batches * observing + combining + learning,
    )


def _counting(calls: Counter[int], number: int) -> Callable[..., None]:
    def count(module: nn.Module, arguments: Any) -> None:
        calls[number] += 1

    return count


def make_fake_(module: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                part._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def fake(value: Any) -> Any:
    """A fake tensor on the CPU like the one given; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _nbytes(tree: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tree) if isinstance(t, Tensor))

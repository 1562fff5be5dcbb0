"""What one rank's step of a recipe holds and computes, found by running it on tensors without memory.

    shapes = Shapes.of(recipe)
    trace = shapes.trace(settings, micro_batch_size=64, num_micro_batches=4, ranks=32)
    trace.peak, trace.flops

The method's own code runs, forward and backward, on fake tensors (torch's FakeTensorMode), which have every shape,
dtype and lifetime of real ones: neither a GPU nor the model's memory is needed, and nothing is estimated that the code
itself can say. The kernels are a CPU's (the same fused attention, which keeps its inputs, output and one number a row).
What the loader and the augmentation hand over is measured on a few real images and extended linearly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from scaler.bench.stepper import noise
from scaler.collectives import World
from scaler.methods.base import Batch, Method
from scaler.plan.live import LiveBytes
from scaler.recipe import Recipe
from scaler.strategies.base import DTYPES
from scaler.strategies.ddp import DDP
from scaler.timetable import Timetable
from scaler.train import build_method

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Segment:
    """A stretch of the backward pass, until the gradient of `parameter` is there: the most bytes held in it, without
    parameters and gradients that are done with."""

    peak: int
    parameter: str


@dataclass(frozen=True)
class Trace:
    """Bytes and operations of one rank's step, but for what the strategy adds.

    Attributes:
        inputs: an augmented micro-batch.
        views: a micro-batch as the loader hands it over.
        observe: most bytes beside `inputs` while a micro-batch is observed, and while all are combined.
        kept: what all micro-batches' observations and targets take while the step goes on.
        activations: what the forward of the last micro-batch leaves for its backward.
        forward: most bytes beside `inputs` and `kept` in that forward.
        backward: its stretches, in order of time.
        flops: of the whole step, each recomputation of activation checkpointing included.
        model_flops: without them.
    """

    inputs: int
    views: int
    observe: int
    kept: int
    activations: int
    forward: int
    backward: tuple[Segment, ...]
    flops: int

    @property
    def peak(self) -> int:
        """Most bytes beside `inputs` and `kept` in forward and backward."""
        return max(self.forward, *(segment.peak for segment in self.backward))


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
    """Counts floating-point operations of products, convolutions and attention by torch's own formulas.

    (Its FlopCounterMode also follows modules, by hooks that keep what activation checkpointing recomputes alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class _Bare(DDP):
    """One process, without optimiser."""

    def prepare(self, method: Method, make_optimizer: Any = None) -> None:
        """See `Strategy.prepare`."""
        self.method = self.module = method
        self.checkpoint_(method.blocks())

    def _measure_activations(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def meta_method(recipe: Recipe, *, world: World) -> Method:
    """The recipe's method with parameters that have no values and take no memory."""
    with torch.device("meta"):
        return build_method(recipe, world=world)


def trace_step(
    recipe: Recipe,
    settings: Any,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    ranks: int,
    gathered: bool,
) -> Trace:
    """Run one step of the recipe's method on fake tensors.

    Args:
        recipe: what is trained.
        settings: its strategy section, without "auto".
        micro_batch_size: images.
        num_micro_batches: of the rank.
        ranks: that share the global batch.
        gathered: whether weights come in the run's precision (FSDP2), instead of being cast where they are used.
    """
    method = meta_method(recipe, world=Imagined(ranks))
    hyper = Timetable(recipe, num_samples=1_000_000)
    hyper = hyper.hyper(method, hyper.total - 1)
    raw = augmented(recipe, method, size=micro_batch_size, world=World())
    names = {}
    segments: list[Segment] = []
    # Numbers are made on the fake tensors' way, so that nothing real is in their place.
    with FakeTensorMode():
        _make_fake_(method, dtype=DTYPES[settings.precision] if gathered else None)
        strategy = _Bare(settings, world=World(), device=_CPU, clip_norm=None, deterministic=False)
        strategy.prepare(method)
        batch = tree_map(_fake, raw)
        memory, flops = LiveBytes(), Flops()

        def note(parameter: Tensor) -> None:
            segments.append(Segment(memory.peak, names[parameter]))
            parameter.grad = None
            memory.peak = memory.live

        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                names[parameter] = name
                parameter.register_post_accumulate_grad_hook(note)
        with memory, flops:
            targets: list[Any] = [None] * num_micro_batches
            if method.observes(num_micro_batches):
                observations = [strategy("observe", batch, hyper)]
                one = memory.live
                # The others' would look the same and are one tensor here: their bytes are counted by hand.
                targets = strategy("combine", observations * num_micro_batches, hyper)
                observe = memory.peak + (num_micro_batches - 1) * one
                del observations
            else:
                one = observe = 0
            kept = memory.live + (num_micro_batches - 1) * one
            start = memory.peak = memory.live
            out = strategy("learn", batch, targets[-1], hyper)
            activations, forward = memory.live - start, memory.peak - start
            memory.peak = memory.live
            strategy.backward(out["loss"])
    first = flops.count
    return Trace(
        inputs=_nbytes(batch),
        views=0,
        observe=observe,
        kept=kept,
        activations=activations,
        forward=forward,
        backward=tuple(Segment(s.peak - start, s.parameter) for s in segments),
        flops=first,
    )


def augmented(recipe: Recipe, method: Method, *, size: int, world: World) -> Batch:
    """What `method`, on the meta device, makes of so many images: masks and rows as in a run, pixels without values."""
    batch = noise(method, size, world=world, device=torch.device("meta"))
    return method.augment(batch, seed=recipe.run.seed, step=0)


def smallest_micro_batch(method: Method) -> int:
    """The smallest micro-batch that the method takes."""
    for size in range(1, 4097):
        with contextlib.suppress(ValueError):
            method.check_layout(num_micro_batches=1, micro_batch_size=size)
            return size
    raise ValueError("no micro-batch of up to 4096 images is one that the method takes")


def _make_fake_(module: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                part._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _nbytes(tree: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tree) if isinstance(t, Tensor))

"""Which strategy fits a machine, in which micro-batches, how long it takes, and what one should start.

    plan = plan_recipe(recipe, Machine(gpus=8, nodes=4, memory=80e9), images=1_281_167)
    plan.choices, plan.best, plan.assumptions

For every strategy, with and without activation checkpointing, the largest micro-batch that fits is found among those
that the global batch and the method allow. Memory comes from traces of two micro-batch sizes (`scaler.plan.trace`) and
the straight line through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scaler.collectives import World
from scaler.layout import Layout, batch_layout
from scaler.methods.base import Method
from scaler.plan.memory import Memory, Setup, memory_of
from scaler.plan.model import Model
from scaler.plan.trace import NUM_SAMPLES, Trace, meta_method, trace_step
from scaler.plan.traffic import Traffic, traffic_of
from scaler.recipe import Recipe
from scaler.strategies.fsdp2 import shard_width
from scaler.timetable import Timetable

USABLE = 0.92  # of a GPU's memory: the rest is for CUDA's context, NCCL's buffers and what fragments
TFLOPS = {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}  # an H100 SXM's products, dense, by its data sheet
_ORDER = ("ddp", "fsdp2", "fsdp2 by node", "zero1", "zero2", "zero3")  # of equally fast ones the first is recommended
_SLACK = 1.02  # what is slower by less is equally fast


@dataclass(frozen=True)
class Machine:
    """What is there to train on.

    Attributes:
        gpus: of a node.
        nodes: machines.
        memory: bytes of a GPU.
        intra, inter: bytes a second that a GPU can send, to its neighbours in the machine and to other machines.
        tflops: of a GPU at its best, in the run's precision; None: `TFLOPS`.
        mfu: share of it that training is taken to reach.
        images_per_second: of one GPU, measured; None: from operations, `tflops` and `mfu`.
        loader: images a second of one loader worker, as `scaler bench loader` measures; None: not known.
    """

    gpus: int
    nodes: int
    memory: float
    intra: float = 450e9
    inter: float = 50e9
    tflops: float | None = None
    mfu: float = 0.35
    images_per_second: float | None = None
    loader: float | None = None

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Prediction:
    """What a step under one strategy and layout takes."""

    memory: Memory
    traffic: Traffic
    flops: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return self.traffic.sent


@dataclass(frozen=True)
class Choice:
    """One way to train, in its largest micro-batch that fits (or, where none does, in the smallest).

    Attributes:
        strategy: as in the recipe, or "fsdp2 by node".
        precision, checkpointing: the recipe's fields for it.
        layout: of the global batch.
        fits: whether it does.
        step: what a step takes on a rank.
        compute, network: seconds of a step; the two are taken to overlap.
        seconds: of the whole step.
    """

    strategy: str
    precision: str
    checkpointing: str | int
    layout: Layout
    fits: bool
    step: Prediction
    compute: float
    network: float

    @property
    def seconds(self) -> float:
        """Of a step, if the network works while the GPU computes."""
        return max(self.compute, self.network)

    @property
    def images_per_second(self) -> float:
        """Of all ranks together, which the loaders must deliver."""
        layout = self.layout
        return layout.ranks * layout.micro_batch_size * layout.num_micro_batches / self.seconds

    def overrides(self, recipe: Recipe) -> list[str]:
        """The words that make the recipe train so."""
        name, _, by_node = self.strategy.partition(" ")
        wanted = {
            "name": name,
            "precision": self.precision,
            "micro_batch_size": self.layout.micro_batch_size,
            "activation_checkpointing": self.checkpointing,
            **({"shard_group": "node"} if by_node else {}),
        }
        settings = recipe.strategy
        return [f"strategy.{key}={value}" for key, value in wanted.items() if getattr(settings, key) != value]


@dataclass(frozen=True)
class Plan:
    """What `plan_recipe` found; `best` is None where nothing fits."""

    parameters: int
    trained: int
    global_batch_size: int
    steps: int
    images: int
    choices: list[Choice]
    best: Choice | None
    days: Callable[[Choice], float]
    workers: Callable[[Choice], int | None]
    assumptions: list[str]


def plan_recipe(
    recipe: Recipe, machine: Machine, *, images: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Plan:
    """Look at every strategy.

    Args:
        recipe: what to train.
        machine: on what.
        images: of an epoch; None: ImageNet-1k's, which is said.
        say: told what is being looked at.

    Raises:
        ValueError: the batch cannot be laid over the GPUs in micro-batches that the method takes; names nearest ones.
    """
    method = meta_method(recipe, world=World())
    timetable = Timetable(recipe, num_samples=images or NUM_SAMPLES)
    size = recipe.data.global_batch_size
    layouts = possible_layouts(method, size, ranks=machine.ranks)
    model = Model.of(method, recipe)
    choices = []
    for precision in _precisions(recipe):
        for checkpointing in _checkpointings(recipe):
            say(f"{precision}, activation checkpointing {checkpointing}: tracing")
            lines: dict[bool, Callable[[Layout], Trace]] = {}
            for strategy in _strategies(machine, recipe):
                settings = _settings(recipe, strategy, precision=precision, checkpointing=checkpointing)
                gathered = settings.name == "fsdp2" and precision != "fp32"
                if gathered not in lines:
                    lines[gathered] = _line(recipe, settings, layouts, gathered=gathered)
                choices.append(_choose(strategy, settings, model, lines[gathered], layouts, machine))
    # A precision that the recipe names is not for the plan to change.
    own = recipe.strategy.precision
    fitting = [choice for choice in choices if choice.fits and own in ("auto", choice.precision)]
    best = None
    if fitting:
        fastest = min(choice.seconds for choice in fitting)
        close = [choice for choice in fitting if choice.seconds <= _SLACK * fastest]
        best = min(close, key=lambda c: (_ORDER.index(c.strategy), c.layout.num_micro_batches))
    total = timetable.images(timetable.total)

    def days(choice: Choice) -> float:
        return total / choice.images_per_second / 86_400

    def workers(choice: Choice) -> int | None:
        if machine.loader is None:
            return None
        return max(1, -(-int(choice.images_per_second / machine.ranks) // int(machine.loader)))

    return Plan(
        parameters=model.count(model.weights.values()),
        trained=model.count(model.trained),
        global_batch_size=size,
        steps=timetable.total,
        images=total,
        choices=choices,
        best=best,
        days=days,
        workers=workers,
        assumptions=list(_assumptions(recipe, machine, images)),
    )


def predict(recipe: Recipe, settings: Any, layout: Layout, *, device: str = "cuda") -> Prediction:
    """What a step takes in exactly this layout.

    Args:
        recipe: what is trained.
        settings: its strategy section without "auto".
        layout: of the global batch.
        device: "cuda", or "cpu" for what is measured without a GPU.
    """
    model = Model.of(meta_method(recipe, world=World()), recipe)
    width = layout.ranks
    if settings.name == "fsdp2":
        width = shard_width(settings.shard_group, world_size=layout.ranks)
    trace = trace_step(
        recipe,
        settings,
        micro_batch_size=layout.micro_batch_size,
        num_micro_batches=layout.num_micro_batches,
        ranks=layout.ranks,
        gathered=settings.name == "fsdp2" and settings.precision != "fp32",
    )
    return _predict(model, trace, Setup(settings, layout.ranks, width, layout.num_micro_batches, device))


def possible_layouts(method: Method, global_batch_size: int, *, ranks: int) -> list[Layout]:
    """The layouts of a global batch over the ranks that the method takes, the smallest micro-batch first.

    Raises:
        ValueError: there is none; says what is nearest.
    """
    share = batch_layout(global_batch_size, micro_batch_size=1, ranks=ranks).num_micro_batches
    found, reason = [], ""
    for micro in (m for m in range(1, share + 1) if share % m == 0):
        try:
            method.check_layout(num_micro_batches=share // micro, micro_batch_size=micro)
        except ValueError as error:
            reason = str(error)
        else:
            found.append(Layout(ranks, micro, share // micro))
    if not found:
        raise ValueError(f"{global_batch_size} images over {ranks} GPUs are {share} each: {reason}")
    return found


def _line(recipe: Recipe, settings: Any, layouts: list[Layout], *, gathered: bool) -> Callable[[Layout], Trace]:
    """Traces of any of the layouts, from those of the smallest and the largest that accumulates as it does."""
    ends: dict[int, Trace] = {}

    def trace(layout: Layout) -> Trace:
        if layout.micro_batch_size not in ends:
            ends[layout.micro_batch_size] = trace_step(
                recipe,
                settings,
                micro_batch_size=layout.micro_batch_size,
                num_micro_batches=layout.num_micro_batches,
                ranks=layout.ranks,
                gathered=gathered,
            )
        return ends[layout.micro_batch_size]

    accumulating = [layout for layout in layouts if layout.num_micro_batches > 1]

    def at(layout: Layout) -> Trace:
        if layout.num_micro_batches == 1 or len(accumulating) < 2:
            return trace(layout)
        first, last = trace(accumulating[0]), trace(accumulating[-1])
        return first.towards(last, layout.micro_batch_size)

    return at


def _choose(
    strategy: str,
    settings: Any,
    model: Model,
    trace: Callable[[Layout], Trace],
    layouts: list[Layout],
    machine: Machine,
) -> Choice:
    """The largest micro-batch of a strategy that fits; where none does, the one that needs least."""
    width = machine.gpus if strategy == "fsdp2 by node" else machine.ranks
    steps = {
        layout: _predict(model, trace(layout), Setup(settings, layout.ranks, width, layout.num_micro_batches))
        for layout in layouts
    }
    fitting = [layout for layout in layouts if steps[layout].memory.peak <= USABLE * machine.memory]
    layout = fitting[-1] if fitting else min(layouts, key=lambda layout: steps[layout].memory.peak)
    step = steps[layout]
    compute = step.flops / (1e12 * (machine.tflops or TFLOPS[settings.precision]) * machine.mfu)
    if machine.images_per_second:
        compute = layout.micro_batch_size * layout.num_micro_batches / machine.images_per_second
    return Choice(
        strategy=strategy,
        precision=settings.precision,
        checkpointing=settings.activation_checkpointing,
        layout=layout,
        fits=bool(fitting),
        step=step,
        compute=compute,
        network=step.traffic.seconds(nodes=machine.nodes, gpus=machine.gpus, intra=machine.intra, inter=machine.inter),
    )


def _predict(model: Model, trace: Trace, setup: Setup) -> Prediction:
    name = setup.settings.name
    return Prediction(memory_of(name, model, trace, setup), traffic_of(name, model, trace, setup), trace.flops)


def _precisions(recipe: Recipe) -> list[str]:
    """The recipe's own; with full precision also what bf16 would give."""
    own = {"auto": "fp32"}.get(recipe.strategy.precision, recipe.strategy.precision)
    return [own, "bf16"] if own == "fp32" else [own]


def _checkpointings(recipe: Recipe) -> list[str | int]:
    own = recipe.strategy.activation_checkpointing
    return ["none", *([own] if isinstance(own, int) else []), "selective", "blocks"]


def _strategies(machine: Machine, recipe: Recipe) -> Iterator[str]:
    """All that make a difference on this machine; LARS needs whole parameters, which ZeRO has not."""
    yield "ddp"
    if machine.ranks == 1:
        return
    if recipe.optim.name != "lars":
        yield from ("zero1", "zero2")
    yield "fsdp2"
    if machine.nodes > 1:
        yield "fsdp2 by node"
    if recipe.optim.name != "lars":
        yield "zero3"


def _settings(recipe: Recipe, strategy: str, *, precision: str, checkpointing: str | int) -> Any:
    name = strategy.partition(" ")[0]
    changes = {"name": name, "precision": precision, "activation_checkpointing": checkpointing}
    return recipe.strategy.model_copy(update=changes)


def _assumptions(recipe: Recipe, machine: Machine, images: int | None) -> Iterator[str]:
    """What the figures rest on, a line each."""
    yield (
        "memory: live tensors of the fullest rank, from the method's own code run on tensors without memory; it fits "
        f"where it is at most {USABLE:.0%} of a GPU's: the rest is for CUDA, NCCL and fragmentation"
    )
    yield "compilation (strategy.compile) and offload by a DeepSpeed file change memory and are not counted"
    if recipe.data.decode == "gpu":
        yield "data.decode=gpu: pictures that are being decoded (up to 256 MB) and nvJPEG's own memory are not counted"
    if recipe.data.stages:
        yield "data.stages: planned for the batch and image size after the last; days count all images at that size"
    if machine.images_per_second:
        yield f"time: {machine.images_per_second:g} images/s a GPU as given, with and without activation checkpointing"
    else:
        best = f"{machine.tflops:g}" if machine.tflops else f"{TFLOPS['bf16']:g} (bf16) or {TFLOPS['fp32']:g} (fp32)"
        yield (
            f"time: operations counted, at {machine.mfu:.0%} (--mfu) of {best} TFLOP/s a GPU "
            "(--tflops, else an H100's); measured --images-per-second are better"
        )
    yield (
        f"network: rings at {machine.intra / 1e9:g} GB/s a GPU inside a machine (--intra)"
        + (f" and {machine.inter / 1e9:g} between machines (--inter)" if machine.nodes > 1 else "")
        + ", while the GPU computes; a step takes as long as the longer of the two"
    )
    if images is None:
        yield f"data: {NUM_SAMPLES:,} images an epoch, ImageNet-1k's; --images says how many there are"

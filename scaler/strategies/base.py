"""What a strategy does for the loop: place the method on the processes, run it, step it, and hand out its state.

Everything that is the same wherever the tensors lie is here: autocast, loss scaling, clipping per module on local
shards, EMA on local shards, and the pieces that checkpoints are made of. A strategy adds how it wraps the method,
when gradients are exchanged, and where this rank's part of a parameter, its gradient and its optimiser state lies.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scaler.collectives import World
from scaler.methods.base import Method
from scaler.strategies.blocks import arrange_blocks_
from scaler.strategies.fp8 import to_fp8_
from scaler.strategies.loss_scale import LossScale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MakeOptimizer = Callable[[], torch.optim.Optimizer]


@dataclass(frozen=True)
class Piece:
    """What this process holds of one named tensor: a contiguous flat range.

    Attributes:
        data: 1-D view of the local values; writing to it changes the state.
        start: index of `data[0]` in the flattened whole tensor.
        shape: shape of the whole tensor.
        copy, copies: how many ranks hold this same range, and which of them this one is: they share its writing.
    """

    data: Tensor
    start: int
    shape: tuple[int, ...]
    copy: int
    copies: int


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimiser step, scalars on the device, so that nobody has to wait for them.

    Attributes:
        grad_norm: the gradient's norm before clipping.
        module_norms: the same of each module that is clipped by itself.
        taken: whether the weights were changed, bool: not where the norm is not finite.
        failed: whether they were not, and not because the fp16 scale is still looking for its value, bool.
    """

    grad_norm: Tensor
    module_norms: dict[str, Tensor]
    taken: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Group:
    """An optimiser group as the method made it, before a strategy flattens its parameters."""

    names: list[str]
    parameters: list[nn.Parameter]
    clip: str


class Strategy:
    """Base of all strategies; `settings` is the recipe's strategy section with every "auto" resolved.

    Class attributes:
        name: as in the recipe.
        sharded: whether a rank holds only a part of the gradients that it steps with.
        cut: what else of the model is cut over the ranks, by the names of `memory`.
        reads: the settings that mean something to this strategy alone; the others are warned about if they are set.
    """

    name: ClassVar[str]
    sharded: ClassVar[bool]
    cut: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, settings: Any, *, world: World, device: torch.device, clip_norm: float | None, deterministic: bool
    ) -> None:
        self.settings, self.world, self.device = settings, world, device
        self.clip_norm, self.deterministic = clip_norm, deterministic
        self.dtype = DTYPES[settings.precision]
        self.loss_scale = LossScale(enabled=settings.precision == "fp16", device=device)
        self.shard_world = world  # the ranks that hold one copy of the model between them
        self.method: Method
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.groups: list[Group]
        self._gradient_bytes = self._activation_bytes = 0  # measured in the first step
        self._warn_of_unread_settings()

    def _warn_of_unread_settings(self) -> None:
        fields = type(self.settings).model_fields
        for key in sorted(_SPECIFIC - self.reads):
            if self.world.rank == 0 and getattr(self.settings, key) != fields[key].default:
                warnings.warn(f"strategy.{key} has no effect under {self.name}; leave it out", stacklevel=3)

    # ------------------------------------------------------------------ set up

    def prepare(self, method: Method, make_optimizer: MakeOptimizer) -> None:
        """Wrap the method and make its optimiser, over the parameters that there are when the strategy wants it.

        Raises:
            ValueError: settings, optimiser and strategy do not fit together.
        """
        self.method = method.to(self.device)
        self.method.image_dtype = self.dtype
        if self.settings.fp8:
            to_fp8_(method.blocks(), strategy=self.name, precision=self.settings.precision, device=self.device)
        arrange_blocks_(
            method.blocks(), checkpointing=self.settings.activation_checkpointing, compiled=self.settings.compile
        )
        if self.settings.compile:
            arrange_blocks_(method.stems(), checkpointing="none", compiled=True)
            method.compile_loss()

        def make() -> torch.optim.Optimizer:
            optimizer = make_optimizer()
            self.groups = [Group(list(g["names"]), list(g["params"]), g["clip"]) for g in optimizer.param_groups]
            return optimizer

        self.module, self.optimizer = self.wrap(method, make)
        self.create_optimizer_state()
        self.verify()

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module whose call runs the method under this strategy, and the optimiser whose groups the loop sets."""
        raise NotImplementedError

    def verify(self) -> None:
        """Assert that what was asked for is what is engaged."""
        raise NotImplementedError

    def create_optimizer_state(self) -> None:
        """Give every parameter its optimiser state now, so that a checkpoint can be loaded into it."""
        create_state(self.optimizer)

    # ------------------------------------------------------------------ one step

    def __call__(self, stage: str, *args: Any) -> Any:
        """Run a stage of the method through the wrapped module; `observe` and `combine` without gradient."""
        with torch.set_grad_enabled(stage == "learn"), self.autocast():
            if stage == "learn" and not self._activation_bytes:
                with self._measure_activations():
                    return self.module(stage, *args)
            return self.module(stage, *args)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed-precision region of this strategy's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are exchanged in the last one only."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Back-propagate (scaled under fp16)."""
        self.loss_scale.scale(loss).backward()

    @torch.no_grad()
    def step(self) -> StepResult:
        """Clip per module, take the optimiser step unless a gradient is not finite, and clear the gradients.

        Whether they are finite only the device knows: the step is masked there.
        """
        gradients = self.gradients()
        if not self._gradient_bytes:
            self._gradient_bytes = storage_bytes(g for tensors in gradients.values() for g in tensors)
        squares = torch.stack([_sum_of_squares(tensors, self.device) for tensors in gradients.values()])
        if self.sharded:
            self.shard_world.sum_(squares)
        norms = squares.sqrt() / self.loss_scale.value
        total = norms.square().sum().sqrt()
        finite = total.isfinite()
        if self.clip_norm is not None or self.loss_scale.enabled:
            limit = float("inf") if self.clip_norm is None else self.clip_norm
            factors = (limit / (norms + 1e-6)).clamp(max=1.0) / self.loss_scale.value
            factors = torch.where(finite, factors, float("nan"))  # so that DeepSpeed, which looks itself, agrees
            for tensors, factor in zip(gradients.values(), factors, strict=True):
                if tensors:
                    torch._foreach_mul_(tensors, factor.to(tensors[0].device))
        taken = self.update(finite)
        self.loss_scale.update(finite=taken)
        module_norms = dict(zip(gradients, norms, strict=True))
        return StepResult(total, module_norms, taken=taken, failed=~taken & self.loss_scale.exhausted)

    def gradients(self) -> dict[str, list[Tensor]]:
        """This rank's part of every gradient that the next update uses, by the module that it is clipped with."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for group in self.groups:
            for parameter in group.parameters:
                if parameter.grad is not None:
                    found[group.clip].append(local_shard(parameter.grad))
        return found

    def update(self, finite: Tensor) -> Tensor:
        """Take the optimiser step where `finite`, bool [], and clear the gradients; returns whether it was taken."""
        place = self.optimizer.param_groups[0]["params"][0].device  # host memory, where parameters are offloaded
        self.optimizer.found_inf = (~finite).float().to(place)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    @torch.no_grad()
    def lerp_(self, targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
        """targets += weight · (sources − targets), on local shards (the EMA of a teacher)."""
        torch._foreach_lerp_([self.local(t) for t in targets], [self.local(s) for s in sources], weight)

    # ------------------------------------------------------------------ state and report

    @torch.no_grad()
    def pieces(self) -> dict[str, Piece]:
        """Everything a checkpoint holds, by name: `method/…` and `optimizer/PARAMETER/KEY`.

        Names and shapes are those of the unwrapped method whatever the strategy. After writing to the pieces' data
        call `loaded`.
        """
        state = self.method.state_dict(keep_vars=True)
        found = {f"method/{name}": self.piece(tensor) for name, tensor in state.items()}
        for group in self.groups:
            for name, parameter in zip(group.names, group.parameters, strict=True):
                for key, piece in self.optimizer_pieces(parameter).items():
                    found[f"optimizer/{name}/{key}"] = piece
        return found

    def loaded(self) -> None:
        """Called after the data of `pieces` have been written: bring copies of them up to date."""

    def piece(self, tensor: Tensor) -> Piece:
        """The flat range of a parameter, buffer or state of the method on this rank."""
        if isinstance(tensor, DTensor):
            return dtensor_piece(tensor)
        assert tensor.is_contiguous(), "state must be contiguous"
        return Piece(tensor.detach().view(-1), 0, tuple(tensor.shape), copy=self.world.rank, copies=self.world.size)

    def optimizer_pieces(self, parameter: nn.Parameter) -> dict[str, Piece]:
        """The optimiser's state of a trained parameter, by key."""
        state = self.optimizer.state[parameter]
        return {key: self.piece(value) for key, value in state.items() if isinstance(value, Tensor)}

    def local(self, parameter: Tensor) -> Tensor:
        """What this rank holds of a parameter; student's and teacher's are cut alike."""
        return local_shard(parameter)

    def numel(self, parameter: Tensor) -> int:
        """Elements of the whole parameter."""
        return parameter.numel()

    def master_weights(self) -> list[Tensor]:
        """Copies that the optimiser keeps of the trained parameters, beside `local`."""
        return []

    def memory(self) -> dict[str, int]:
        """Bytes of live tensors on this rank, by part; gradients and activations as the first step measured them.

        `teacher` is all parameters without gradient; `activations` is what the first micro-batch's forward left for
        its backward (on a CPU without what activation checkpointing keeps).
        """
        parameters = list(self.method.parameters())
        trained = [self.local(p) for p in parameters if p.requires_grad]
        return {
            "parameters": storage_bytes([*trained, *self.master_weights()]),
            "gradients": self._gradient_bytes,
            "optimizer": storage_bytes(local_shard(value) for value in self._state_tensors()),
            "teacher": storage_bytes(self.local(p) for p in parameters if not p.requires_grad),
            "activations": self._activation_bytes,
        }

    def _state_tensors(self) -> list[Tensor]:
        return [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]

    @contextlib.contextmanager
    def _measure_activations(self) -> Iterator[None]:
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            yield
            self._activation_bytes = max(1, torch.cuda.memory_allocated(self.device) - before)
            return
        weights = {self.local(p).untyped_storage().data_ptr() for p in self.method.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self._activation_bytes = max(1, sum(sizes.values()))

    def report(self) -> dict[str, Any]:
        """What was engaged: strategy, ranks, precision, optimiser, and how much of the model is on this rank."""
        parameters = list(self.method.parameters())
        return {
            "strategy": self.name,
            "ranks": self.world.size,
            "device": str(self.device),
            "precision": self.settings.precision,
            "weights": _dtypes(self.local(p) for p in parameters),
            "optimizer": type(self.optimizer).__name__,
            "optimizer_state": _dtypes(self._state_tensors()),
            "activation_checkpointing": self.settings.activation_checkpointing,
            "compile": self.settings.compile,
            "fp8": self.settings.fp8,
            "parameters": sum(self.numel(p) for p in parameters),
            "trained_parameters": sum(self.numel(p) for p in parameters if p.requires_grad),
            "parameters_on_rank_0": sum(self.local(p).numel() for p in parameters),
            "sharded": self._sharded() or "nothing",
        }

    def _sharded(self) -> str:
        """The parts of `cut` that this method has, and over how many ranks; each of those holds its share."""
        parts = [
            part for part in self.cut if part != "teacher" or not all(p.requires_grad for p in self.method.parameters())
        ]
        copies = self.world.size // self.shard_world.size
        over = f" over {self.shard_world.size} ranks" + (f", {copies} copies" if copies > 1 else "")
        return ", ".join(parts) + over if parts else ""


# Settings of the recipe's strategy section that only some strategies read.
_SPECIFIC = frozenset(
    (
        "reshard_after_forward",
        "prefetch",
        "cpu_offload",
        "shard_group",
        "reduce_precision",
        "static_graph",
        "deepspeed_config",
    )
)


def local_shard(tensor: Tensor) -> Tensor:
    """The values on this rank: the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each piece of memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def _dtypes(tensors: Iterable[Tensor]) -> str:
    """The floating-point types among live tensors, as "float32"."""
    return " ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}))


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of an optimiser its state, all zeros.

    A step with zero gradients at zero learning rate and decay changes no weight; the state is then zeroed.
    """
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                local_shard(value).zero_()
            elif key == "step":  # DeepSpeed's CPU Adam counts in a plain integer
                state[key] = torch.tensor(0)


def dtensor_piece(tensor: DTensor) -> Piece:
    """The flat range of a DTensor on this rank.

    FSDP2 cuts dimension 0 into chunks of ⌈d0/w⌉ rows, the last ones shorter or empty, so a local part is contiguous in
    the flattened whole. On a mesh of two axes the first one replicates (hybrid sharding).
    """
    mesh, local = tensor.device_mesh, tensor.to_local()
    *replicas, shard = tensor.placements
    assert shard.is_shard(0) and all(p.is_replicate() for p in replicas) and mesh.ndim <= 2, (mesh, tensor.placements)
    width, rows = mesh.size(mesh.ndim - 1), tensor.shape[0]
    first = min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // width))
    copy, copies = (mesh.get_local_rank(0), mesh.size(0)) if replicas else (0, 1)
    return Piece(local.view(-1), first * (tensor.numel() // rows), tuple(tensor.shape), copy=copy, copies=copies)


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    filled = [t for t in tensors if t.numel()]  # a rank may hold an empty shard
    if not filled:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(filled)).to(device).square().sum()

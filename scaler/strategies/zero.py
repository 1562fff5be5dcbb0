"""DeepSpeed's ZeRO stages 1, 2 and 3: the optimiser, then gradients, then parameters are cut over all ranks.

`deepspeed.initialize` runs here as it is, with the recipe's own optimiser, and nothing is decided by its defaults:
clipping acts per module on this rank's partitions, accumulation has explicit boundaries, bf16 is `torch_autocast` (its
`bf16` section would turn an EMA teacher into bf16). What a recipe cannot say (offload, buckets, overlap) comes from the
user's own `strategy.deepspeed_config`; see `scaler.strategies.deepspeed_config`.

Where things lie (deepspeed 0.19):
    stages 1 and 2   every rank has all parameters; of every optimiser group one flat fp32 partition
                     (`single_partition_of_fp32_groups`), whose fragments `parameter._hp_mapping` locates
    stage 3          of every parameter `ds_tensor`, the ⌈numel / ranks⌉ elements of this rank, padded at the end with
                     uninitialised memory; the trained ones in flat fp32 sub-groups, where `grad_position` locates them
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from scaler.methods.base import Method
from scaler.strategies.base import MakeOptimizer, Piece, Strategy, create_state
from scaler.strategies.deepspeed_config import merged_config, offload_device


class Zero(Strategy):
    """What the stages share."""

    stage: ClassVar[int]
    sharded = True
    reads = frozenset({"deepspeed_config"})

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See `Strategy.wrap`.

        Raises:
            ValueError: an optimiser whose maths needs whole parameters, or a DeepSpeed configuration that contradicts
                the recipe.
        """
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        config = merged_config(self.settings, stage=self.stage, trained_parameters=trained)
        optimizer = make_optimizer()
        if not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
            raise ValueError(
                f"{type(optimizer).__name__.lower()} needs the norm of every whole parameter, and ZeRO flattens them "
                "into one tensor: use strategy.name=fsdp2 or ddp, or optim.name=adamw or sgd"
            )
        if offload_device(config, "offload_optimizer") and isinstance(optimizer, torch.optim.AdamW):
            optimizer = cpu_adam(optimizer)
        if self.dtype is torch.float16:
            # DeepSpeed's autocast would bring a loss scale of its own beside ours: it is told nothing of fp16.
            method.forward = torch.autocast(self.device.type, dtype=self.dtype)(method.forward)  # type: ignore[method-assign]
        if self.device.type == "cpu":
            # Else it first compiles, under a lock, an operation for inference's all-reduce, which training never calls.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # DeepSpeed insists on a launcher's word
        self.engine, self.zero, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
        return self.engine, self.zero.optimizer

    def verify(self) -> None:
        """See `Strategy.verify`."""
        assert self.engine.zero_optimization_stage() == self.stage, self.engine.zero_optimization_stage()
        assert self.engine.gradient_clipping() == 0.0 and self.zero.clip_grad == 0.0

    # ------------------------------------------------------------------ one step

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """See `Strategy.autocast`; here it is the engine's, or inside the method."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """See `Strategy.accumulate`."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        self.engine.backward(self.loss_scale.scale(loss))

    def update(self, finite: Tensor) -> Tensor:
        """See `Strategy.update`; DeepSpeed's own step looks (on the host) at the same gradients, and discards them."""
        self.engine.step()
        return torch.full_like(finite, bool(self.engine.was_step_applied()))

    # ------------------------------------------------------------------ state and report

    def report(self) -> dict[str, Any]:
        """See `Strategy.report`."""
        return {
            **super().report(),
            "optimizer": f"{type(self.zero).__name__} over {type(self.optimizer).__name__}",
        }

    def optimizer_pieces(self, parameter: nn.Parameter) -> dict[str, Piece]:
        """See `Strategy.optimizer_pieces`; here the state is that of flat partitions."""
        flat, fragment, start = self._fragment(parameter)
        found = {}
        for key, value in self.optimizer.state[flat].items():
            if not isinstance(value, Tensor):
                continue
            if value.ndim == 0:  # the step count, the same for the whole partition
                found[key] = Piece(value.view(-1), 0, (), copy=self.world.rank, copies=self.world.size)
            else:
                found[key] = Piece(value.view(-1)[fragment], start, self.shape(parameter), copy=0, copies=1)
        return found

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(parameter.shape)

    def _fragment(self, parameter: nn.Parameter) -> tuple[Tensor, slice, int]:
        """A trained parameter's flat partition, where in it this rank's part is, and what of it that starts at."""
        raise NotImplementedError


class Zero1(Zero):
    """Every rank keeps the optimiser state of its part, and all of the parameters and gradients."""

    name = "zero1"
    stage = 1
    cut: ClassVar[tuple[str, ...]] = ("optimizer",)

    def verify(self) -> None:
        """See `Strategy.verify`."""
        super().verify()
        assert not any(any(padding) for padding in self.zero.round_robin_bit16_padding), "mapping would be wrong"

    def create_optimizer_state(self) -> None:
        """See `Strategy.create_optimizer_state`."""
        kept = [flat.grad for flat in self.zero.single_partition_of_fp32_groups]
        create_state(self.optimizer)
        for flat, gradient in zip(self.zero.single_partition_of_fp32_groups, kept, strict=True):
            flat.grad = gradient  # offloading keeps its gradients there

    def gradients(self) -> dict[str, list[Tensor]]:
        """See `Strategy.gradients`."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for i, group in enumerate(self.groups):
            if self.zero.cpu_offload:
                found[group.clip].append(self.zero.single_partition_of_fp32_groups[i].grad)
            else:
                found[group.clip].extend(self.zero.averaged_gradients[i])
        return found

    def piece(self, tensor: Tensor) -> Piece:
        """See `Strategy.piece`; a trained parameter is saved from, and loaded into, its fp32 fragment."""
        if not tensor.requires_grad:
            return super().piece(tensor)
        flat, fragment, start = self._fragment(tensor)
        data = flat.detach()[fragment]
        live = tensor.detach().view(-1)[start : start + data.numel()]
        assert torch.equal(live, data.to(live)), "DeepSpeed's fragment is not this parameter's"
        return Piece(data, start, tuple(tensor.shape), copy=0, copies=1)

    def master_weights(self) -> list[Tensor]:
        """See `Strategy.master_weights`."""
        return list(self.zero.single_partition_of_fp32_groups)

    def loaded(self) -> None:
        """See `Strategy.loaded`: the parameters follow their fp32 fragments, on all ranks."""
        self.zero.update_lp_params()

    def _fragment(self, parameter: Any) -> tuple[Tensor, slice, int]:
        """The flat partition of the parameter's group, where in it this rank's part is, and what that starts at."""
        mapping = parameter._hp_mapping
        if mapping is None:  # nothing of it is on this rank
            return self._flat_of(parameter), slice(0, 0), 0
        at, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, slice(at, at + size), mapping.lp_fragment_address.start

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        index = next(i for i, g in enumerate(self.groups) if any(p is parameter for p in g.parameters))
        flat: Tensor = self.zero.single_partition_of_fp32_groups[index]
        return flat


class Zero2(Zero1):
    """As stage 1, and every rank keeps the gradients of its part only."""

    name = "zero2"
    stage = 2
    cut = ("optimizer", "gradients")


class Zero3(Zero):
    """Every rank keeps its part of everything; modules are gathered for their forward and backward."""

    name = "zero3"
    stage = 3
    cut = ("parameters", "gradients", "optimizer", "teacher")

    def wrap(self, method: Method, make_optimizer: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """See `Strategy.wrap`.

        Weights in fp32 need no fp32 copy for the optimiser. DeepSpeed means to leave it out, but compares a device with
        its name; without this every rank would hold its part of the weights twice.
        """
        wrapped = super().wrap(method, make_optimizer)
        flats = zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat, strict=True)
        for master, weights in flats:
            if (master.dtype, master.device) == (weights.dtype, weights.device):
                master.data = weights.data
        return wrapped

    def verify(self) -> None:
        """See `Strategy.verify`."""
        super().verify()
        for name, parameter in self.method.named_parameters():
            assert hasattr(parameter, "ds_tensor") and not getattr(parameter, "ds_persist", True), (
                f"{name} is not sharded"
            )

    def create_optimizer_state(self) -> None:
        """See `Strategy.create_optimizer_state`."""
        kept = [flat.grad for flat in self.zero.fp32_partitioned_groups_flat]
        with self._flats_in_groups():
            create_state(self.optimizer)
        for flat, gradient in zip(self.zero.fp32_partitioned_groups_flat, kept, strict=True):
            flat.grad = gradient

    @contextlib.contextmanager
    def _flats_in_groups(self) -> Iterator[None]:
        """DeepSpeed empties the optimiser's groups and puts one sub-group at a time into them; here all at once."""
        groups = self.optimizer.param_groups
        for sub_group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            groups[self.zero.sub_group_to_group_id[sub_group]]["params"].append(flat)
        try:
            yield
        finally:
            for group in groups:
                group["params"].clear()

    def gradients(self) -> dict[str, list[Tensor]]:
        """See `Strategy.gradients`."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for sub_group, parameters in enumerate(self.zero.fp16_groups):
            clip = self.groups[self.zero.sub_group_to_group_id[sub_group]].clip
            for i, parameter in enumerate(parameters):
                if self.zero.offload_optimizer:
                    flat, fragment, _ = self._fragment(parameter)
                    found[clip].append(flat.grad[fragment])  # type: ignore[index]
                else:
                    gradient = self.zero.averaged_gradients[sub_group][i]
                    found[clip].append(gradient.view(-1)[: self._count(parameter)])
        return found

    def update(self, finite: Tensor) -> Tensor:
        """See `Strategy.update`.

        The gradient partitions are zeroed, since a parameter that is not reached by a backward keeps the old ones.
        """
        used = [g for group in self.zero.averaged_gradients.values() for g in group or ()]
        taken = super().update(finite)
        if used:
            torch._foreach_zero_(used)
        return taken

    def piece(self, tensor: Any) -> Piece:
        """See `Strategy.piece`."""
        if not hasattr(tensor, "ds_tensor"):
            return super().piece(tensor)
        start = self._start(tensor)
        if tensor.requires_grad:
            flat, fragment, _ = self._fragment(tensor)
            data = flat.detach()[fragment]
        else:
            data = tensor.ds_tensor.detach()[: self._count(tensor)]
        return Piece(data, start, self.shape(tensor), copy=0, copies=1)

    def master_weights(self) -> list[Tensor]:
        """See `Strategy.master_weights`; without offloading they are the partitions themselves."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def loaded(self) -> None:
        """See `Strategy.loaded`: the parameters' partitions follow the fp32 ones, where these are not the same."""
        for sub_group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)

    def local(self, parameter: Any) -> Tensor:
        """See `Strategy.local`."""
        partition: Tensor = parameter.ds_tensor.detach()[: self._count(parameter)]
        return partition

    def numel(self, parameter: Any) -> int:
        """See `Strategy.numel`."""
        return int(parameter.ds_numel)

    def shape(self, parameter: Any) -> tuple[int, ...]:
        """See `Zero.shape`."""
        return tuple(parameter.ds_shape)

    def _start(self, parameter: Any) -> int:
        """What of the flattened parameter this rank's partition starts at."""
        return int(min(parameter.ds_numel, self.world.rank * parameter.ds_tensor.ds_numel))

    def _count(self, parameter: Any) -> int:
        """Elements of the parameter in this rank's partition, without the padding."""
        return int(min(parameter.ds_tensor.ds_numel, parameter.ds_numel - self._start(parameter)))

    def _fragment(self, parameter: Any) -> tuple[Tensor, slice, int]:
        """The flat sub-group of a trained parameter, where in it this rank's part is, and what that starts at."""
        sub_group, at, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self.zero.fp32_partitioned_groups_flat[sub_group]
        return flat, slice(at, at + self._count(parameter)), self._start(parameter)


def cpu_adam(optimizer: torch.optim.AdamW) -> DeepSpeedCPUAdam:
    """DeepSpeed's vectorised AdamW for optimiser state in host memory, over the groups of torch's."""
    defaults = optimizer.defaults
    return DeepSpeedCPUAdam(
        optimizer.param_groups,
        lr=defaults["lr"],
        betas=defaults["betas"],
        eps=defaults["eps"],
        weight_decay=defaults["weight_decay"],
        adamw_mode=True,
    )

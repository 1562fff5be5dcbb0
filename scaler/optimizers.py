"""Optimisers over the parameter groups of a method, and the scheduled values they take every step.

    optimizer = build_optimizer(recipe.optim, method.parameter_groups(recipe.optim))
    set_hyper(optimizer, {"lr": 0.3, "weight_decay": 1e-6})          # before every step

AdamW and SGD are torch's fused ones. LARS is written here, because its norms are over whole parameters and have to stay
so when FSDP2 leaves only a shard of each on this rank. All three leave everything as it is where their `found_inf` (an
attribute that torch.amp's GradScaler has established) is 1 on the device: nobody has to wait for the gradient's norm to
know whether a step can be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

if TYPE_CHECKING:
    from scaler.recipe import Optim


def build_optimizer(settings: Optim, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """The recipe's optimiser over a method's groups (see `Method.parameter_groups`); groups without parameters go.

    lr and weight decay start at the recipe's peak values times the group's scales; `set_hyper` sets them every step.

    Raises:
        ValueError: no parameter to train, one named twice, or an unknown optimiser.
    """
    kept = [
        {
            "lr_scale": 1.0,
            "weight_decay_scale": 1.0,
            "lr_key": "lr",
            **group,
            "lr": settings.lr * group.get("lr_scale", 1.0),
            "weight_decay": settings.weight_decay * group.get("weight_decay_scale", 1.0),
        }
        for group in groups
        if len(group["params"])
    ]
    params = [p for group in kept for p in group["params"]]
    if not params:
        raise ValueError("nothing to train: every parameter is frozen")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("a parameter is in two optimiser groups; each belongs to exactly one")
    fused = not any(p.is_meta for p in params)  # of a model without memory, whose sizes somebody wants to know
    if settings.name == "adamw":
        return torch.optim.AdamW(kept, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    if settings.name == "sgd":
        return SGD(kept, lr=settings.lr, momentum=settings.momentum, fused=fused)
    if settings.name == "lars":
        return LARS(kept, lr=settings.lr, momentum=settings.momentum, eta=settings.eta)
    raise ValueError(f"no optimiser {settings.name!r}; valid names: adamw, sgd, lars")


def set_hyper(optimizer: torch.optim.Optimizer, hyper: Mapping[str, float]) -> None:
    """Give every group its lr, `hyper[lr_key] * lr_scale`, and `hyper["weight_decay"] * weight_decay_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = hyper[group["lr_key"]] * group["lr_scale"]
        group["weight_decay"] = hyper["weight_decay"] * group["weight_decay_scale"]


class SGD(torch.optim.SGD):
    """torch's fused SGD on the local parts of DTensors, for which its kernel has no rule; elements are independent."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params if group["momentum"] else ():
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            sgd(
                [_local(p) for p in params],
                [_local(p.grad) for p in params],
                [_local(self.state[p]["momentum_buffer"]) if group["momentum"] else None for p in params],
                **{key: group[key] for key in _SGD},
                found_inf=getattr(self, "found_inf", None),
            )


_SGD = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "fused")


class LARS(torch.optim.Optimizer):
    """SGD whose step is proportional to the norm of each parameter (You et al., arXiv 1708.03888), as SimCLR uses it.

        g <- grad + weight_decay * w
        trust = eta * |w| / |g|         (1 where a norm is 0, and in groups with `adapt=False`: biases and norms)
        v <- momentum * v + lr * trust * g
        w <- w - v

    The lr is inside the momentum ("classical" momentum), so a change of lr does not rescale the past; the norm in the
    denominator is that of the decayed gradient, as in SimCLR's code, not |grad| + weight_decay * |w|.

    `found_inf`, if set, is float32 [] on the device of the gradients: with 1 nothing moves, whatever the gradients are.

    State: `momentum_buffer` for every parameter, of its shape and placement. DTensor shards get the norms of the whole
    parameters by one all-reduce a step and mesh axis.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        adapt: bool = True,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or eta <= 0:
            raise ValueError(
                f"LARS needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0, eta > 0;"
                f" got lr={lr}, momentum={momentum}, weight_decay={weight_decay}, eta={eta}"
            )
        self.found_inf: Tensor | None = None
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient; returns what `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        work = [(group, params) for group, params in work if params]
        decayed = []
        bad = None if self.found_inf is None else self.found_inf.bool()
        for group, params in work:
            grads = [_local(p.grad) for p in params]
            if bad is not None:
                grads = [torch.where(bad, 0.0, g) for g in grads]
            if group["weight_decay"] != 0:
                grads = list(torch._foreach_add(grads, [_local(p) for p in params], alpha=group["weight_decay"]))
            decayed.append(grads)
        adapted = [(params, grads) for (group, params), grads in zip(work, decayed, strict=True) if group["adapt"]]
        norms = _norms([p for ps, _ in adapted for p in ps], [g for _, gs in adapted for g in gs])  # [adapted, 2]
        for (group, params), grads in zip(work, decayed, strict=True):
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
            lr: Any = group["lr"]
            if bad is None:
                torch._foreach_mul_(buffers, group["momentum"])
            else:
                torch._foreach_mul_(buffers, torch.where(bad, 1.0, group["momentum"]))
                lr = torch.where(bad, 0.0, lr)
            if group["adapt"]:
                mine, norms = norms[: len(params)], norms[len(params) :]
                trust = torch.where((mine > 0).all(1), group["eta"] * mine[:, 0] / mine[:, 1], 1.0)
                torch._foreach_add_(buffers, torch._foreach_mul(grads, list((lr * trust).unbind())))
            else:
                torch._foreach_add_(buffers, torch._foreach_mul(grads, lr))
            steps = buffers if bad is None else list(torch._foreach_mul(buffers, (~bad).to(buffers[0].dtype)))
            torch._foreach_sub_([_local(p) for p in params], steps)
        return loss


def _norms(params: list[Tensor], grads: list[Tensor]) -> Tensor:
    """|w| and |g| over the whole of every parameter, [params, 2], from local parts; `grads` are local already."""
    if not params:
        return torch.empty(0, 2)
    locals_ = [_local(p) for p in params]
    squares = torch.stack(
        [torch.stack(torch._foreach_norm(locals_)), torch.stack(torch._foreach_norm(grads))], dim=1
    ).square_()  # [params, 2]
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, DTensor):
            for axis, placement in enumerate(p.placements):
                if placement.is_shard():
                    by_group.setdefault(p.device_mesh.get_group(axis), []).append(i)
                elif not placement.is_replicate():
                    raise ValueError(f"LARS cannot take the norm of a parameter placed as {placement}")
    for group, rows in by_group.items():
        part = squares[rows]
        dist.all_reduce(part, group=group)
        squares[rows] = part
    return squares.sqrt_()


def _local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x

"""Batch norm over the images of all ranks, on any device (torch's SyncBatchNorm runs on CUDA only).

    backbone = convert_batch_norm(backbone, world)        # nn.BatchNorm1d/2d/3d and timm's BatchNormAct2d, in place
    with frozen_statistics(head):                         # a second pass over the same batch
        head(features)

What a rank normalises by is the mean and variance of the concatenated batch, and gradients flow through both, so that
the layout of a batch over ranks changes nothing. Statistics are fp32 or wider and combined as mean and sum of squared
deviations (Chan et al. 1979), which loses no digits where the mean is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from scaler.collectives import World

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)


class GlobalBatchNorm(nn.Module):
    """Batch norm of [n, c] or [n, c, …] over dim 0 and the trailing dims of all ranks; parameters as in torch's.

    `momentum` is the weight of the new batch in the running statistics (torch's convention; decay 0.9 is 0.1), None a
    cumulative mean. Running variances are unbiased. A batch counts once, also when activation checkpointing runs the
    forward again. `act` follows (timm's BatchNormAct2d).

    Raises:
        ValueError: in training, a batch with a single value per channel.
    """

    def __init__(
        self,
        num_features: int,
        *,
        world: World,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.world, self.eps, self.momentum = num_features, world, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine and bias else None
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)
        self.act: nn.Module | None = None
        self.frozen = False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        if self.weight is not None:
            self.weight.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def convert(cls, module: nn.Module, world: World) -> GlobalBatchNorm:
        """The same layer, with the same parameter and buffer tensors, as a global one."""
        assert isinstance(module, _BatchNorm)
        new = cls(module.num_features, world=world, eps=module.eps, momentum=module.momentum, affine=False)
        new.weight, new.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(module, name))
        if isinstance(module, BatchNormAct2d):
            new.act = nn.Sequential(module.drop, module.act)
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [n, c] or [n, c, …]; same shape and dtype."""
        if self.training or self.running_mean is None:
            y = self._normalise_by_batch(x)
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, *self._affine(), training=False, eps=self.eps)
        return y if self.act is None else self.act(y)

    def _normalise_by_batch(self, x: Tensor) -> Tensor:
        tracks = self.training and not self.frozen
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        momentum = self.momentum or 0.0
        if not tracks or mean is None or var is None or count is None:
            mean = var = None
        elif _in_backward():  # recomputed by checkpointing: the same tensors to save, but the batch has been counted
            mean, var = mean.clone(), var.clone()
        else:
            count.add_(1)
            momentum = 1.0 / float(count) if self.momentum is None else self.momentum
        if self.world.size == 1:
            return F.batch_norm(x, mean, var, *self._affine(), training=True, momentum=momentum, eps=self.eps)
        if x.is_cuda and not torch.compiler.is_compiling():
            out: Tensor = _ByKernels.apply(x, *self._affine(), mean, var, momentum, self.eps, self.world)
            return out
        y, batch_mean, batch_var, n = _ByFormulas.apply(x, *self._affine(), self.eps, self.world)
        if mean is not None and var is not None:
            mean.lerp_(batch_mean.to(mean.dtype), momentum)
            var.lerp_((batch_var * (n / (n - 1))).to(var.dtype), momentum)
        return y

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, fp32 or wider; a missing bias beside a weight is zeros: kernels take both or none."""
        if self.weight is None:
            return None, None
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return weight, torch.zeros_like(weight) if self.bias is None else self.bias.to(weight.dtype)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, ranks={self.world.size}"


class _ByFormulas(torch.autograd.Function):
    """x → normalised x, and the batch's mean, biased variance (fp32 or wider, [c]) and count, without gradient.

    With N values per channel over all ranks, x̂ = (x - mean) / s and incoming gradients g, the input gets
    weight / s · (g - Σg / N - x̂ · Σ(g·x̂) / N), where the sums run over all ranks. Weight and bias get local sums: the
    wrappers average parameter gradients over ranks, and `g` is scaled for that already. A compiler makes of it what the
    kernels below are, with what comes before and after, and no copy in fp32 is left.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        local_var, local_mean = torch.var_mean(wide, dim=dims, correction=0)
        local_count = x.numel() // x.shape[1]
        row = torch.cat([local_mean, local_var, local_mean.new_full((1,), float(local_count))])
        rows = world.all_gather(row[None])  # [ranks, 2c + 1]
        means, variances, counts = rows.split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        if local_count * world.size < 2:
            raise ValueError(f"batch norm needs more than 1 value per channel, got a batch of shape {list(x.shape)}")
        ctx.save_for_backward(x, weight, bias, mean, (var + eps).rsqrt(), count)
        ctx.world, ctx.dims = world, dims
        ctx.mark_non_differentiable(mean, var, count)
        y = F.batch_norm(wide, mean, var, weight, bias, training=False, eps=eps)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, bias, mean, inverse_std, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        g = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)).mul_(inverse_std.view(shape))
        grad_bias = g.sum(ctx.dims)
        grad_weight = (g * normalised).sum(ctx.dims)
        sums = ctx.world.sum_(torch.stack([grad_bias, grad_weight])) / count  # new tensor: the local sums stay
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = g - sums[0].view(shape) - normalised.mul_(sums[1].view(shape))
        return (
            grad_x.mul_(scale.view(shape)).to(x.dtype),
            None if weight is None else grad_weight,
            None if bias is None else grad_bias,
            None,
            None,
        )


class _ByKernels(torch.autograd.Function):
    """The same on a GPU by torch's kernels of batch norm over ranks: nothing of the size of x is made but y, and in the
    backward its gradient. They read half-precision and channels-last tensors as they are, and count in fp32.

    The running statistics are moved by `momentum` on the way, unless they are None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        world: World,
    ) -> Tensor:
        x, channels = _dense(x), x.shape[1]
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        row = torch.cat([mean, inverse_std, mean.new_full((1,), x.numel() / channels)])
        means, inverse_stds, counts = world.all_gather(row[None]).split([channels, channels, 1], dim=1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts.reshape(-1)
        )
        ctx.save_for_backward(x, weight, mean, inverse_std, counts.to(torch.int32))
        ctx.world = world
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        if grad.stride() != x.stride():  # the kernels take both in the same memory
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        affine = weight is not None
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, affine, affine
        )
        sums = ctx.world.sum_(torch.stack([sum_grad, sum_product]))
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse_std, weight, sums[0], sums[1], counts)
        return grad_x, grad_weight if affine else None, grad_bias if affine else None, *[None] * 5


def _dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or has its channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x if x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]) else x.contiguous()


def _in_backward() -> bool:
    """Whether autograd is running backward here, so that a forward is a recomputation.

    A compiled one knows nothing of it, and need not: what it does to buffers is not among what is computed again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def convert_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Replace every batch norm inside `module` by a global one that shares its tensors; `module` is changed in place.

    Returns:
        `module`, or its replacement if it is a batch norm itself. Names in the state dict stay as they are.

    Raises:
        ValueError: a kind of batch norm whose forward is not known here.
    """
    if type(module) in _CONVERTIBLE:
        return GlobalBatchNorm.convert(module, world)
    if isinstance(module, _BatchNorm):
        raise ValueError(
            f"{type(module).__name__} cannot be made global over ranks; use a backbone with BatchNorm1d/2d/3d or "
            "timm's BatchNormAct2d, or one without batch norm"
        )
    for name, child in module.named_children():
        new = convert_batch_norm(child, world)
        if new is not child:
            setattr(module, name, new)
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer inside `module` normalises by statistics of the batch."""
    return any(isinstance(m, _BatchNorm | GlobalBatchNorm) for m in module.modules())


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, the global batch norms of `module` leave their running statistics alone; they still use the batch's."""
    layers = [m for m in module.modules() if isinstance(m, GlobalBatchNorm)]
    before = [layer.frozen for layer in layers]
    for layer in layers:
        layer.frozen = True
    try:
        yield
    finally:
        for layer, frozen in zip(layers, before, strict=True):
            layer.frozen = frozen

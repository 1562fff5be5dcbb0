"""What the references have in common: a training step of plain torch in the order in which everybody writes it.

A reference starts from the same weights as ours and trains with the recipe's settings, in one process, without
accumulation. Settings, groups of parameters and schedules are those of the recipe.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Method
from scaler.methods.pooled import PooledMethod, make_backbone
from scaler.nn.base import Backbone
from scaler.nn.vit import PackedViT
from scaler.optimizers import set_hyper
from scaler.plan.trace import NUM_SAMPLES, meta_method
from scaler.recipe import Optim, Recipe
from scaler.strategies.base import DTYPES
from scaler.timetable import Timetable

At = Callable[[str], None]


def nothing(part: str) -> None:
    """Told what begins, of which nobody wants to know."""


class Reference(abc.ABC):
    """The contender. A subclass makes its model and `optimizer`, and says what its loss is.

    Attributes:
        method: ours, without values: for augmentations and schedules.
        optimizer: of the reference's parameters.
        number: steps already made.
    """

    optimizers: ClassVar[frozenset[str]] = frozenset({"adamw"})  # those of the recipe's that it has
    compiles: ClassVar[bool] = False  # whether strategy.compile is for it too
    looks_every: ClassVar[int] = 1  # steps; then the host waits for the loss's value
    optimizer: torch.optim.Optimizer

    def __init__(self, recipe: Recipe, *, precision: str, device: torch.device, compiled: bool = False) -> None:
        self.settings, self.device, self.dtype = recipe.method, device, DTYPES[precision]
        self.compiled = compiled and self.compiles
        self.seed, self.clip_norm = recipe.run.seed, recipe.optim.clip_norm
        self.method: Method = meta_method(recipe, world=World())
        self.timetable, self.number = Timetable(recipe, num_samples=NUM_SAMPLES), 0

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, bool]:
        """What of a recipe's method it has not been written for, and whether that applies."""
        return {}

    @property
    @abc.abstractmethod
    def made_of(self) -> str:
        """What it is, for people."""

    def step(self, batches: Iterator[list[Batch]], at: At) -> None:
        """One step of training on the next batch."""
        at("data")
        (raw,) = next(batches)
        at("augment")
        batch = self.prepare(raw)
        hyper = self.timetable.hyper(self.method, self.number)
        set_hyper(self.optimizer, hyper)
        loss = self.loss(batch, hyper=hyper, at=at)
        at("backward")
        loss.backward()
        at("update")
        for parameters in self.clipped() if self.clip_norm is not None else ():
            self.clip(parameters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.number % self.looks_every == 0:
            float(loss.detach())
        at("average")
        self.average(hyper)
        self.number += 1
        at("end")

    def prepare(self, raw: Batch) -> Batch:
        """What the loader gives → what `loss` takes: by default our own augmentation."""
        return self.method.augment(raw, seed=self.seed, step=self.number)

    @abc.abstractmethod
    def loss(self, batch: Batch, *, hyper: Hyper, at: At = nothing) -> Tensor:
        """The loss of a prepared batch, [], with everything that its gradient needs."""

    def clipped(self) -> Iterable[Iterable[Tensor]]:
        """Parameters whose gradients' norm is limited together: by default all."""
        return [[p for group in self.optimizer.param_groups for p in group["params"]]]

    def clip(self, parameters: Iterable[Tensor]) -> None:
        """Limit the norm of their gradients by `clip_norm`."""
        assert self.clip_norm is not None
        nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def average(self, hyper: Hyper) -> None:  # noqa: B027  (most keep none)
        """Let an average of the weights follow, if there is one."""

    def autocast(self) -> torch.autocast:
        """The recipe's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def ready(self, module: Any) -> Any:
        """The module on the device, channels last on a GPU where it has convolutions of images."""
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.device.type == "cuda" else module

    def images(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] in the memory that `ready` modules like."""
        return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images


def make_optimizer(
    optim: Optim, groups: list[dict[str, Any]], *, one_by_one: bool
) -> torch.optim.AdamW | torch.optim.SGD:
    """torch's, as it is by default (many parameters a kernel on a GPU), or parameter by parameter."""
    how: dict[str, Any] = {"foreach": False, "fused": False} if one_by_one else {}
    groups = [{"lr_key": "lr", **group} for group in groups]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, **how)
    assert optim.name == "sgd"
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, **how)


def our_groups(method: PooledMethod, optim: Optim, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Our groups of parameters, with those that the reference has under the same names."""
    return [
        {**group, "params": [parameters[name] for name in group["names"]]} for group in method.parameter_groups(optim)
    ]


def plain_backbone(ours: Backbone, settings: Any, *, image_size: int, drop_path: float) -> Any:
    """timm's own model in the place of our backbone, with the same weights: it has no classifier.

    Drop path is timm's, at the same rate in every block of a ViT, and computes every row.
    """
    if not isinstance(ours, PackedViT):
        model: Any = make_backbone(settings, image_size=image_size)
        model = model.model
        model.load_state_dict(ours.model.state_dict())  # type: ignore[union-attr]
        return model
    options: dict[str, Any] = {
        "img_size": image_size,
        "init_values": settings.layer_scale,
        "patch_size": settings.patch_size,
        "depth": settings.depth,
        "embed_dim": settings.embed_dim,
        "num_heads": settings.num_heads,
        **({"reg_tokens": settings.registers, "no_embed_class": True} if settings.registers else {}),
    }
    options = {key: value for key, value in options.items() if value is not None}
    model = timm.create_model(settings.backbone, num_classes=0, dynamic_img_size=True, **options)
    for block in model.blocks if drop_path else ():
        block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    weights = ours.state_dict()
    if "mask_token" in weights:
        model.mask_token = nn.Parameter(torch.zeros_like(weights["mask_token"]))
    model.load_state_dict(weights)
    trained = {name: p.requires_grad for name, p in ours.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    return model


def named_as_ours(ours: Backbone, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a `plain_backbone` by the names that a pooled method has for them."""
    prefix = "backbone." if isinstance(ours, PackedViT) else "backbone.model."
    return {prefix + name: parameter for name, parameter in model.named_parameters()}

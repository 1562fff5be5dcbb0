"""What methods with one backbone and a head on its pooled feature have in common: SimCLR, supervised.

A subclass adds its views, its head and its loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Lerp, Method, ReadWeights
from scaler.methods.pooled_settings import PooledSettings
from scaler.nn.average import Average
from scaler.nn.backbones import build_backbone, check_image_size, set_small_stem_
from scaler.nn.base import Backbone
from scaler.nn.batch_norm import convert_batch_norm, has_batch_norm
from scaler.nn.drop_path import kept_rows
from scaler.nn.layers import parameter_layers
from scaler.nn.moco_v3 import fix_sincos_positions_, freeze_patch_embed_, init_moco_v3_
from scaler.nn.precision import at_least_fp32
from scaler.nn.vit import PackedViT
from scaler.nn.weights import load_backbone_
from scaler.schedules import warmup_momentum


class PooledMethod(Method):
    """The backbone with batch norm over all ranks, its drop path, the average of weights, and the optimiser's groups.

    Raises:
        ValueError: an unknown backbone, or settings of a ViT or a ResNet for another kind of model.
    """

    def __init__(self, settings: PooledSettings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        if not settings.normalize:
            self.normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        backbone = make_backbone(settings, image_size=image_size)
        self.norms_by_batch = has_batch_norm(backbone)
        self.backbone = backbone
        self.average: Average | None = None
        convert_batch_norm(backbone, world)

    def start_average(self, *parts: str) -> None:
        """Keep an average of these trained modules if `method.ema` wants one; they are complete by now."""
        if self.settings.ema is not None:
            self.average = Average({name: getattr(self, name) for name in parts})

    def load_weights(self, read: ReadWeights) -> list[str]:
        """See `Method.load_weights`: the backbone's, and with it its average's; the head starts afresh."""
        s = self.settings
        if s.weights is None:
            return []
        weights = read(s.weights, backbone=s.backbone)
        loaded = load_backbone_(self.backbone, weights, normalization=self.normalization)
        average = self.evaluated("backbone")
        if average is not self.backbone:
            average.load_state_dict(self.backbone.state_dict())
        fixed = "; the positions are the weights' own, and stay fixed" if s.sincos_positions else ""
        return [f"{loaded.line}{fixed}; the head starts afresh"]

    def evaluated(self, name: str) -> Any:
        """The module of this name that is evaluated: its average if there is one."""
        return self.average[name] if self.average is not None and name in self.average else getattr(self, name)

    def _usable(self, image_size: int) -> int:
        """The size, if the backbone runs on images of it.

        Raises:
            ValueError: it does not.
        """
        if isinstance(self.backbone, PackedViT):
            check_image_size(image_size, patch_size=self.backbone.patch_size, name=self.settings.backbone)
        elif image_size != self.image_size and self.backbone.fixed_size:
            raise ValueError(
                f"{self.settings.backbone} runs on images of {self.image_size} pixels only, not of {image_size}; take "
                "a CNN or a vit_* model, or leave data.stages' image sizes out"
            )
        return image_size

    def check_layout(self, *, num_micro_batches: int, micro_batch_size: int) -> None:
        """See `Method.check_layout`."""
        if self.norms_by_batch and num_micro_batches > 1:
            raise ValueError(
                f"{self.settings.backbone} has batch norm, whose statistics would be those of a micro-batch of "
                f"{micro_batch_size} images instead of the global batch's: with {num_micro_batches} micro-batches a "
                f"rank the loss would be another one. Set strategy.micro_batch_size to "
                f"{micro_batch_size * num_micro_batches}, use more ranks, or take a backbone without batch norm (a ViT)"
            )
        grouped = self.grouped()
        if grouped and micro_batch_size % self.settings.group_size:
            raise ValueError(
                f"a micro-batch of {micro_batch_size} images does not hold whole groups of {self.settings.group_size} "
                f"images for {' and '.join(grouped)}: choose a micro-batch that method.group_size divides, or another "
                "group_size"
            )

    def grouped(self) -> list[str]:
        """What is drawn among the images of a group."""
        return ["drop path"] if self._drops_rows else []

    def lr_scale(self, name: str) -> float:
        """Learning rate of a parameter, of the common one, before layer decay."""
        return 1.0

    def parameter_groups(self, optim: Any) -> list[dict[str, Any]]:
        """Weights, and without weight decay and LARS adaptation biases, norms, class token and positions.

        Each layer (`scaler.nn.layers`) below the head has `optim.layer_decay` times the learning rate of the one above.

        Raises:
            ValueError: layer decay or a multiplier without a trained parameter that it would act on.
        """
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        scales = {name: self.lr_scale(name) for name, _ in trained}
        if optim.layer_decay != 1.0:
            self._check_acts(optim, "layer_decay", [name for name in scales if name.startswith("backbone.")])
            layers, top = parameter_layers(self.backbone, name=self.settings.backbone)
            for name in scales:
                scales[name] *= optim.layer_decay ** (top - layers.get(name.removeprefix("backbone."), top))
        if optim.patch_embed_lr_scale != 1.0:
            embedding = [name for name in scales if "patch_embed" in name.split(".")]
            self._check_acts(optim, "patch_embed_lr_scale", embedding)
            for name in embedding:
                scales[name] *= optim.patch_embed_lr_scale
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for decays in (True, False):
            for name, parameter in trained:
                if _decays(name, parameter) != decays:
                    continue
                settings = {"lr_scale": scales[name], "weight_decay_scale": float(decays), "adapt": decays}
                group = groups.setdefault(
                    (decays, scales[name]), {"params": [], "names": [], **settings, "clip": "model"}
                )
                group["params"].append(parameter)
                group["names"].append(name)
        return list(groups.values())

    def _check_acts(self, optim: Any, name: str, parameters: list[str]) -> None:
        if not parameters:
            raise ValueError(
                f"optim.{name}={getattr(optim, name)} has no effect: this {self.settings.backbone} has no such trained "
                "parameters; leave it at 1.0"
            )

    def blocks(self) -> list[nn.Module]:
        """The backbone's blocks, and those of its average."""
        average = self.evaluated("backbone")
        return self.backbone.blocks() + ([] if average is self.backbone else average.blocks())

    def stems(self) -> list[nn.Module]:
        """See `Method.stems`: a ResNet's, and its average's."""
        backbones = {self.backbone, self.evaluated("backbone")}
        return [stem for backbone in backbones if (stem := getattr(backbone, "stem", None)) is not None]

    def hyper(self, step: int, steps: Callable[[str], int]) -> Hyper:
        """See `Method.hyper`: `momentum` of the average, if there is one."""
        return {} if self.settings.ema is None else {"momentum": warmup_momentum(step, momentum=self.settings.ema)}

    def after_step(self, hyper: Hyper, lerp_: Lerp) -> None:
        """See `Method.after_step`: the average follows."""
        if self.average is not None:
            live = {name: getattr(self, name) for name in self.average}
            self.average.follow_(live, weight=1.0 - hyper["momentum"], lerp_=lerp_)

    def evaluated_backbone(self) -> Backbone:
        """See `Method.evaluated_backbone`: with averaged weights if there are any; the head is for training only."""
        backbone: Backbone = self.evaluated("backbone")
        return backbone

    def _keep(self, batch: Batch, *, copies: int, kind: str, seed: int, step: int) -> Tensor | None:
        """The rows of `copies` views of each image that run each residual branch, on the CPU; None: all rows."""
        if not self._drops_rows:
            return None
        return kept_rows(
            batch["positions"].cpu().numpy(),
            num_blocks=len(self.backbone.blocks()),
            rate=self.settings.drop_path,
            group_size=self.settings.group_size,
            copies=copies,
            seed=seed,
            step=step,
            kind=kind,
        )

    def image_kinds(self, views: Tensor) -> dict[str, Any]:
        """How images are to be made of these views (`scaler.nn.color.apply_color`): their precision, and on a GPU the
        memory that the backbone likes.
        """
        return {"dtype": self.image_dtype, "channels_last": views.is_cuda and self.backbone.channels_last}

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Features [n, d] of views [n, 3, h, w], in fp32 or wider."""
        return at_least_fp32(self.backbone([images], keep=None if keep is None else [keep])[0].cls)

    @property
    def _drops_rows(self) -> bool:
        return bool(self.settings.drop_path and self.backbone.is_vit and self.training)


def make_backbone(settings: PooledSettings, *, image_size: int) -> Backbone:
    """The backbone that the settings describe.

    Raises:
        ValueError: an unknown model, or options that this kind of model does not have.
    """
    backbone = build_backbone(
        settings.backbone,
        image_size=image_size,
        drop_path=settings.drop_path,
        layer_scale=settings.layer_scale,
        registers=settings.registers,
        patch_size=settings.patch_size,
        initial_weights="fan_in" if settings.initial_weights == "fan_in" else "published",
        depth=settings.depth,
        embed_dim=settings.embed_dim,
        num_heads=settings.num_heads,
    )
    if settings.small_stem:
        set_small_stem_(backbone)
    if isinstance(backbone, PackedViT):
        if settings.initial_weights == "moco_v3":
            init_moco_v3_(backbone)
        if settings.sincos_positions:
            fix_sincos_positions_(backbone)
        if settings.frozen_patch_embed:
            freeze_patch_embed_(backbone)
        return backbone
    wanted = {
        "initial_weights": settings.initial_weights != "published",
        "frozen_patch_embed": settings.frozen_patch_embed,
        "sincos_positions": settings.sincos_positions,
    }
    refused = [f"method.{key}" for key, value in wanted.items() if value]
    if refused:
        raise ValueError(f"{settings.backbone} is no plain ViT and has no {', '.join(refused)}; leave that out")
    if settings.drop_path:
        warnings.warn(
            f"{settings.backbone} draws its drop path per process: curves of different layouts are not comparable",
            stacklevel=2,
        )
    return backbone


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay and LARS adaptation apply: to matrices and kernels, not to tokens and positions."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in ("cls_token", "reg_token", "pos_embed")

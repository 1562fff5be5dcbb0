"""SimCLR (Chen et al., arXiv 2002.05709 and 2006.10029) with the loss of the global batch on any layout.

Accumulation by gradient caching (Gao et al., arXiv 2101.06983): the backbone's features of all local micro-batches are
cached without graph; head, its batch norm and the loss run once over all of them (and all ranks); every micro-batch
but the last then back-propagates the cached gradient of its own features, and the last one computes the true loss over
the others' cached features and its own live ones, which gives the head its gradient exactly once.

Shapes: m images a micro-batch, k micro-batches a rank, d channels of a feature.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Method
from scaler.methods.simclr.augment import color_views, make_color, make_views
from scaler.methods.simclr.loss import nt_xent
from scaler.methods.simclr.settings import SimCLRSettings
from scaler.nn.backbones import TimmBackbone, build_backbone
from scaler.nn.base import Backbone
from scaler.nn.batch_norm import convert_batch_norm, frozen_statistics, has_batch_norm
from scaler.nn.drop_path import kept_rows
from scaler.nn.moco_v3 import fix_sincos_positions_, freeze_patch_embed_, init_moco_v3_
from scaler.nn.projection_head import ProjectionHead
from scaler.nn.vit import PackedViT


class SimCLR(Method):
    """Backbone and projection head, trained to find the other view of an image among all views of the global batch.

    Raises:
        ValueError: an unknown backbone, or settings of a ViT or a ResNet for another kind of model.
    """

    Settings: ClassVar = SimCLRSettings

    def __init__(self, settings: SimCLRSettings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        self.views = make_views(settings, image_size=image_size)
        self.color = make_color(settings, image_size=image_size)
        if not settings.normalize:
            self.normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        backbone = make_backbone(settings, image_size=image_size)
        self.norms_by_batch = has_batch_norm(backbone)
        self.backbone = backbone
        convert_batch_norm(backbone, world)
        self.head = ProjectionHead(
            backbone.num_features,
            world=world,
            hidden_features=settings.head_hidden,
            out_features=settings.head_out,
            num_layers=settings.head_layers,
            batch_norm=settings.head_batch_norm,
        )

    def check_layout(self, *, num_micro_batches: int, micro_batch_size: int) -> None:
        """See `Method.check_layout`."""
        if self.norms_by_batch and num_micro_batches > 1:
            raise ValueError(
                f"{self.settings.backbone} has batch norm, whose statistics would be those of a micro-batch of "
                f"{micro_batch_size} images instead of the global batch's: with {num_micro_batches} micro-batches a "
                f"rank the loss would be another one. Set strategy.micro_batch_size to "
                f"{micro_batch_size * num_micro_batches}, use more ranks, or take a backbone without batch norm (a ViT)"
            )
        if self._drops_rows and micro_batch_size % self.settings.group_size:
            raise ValueError(
                f"a micro-batch of {micro_batch_size} images does not hold whole groups of {self.settings.group_size} "
                "images for drop path: choose a micro-batch that method.group_size divides, or another group_size"
            )

    def augment(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """Adds to what the loader gives: `images` float32 [2m, 3, h, w], first views then second, and `keep`."""
        mean, std = self.normalization
        images = color_views(batch, self.color, seed=seed, mean=mean, std=std)
        keep = None
        if self._drops_rows:
            keep = kept_rows(
                batch["positions"].cpu().numpy(),
                num_blocks=len(self.backbone.blocks()),
                rate=self.settings.drop_path,
                group_size=self.settings.group_size,
                copies=2,
                seed=seed,
                step=step,
                kind="views",
            ).to(images.device, non_blocking=True)
        return {"images": images, "keep": keep}

    def observes(self, num_micro_batches: int) -> bool:
        """A single micro-batch is the whole local batch: its loss needs no observation."""
        return num_micro_batches > 1

    def observe(self, batch: Batch, hyper: Hyper) -> Tensor:
        """The backbone's features, [2m, d] in fp32 or wider, without graph."""
        return self._embed(batch).detach()

    def combine(self, observations: list[Tensor], hyper: Hyper) -> list[dict[str, Any]]:
        """Targets: the gradient of the loss with respect to its features for every micro-batch but the last, the
        others' features for the last, and the metrics of the global loss for all.
        """
        with torch.enable_grad(), frozen_statistics(self.head):
            features = [x.detach().requires_grad_() for x in observations]
            loss, metrics = self._loss(features)
            gradients = torch.autograd.grad(loss, features)
        common = {"metrics": metrics, "num_micro_batches": len(observations)}
        targets: list[dict[str, Any]] = [{"gradient": g, **common} for g in gradients[:-1]]
        return [*targets, {"features": observations[:-1], **common}]

    def learn(self, batch: Batch, target: dict[str, Any] | None, hyper: Hyper) -> dict[str, Any]:
        """See `Method.learn`.

        The loop averages over the k micro-batches of this rank. The last one's loss is already that of all of them,
        and the others' gradients are parts of its gradient, hence the factor k.
        """
        features = self._embed(batch)
        if target is None:
            loss, metrics = self._loss([features])
            return {"loss": loss, "metrics": metrics}
        if "gradient" in target:
            loss = (features * target["gradient"]).sum() * target["num_micro_batches"]
        else:
            loss = self._loss([*target["features"], features])[0] * target["num_micro_batches"]
        return {"loss": loss, "metrics": target["metrics"]}

    def parameter_groups(self, optim: Any) -> list[dict[str, Any]]:
        """Weights, and without weight decay and LARS adaptation biases, norms, class token and positions.

        Raises:
            ValueError: layer decay or a patch-embedding multiplier, which SimCLR does not have.
        """
        for name in ("layer_decay", "patch_embed_lr_scale"):
            if getattr(optim, name) != 1.0:
                raise ValueError(f"optim.{name}={getattr(optim, name)} has no effect in simclr; leave it at 1.0")
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = []
        for decays in (True, False):
            chosen = [(name, p) for name, p in trained if _decays(name, p) == decays]
            groups.append(
                {
                    "params": [p for _, p in chosen],
                    "names": [name for name, _ in chosen],
                    "lr_scale": 1.0,
                    "weight_decay_scale": float(decays),
                    "adapt": decays,
                    "clip": "model",
                }
            )
        return groups

    def blocks(self) -> list[nn.Module]:
        """The backbone's blocks."""
        return self.backbone.blocks()

    def features(self, images: Tensor) -> Tensor:
        """The backbone's features; the head is for training only."""
        return self.backbone.pooled(images)

    @property
    def _drops_rows(self) -> bool:
        return bool(self.settings.drop_path and self.backbone.is_vit and self.training)

    def _embed(self, batch: Batch) -> Tensor:
        keep = None if batch["keep"] is None else [batch["keep"]]
        features = self.backbone([batch["images"]], keep=keep)[0].cls
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _loss(self, features: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's anchors from k features of [2m, d] each, and what is logged about it."""
        first, second = zip(*(x.chunk(2) for x in features), strict=True)
        embeddings = self.head(torch.cat([*first, *second]))  # [2km, out]
        loss, accuracy, std = nt_xent(embeddings, temperature=self.settings.temperature, world=self.world)
        value = loss.detach()
        return loss, {"loss": value, "loss/ntxent": value, "accuracy": accuracy, "embedding_std": std}


def make_backbone(settings: SimCLRSettings, *, image_size: int) -> Backbone:
    """The backbone that the settings describe.

    Raises:
        ValueError: an unknown model, or options that this kind of model does not have.
    """
    backbone = build_backbone(
        settings.backbone,
        image_size=image_size,
        drop_path=settings.drop_path,
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


def set_small_stem_(backbone: Backbone) -> None:
    """Give a ResNet the stem for small images (SimCLR's on CIFAR): one 3x3 convolution, no stride, no pooling.

    Raises:
        ValueError: a model without the stem of timm's ResNets.
    """
    model: Any = backbone.model if isinstance(backbone, TimmBackbone) else None
    if not isinstance(model, ResNet):
        raise ValueError("method.small_stem is for timm's ResNets; leave it off")
    stem = nn.Conv2d(3, int(model.bn1.num_features), kernel_size=3, padding=1, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.add_module("conv1", stem)
    model.add_module("maxpool", nn.Identity())


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay and LARS adaptation apply: to matrices and kernels, not to tokens and positions."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in ("cls_token", "reg_token", "pos_embed")

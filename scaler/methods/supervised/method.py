"""Supervised classification: cross-entropy of a linear classifier on the backbone's feature.

Every image has its own term, so the mean over micro-batches and ranks is the loss of the global batch as it is: there
is nothing to observe. Batch norm spans all ranks; a frozen backbone normalises by its running statistics.

Shapes: m images a micro-batch, d channels of a feature, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Shown
from scaler.methods.pooled import PooledMethod
from scaler.methods.supervised.augment import (
    VIEW,
    check_labels,
    color_view,
    erase_,
    make_color,
    make_views,
    shown_images,
)
from scaler.methods.supervised.mixing import make_mixup, mix_
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.precision import at_least_fp32, full_precision
from scaler.transfer import send
from shards.decode import View


class Supervised(PooledMethod):
    """Backbone and linear classifier, trained together or, on a frozen backbone, the classifier alone.

    Raises:
        ValueError: an unknown backbone, or settings of a ViT or a ResNet for another kind of model.
    """

    Settings: ClassVar = SupervisedSettings
    validates = True

    def __init__(self, settings: SupervisedSettings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        self.color, self.mixup = make_color(settings), make_mixup(settings)
        self.head = nn.Linear(self.backbone.num_features, settings.num_classes)
        nn.init.normal_(self.head.weight, std=0.01)  # as in arXiv 1706.02677: the first loss is near ln c
        nn.init.zeros_(self.head.bias)
        if settings.freeze_backbone:
            self.backbone.requires_grad_(False).eval()
            self.norms_by_batch = False
        self.start_average("head", *([] if settings.freeze_backbone else ["backbone"]))

    def train(self, mode: bool = True) -> Supervised:
        """Training mode, but not for a frozen backbone."""
        super().train(mode)
        if self.settings.freeze_backbone:
            self.backbone.eval()
        return self

    def views_at(self, image_size: int) -> tuple[View, ...]:
        """See `Method.views_at`."""
        return make_views(self.settings, image_size=self._usable(image_size))

    def check_classes(self, class_names: Sequence[str]) -> None:
        """See `Method.check_classes`."""
        found, wanted = len(class_names), self.settings.num_classes
        if not found:
            raise ValueError(
                "the shards have no labels, and supervised training needs one for every image; convert from a folder "
                "of class folders, or train simclr or dinov2"
            )
        if found > wanted:
            raise ValueError(
                f"the shards have {found} classes, but method.num_classes={wanted} has no score for class {wanted} "
                f"({class_names[wanted]}) and later ones; set method.num_classes={found}"
            )

    def augment(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """See `Method.augment`: `images` [m, 3, h, w] in `image_dtype`; `targets`, which are labels int64 [m] or, of
        mixed images, probabilities float32 [m, c]; and `keep` for drop path.

        Raises:
            ValueError: an image without a label, or with one that is no class.
        """
        mean, std = self.normalization
        labels = batch["labels"]
        check_labels(labels, batch["ids"], num_classes=self.settings.num_classes)
        kinds = self.image_kinds(batch["views"][VIEW])
        images = color_view(batch, self.color, seed=seed, mean=mean, std=std, **kinds)
        if self.settings.erase_probability:
            erase_(images, batch, probability=self.settings.erase_probability, seed=seed)
        if self.mixup is None:
            targets = send(labels, images.device)
        else:
            where = {"positions": batch["positions"], "group_size": self.settings.group_size}
            targets = mix_(self.mixup, images, labels, **where, seed=seed, step=step)
        keep = self._keep(batch, copies=1, kind="images", seed=seed, step=step)
        return {
            "images": images,
            "targets": targets,
            "keep": None if keep is None else send(keep, images.device),
        }

    def shown(self, batch: Batch, augmented: Batch) -> list[Shown]:
        """See `Method.shown`."""
        return shown_images(augmented, self.color)

    def advice(self, **facts: Any) -> list[str]:
        """See `Method.advice`: a frozen backbone should have learned something."""
        if self.settings.freeze_backbone and self.settings.weights is None:
            return [
                "warning: method.freeze_backbone keeps the backbone's random weights: name others in method.weights"
            ]
        return []

    def grouped(self) -> list[str]:
        """See `PooledMethod.grouped`."""
        return super().grouped() + ["mixing images"] * (self.mixup is not None)

    def observes(self, num_micro_batches: int) -> bool:
        """Never: no image's loss depends on another's."""
        return False

    def learn(self, batch: Batch, target: None, hyper: Hyper) -> dict[str, Any]:
        """See `Method.learn`; a mixed image counts as classified if its larger part's class has the highest score."""
        targets = batch["targets"]
        scores = at_least_fp32(self.head(self._embed(batch["images"], batch["keep"])))  # [m, c]
        wanted = targets
        if targets.is_floating_point():
            targets, wanted = targets.to(scores.dtype), targets.argmax(dim=1)
        with full_precision(scores):
            loss = F.cross_entropy(scores, targets, label_smoothing=self.settings.label_smoothing)
        value = loss.detach()
        accuracy = (scores.detach().argmax(dim=1) == wanted).float().mean()
        return {"loss": loss, "metrics": {"loss": value, "loss/cross_entropy": value, "accuracy": accuracy}}

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Method.evaluate`: `top1`, `top5` (of more than 5 classes) and `loss`, the cross-entropy; of the averaged
        weights if there are any.
        """
        scores = at_least_fp32(self.evaluated("head")(at_least_fp32(self.features(images))))  # [n, c]
        with full_precision(scores):
            losses = F.cross_entropy(scores, labels, reduction="none")
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = (best == labels[:, None]).to(scores.dtype)
        found = {"top1": hits[:, 0], "top5": hits.sum(dim=1), "loss": losses}
        return found if self.settings.num_classes > 5 else {key: found[key] for key in ("top1", "loss")}

    def lr_scale(self, name: str) -> float:
        """See `PooledMethod.lr_scale`."""
        return self.settings.backbone_lr_scale if name.startswith("backbone.") else 1.0

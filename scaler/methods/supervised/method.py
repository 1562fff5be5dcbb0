"""Supervised classification: cross-entropy of a linear classifier on the backbone's feature.

Every image has its own term, so the mean over micro-batches and ranks is the loss of the global batch as it is: there
is nothing to observe. Batch norm spans all ranks.

Shapes: m images a micro-batch, d channels of a feature, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper
from scaler.methods.pooled import PooledMethod
from scaler.methods.supervised.augment import check_labels, color_view, make_color, make_views
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.precision import at_least_fp32, full_precision
from shards.decode import View


class Supervised(PooledMethod):
    """Backbone and linear classifier.

    Raises:
        ValueError: an unknown backbone, or settings of a ViT or a ResNet for another kind of model.
    """

    Settings: ClassVar = SupervisedSettings

    def __init__(self, settings: SupervisedSettings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        self.color = make_color(settings)
        self.head = nn.Linear(self.backbone.num_features, settings.num_classes)
        nn.init.normal_(self.head.weight, std=0.01)  # as in arXiv 1706.02677: the first loss is near ln c
        nn.init.zeros_(self.head.bias)

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
        """See `Method.augment`: `images` float32 [m, 3, h, w], `labels` int64 [m], and `keep` for drop path.

        Raises:
            ValueError: an image without a label, or with one that is no class.
        """
        mean, std = self.normalization
        labels = batch["labels"]
        check_labels(labels, batch["ids"], num_classes=self.settings.num_classes)
        images = color_view(batch, self.color, seed=seed, mean=mean, std=std)
        keep = self._keep(batch, copies=1, kind="images", seed=seed, step=step)
        return {
            "images": images,
            "labels": labels.to(images.device, non_blocking=True),
            "keep": None if keep is None else keep.to(images.device, non_blocking=True),
        }

    def observes(self, num_micro_batches: int) -> bool:
        """Never: no image's loss depends on another's."""
        return False

    def learn(self, batch: Batch, target: None, hyper: Hyper) -> dict[str, Any]:
        """See `Method.learn`."""
        labels = batch["labels"]
        scores = at_least_fp32(self.head(self._embed(batch["images"], batch["keep"])))  # [m, c]
        with full_precision(scores):
            loss = F.cross_entropy(scores, labels, label_smoothing=self.settings.label_smoothing)
        value = loss.detach()
        accuracy = (scores.detach().argmax(dim=1) == labels).float().mean()
        return {"loss": loss, "metrics": {"loss": value, "loss/cross_entropy": value, "accuracy": accuracy}}

"""SimCLR (Chen et al., arXiv 2002.05709 and 2006.10029) with the loss of the global batch on any layout.

Accumulation by gradient caching (Gao et al., arXiv 2101.06983): the backbone's features of all local micro-batches are
cached without graph; head, its batch norm and the loss run once over all of them (and all ranks); every micro-batch
but the last then back-propagates the cached gradient of its own features, and the last one computes the true loss over
the others' cached features and its own live ones, which gives the head its gradient exactly once.

Shapes: m images a micro-batch, k micro-batches a rank, d channels of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Shown
from scaler.methods.pooled import PooledMethod
from scaler.methods.simclr import health
from scaler.methods.simclr.augment import VIEWS, color_views, make_views, shown_views
from scaler.methods.simclr.loss import nt_xent
from scaler.methods.simclr.settings import SimCLRSettings
from scaler.nn.batch_norm import frozen_statistics
from scaler.nn.projection_head import ProjectionHead
from scaler.transfer import send
from shards.decode import View


class SimCLR(PooledMethod):
    """Backbone and projection head, trained to find the other view of an image among all views of the global batch.

    Raises:
        ValueError: an unknown backbone, or settings of a ViT or a ResNet for another kind of model.
    """

    Settings: ClassVar = SimCLRSettings

    def __init__(self, settings: SimCLRSettings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        self.head = ProjectionHead(
            self.backbone.num_features,
            world=world,
            hidden_features=settings.head_hidden,
            out_features=settings.head_out,
            num_layers=settings.head_layers,
            batch_norm=settings.head_batch_norm,
        )
        self.start_average("backbone")

    def views_at(self, image_size: int) -> tuple[View, ...]:
        """See `Method.views_at`."""
        return make_views(self.settings, image_size=self._usable(image_size))

    def augment(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """Adds to what the loader gives: `images` [2m, 3, h, w] in `image_dtype`, first views then second, and
        `keep`.
        """
        mean, std = self.normalization
        kinds = self.image_kinds(batch["views"][VIEWS[0]])
        images = color_views(batch, self.settings, seed=seed, mean=mean, std=std, **kinds)
        keep = self._keep(batch, copies=2, kind="views", seed=seed, step=step)
        return {"images": images, "keep": None if keep is None else send(keep, images.device)}

    def shown(self, batch: Batch, augmented: Batch) -> list[Shown]:
        """See `Method.shown`."""
        return shown_views(batch, augmented, self.settings)

    def observes(self, num_micro_batches: int) -> bool:
        """A single micro-batch is the whole local batch: its loss needs no observation."""
        return num_micro_batches > 1

    def observe(self, batch: Batch, hyper: Hyper) -> Tensor:
        """The backbone's features, [2m, d] in fp32 or wider, without graph."""
        return self._embed(batch["images"], batch["keep"]).detach()

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
        features = self._embed(batch["images"], batch["keep"])
        if target is None:
            loss, metrics = self._loss([features])
            return {"loss": loss, "metrics": metrics}
        if "gradient" in target:
            loss = (features * target["gradient"]).sum() * target["num_micro_batches"]
        else:
            loss = self._loss([*target["features"], features])[0] * target["num_micro_batches"]
        return {"loss": loss, "metrics": target["metrics"]}

    def _loss(self, features: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of this rank's anchors from k features of [2m, d] each, and what is logged about it."""
        first, second = zip(*(x.chunk(2) for x in features), strict=True)
        embeddings = self.head(torch.cat([*first, *second]))  # [2km, out]
        loss, accuracy, std = nt_xent(embeddings, temperature=self.settings.temperature, world=self.world)
        value = loss.detach()
        negatives = torch.full_like(value, len(embeddings) * self.world.size - 2)
        metrics = {"accuracy": accuracy, "embedding_std": std, "negatives": negatives}
        return loss, {"loss": value, "loss/ntxent": value, **metrics}

    def advice(
        self, *, num_samples: int | None, global_batch_size: int, steps: Callable[[str], int], optim: Any
    ) -> list[str]:
        """See `Method.advice`."""
        return list(health.advice(self.settings, num_samples=num_samples, global_batch_size=global_batch_size))

    def symptoms(self, row: Mapping[str, float]) -> dict[str, str]:
        """See `Method.symptoms`."""
        return dict(health.symptoms(self.settings, row))

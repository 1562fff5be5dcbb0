"""Supervised training as timm's script (train.py of pytorch-image-models) does it: what ours is measured against.

Written from timm's public API, not copied: timm's model, its loader's way to normalise images and to erase rectangles
on the device, its Mixup, its losses, its average of weights, torch's optimiser as timm makes it, clipping over the
whole model, and a look at the loss every 50 steps. The timed step mixes and normalises by timm's code, whose random
numbers are not ours. `strategy.compile` compiles the model as a whole, as the script's --torchcompile does.

Shapes: m images, c classes.
"""

from __future__ import annotations

import torch
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from scaler.bench.references.base import (
    At,
    Reference,
    make_optimizer,
    named_as_ours,
    nothing,
    our_groups,
    plain_backbone,
)
from scaler.collectives import World
from scaler.methods.base import Batch, Hyper
from scaler.methods.supervised.augment import VIEW
from scaler.methods.supervised.method import Supervised
from scaler.methods.supervised.mixing import make_mixup
from scaler.recipe import Recipe
from scaler.train import build_method


class SupervisedReference(Reference):
    """The contender; `parameters` are its own by the names that ours have."""

    optimizers = frozenset({"adamw", "sgd"})
    compiles = True
    looks_every = 50

    def __init__(self, recipe: Recipe, *, precision: str, device: torch.device, compiled: bool = False) -> None:
        super().__init__(recipe, precision=precision, device=device, compiled=compiled)
        ours = build_method(recipe, world=World())
        assert isinstance(ours, Supervised)
        s = self.settings
        model = plain_backbone(ours.backbone, s, image_size=recipe.data.image_size, drop_path=s.drop_path)
        self.parameters = named_as_ours(ours.backbone, model)
        model.reset_classifier(s.num_classes)
        classifier = model.get_classifier()
        classifier.load_state_dict(ours.head.state_dict())
        self.parameters |= {f"head.{name}": p for name, p in classifier.named_parameters()}
        self.model = self.ready(model)
        self.run = torch.compile(self.model) if self.compiled else self.model
        mean, std = ours.normalization
        self.mean, self.std = (255 * torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (mean, std))
        self.erase = RandomErasing(s.erase_probability, mode="const", device=device) if s.erase_probability else None
        self.mixup = make_mixup(s, label_smoothing=s.label_smoothing)
        self.criterion: nn.Module = SoftTargetCrossEntropy() if s.mixes else _of_labels(s.label_smoothing)
        self.ema = ModelEmaV3(self.model, decay=s.ema) if s.ema is not None else None
        groups = our_groups(ours, recipe.optim, self.parameters)
        self.optimizer = make_optimizer(recipe.optim, groups, one_by_one=False)

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, bool]:
        """See `Reference.refused`; colours are jittered in the workers of timm's loader, which is not timed."""
        s = recipe.method
        return {
            "with method.freeze_backbone": s.freeze_backbone,
            "with method.color_jitter, hue or grayscale_probability": any(
                (s.color_jitter, s.hue, s.grayscale_probability)
            ),
        }

    @property
    def made_of(self) -> str:
        """See `Reference.made_of`."""
        compiled = ", compiled as a whole" if self.compiled else ""
        return f"timm's training script: its {self.settings.backbone}{compiled}, normalisation, mixing and losses"

    def prepare(self, raw: Batch) -> Batch:
        """`images` [m, 3, h, w], and `targets`: labels int64 [m], or of mixed images smoothed ones [m, c]."""
        images = raw["views"][VIEW][0].float().sub_(self.mean).div_(self.std)
        targets = raw["labels"].to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return {"images": self.images(images), "targets": targets}

    def loss(self, batch: Batch, *, hyper: Hyper, at: At = nothing) -> Tensor:
        """See `Reference.loss` and `prepare`."""
        with self.autocast():
            at("forward")
            scores = self.run(batch["images"])
            at("learn")
            loss: Tensor = self.criterion(scores, batch["targets"])
        return loss

    def clip(self, parameters: object) -> None:
        """See `Reference.clip`; by timm."""
        assert self.clip_norm is not None
        dispatch_clip_grad(self.model.parameters(), value=self.clip_norm, mode="norm")

    def average(self, hyper: Hyper) -> None:
        """See `Reference.average`."""
        if self.ema is not None:
            self.ema.update(self.model, step=self.number)


def _of_labels(smoothing: float) -> nn.Module:
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()

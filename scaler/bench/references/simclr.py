"""SimCLR's step as one writes it first: what ours is measured against, and checked by.

timm's model on both views in one batch, a head of torch's own linear layers and batch norms, lightly's NT-Xent (where
it is not installed, all similarities in one matrix), the optimiser parameter by parameter, and a look at the loss in
every step. Weights, views and schedules are those of the recipe; `strategy.compile` compiles the backbone as a whole.
There is none with LARS: torch has none, and lightly's divides by another norm than ours (`scaler.optimizers.LARS`).

Shapes: m images, d channels.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
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
from scaler.methods.simclr.method import SimCLR
from scaler.nn.batch_norm import GlobalBatchNorm
from scaler.recipe import Recipe
from scaler.train import build_method


class SimCLRReference(Reference):
    """The contender; `parameters` are its own by the names that ours have."""

    optimizers = frozenset({"adamw", "sgd"})
    compiles = True

    def __init__(self, recipe: Recipe, *, precision: str, device: torch.device, compiled: bool = False) -> None:
        super().__init__(recipe, precision=precision, device=device, compiled=compiled)
        ours = build_method(recipe, world=World())
        assert isinstance(ours, SimCLR)
        s = self.settings
        backbone = plain_backbone(ours.backbone, s, image_size=recipe.data.image_size, drop_path=s.drop_path)
        self.backbone, self.head = self.ready(backbone), plain_head(ours.head.layers).to(device)
        self.parameters = named_as_ours(ours.backbone, self.backbone)
        self.parameters |= {f"head.layers.{name}": p for name, p in self.head.named_parameters()}
        self.embed = torch.compile(self.backbone) if self.compiled else self.backbone
        self.lightly = importlib.util.find_spec("lightly") is not None
        self.contrast: Any = (
            importlib.import_module("lightly.loss").NTXentLoss(s.temperature) if self.lightly else self._plain_loss
        )
        groups = our_groups(ours, recipe.optim, self.parameters)
        self.optimizer = make_optimizer(recipe.optim, groups, one_by_one=True)

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, bool]:
        """See `Reference.refused`."""
        return {"with method.ema": recipe.method.ema is not None}

    @property
    def made_of(self) -> str:
        """See `Reference.made_of`."""
        loss = "lightly's NTXentLoss" if self.lightly else "all similarities in one matrix"
        compiled = ", compiled" if self.compiled else ""
        return f"timm's {self.settings.backbone}{compiled}, {loss}, the optimiser parameter by parameter"

    def loss(self, batch: Batch, *, hyper: Hyper, at: At = nothing) -> Tensor:
        """See `Reference.loss`; the batch has `images` [2m, 3, h, w], first views then second."""
        with self.autocast():
            at("forward")
            features = self.embed(self.images(batch["images"]))
            at("learn")
            first, second = self.head(features).chunk(2)
            loss: Tensor = self.contrast(first, second)
        return loss

    def _plain_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent (arXiv 2002.05709) of embeddings [m, d] of either view, with all 2m · 2m similarities in memory."""
        z = F.normalize(torch.cat([first, second]), dim=1)
        scores = (z @ z.T / self.settings.temperature).fill_diagonal_(-torch.inf)
        positives = torch.arange(len(z), device=z.device).roll(len(first))
        return F.cross_entropy(scores, positives)


def plain_head(layers: nn.Sequential) -> nn.Sequential:
    """A projection head of ours by torch's modules, with the same weights under the same names.

    A norm that has no bias gets one of zeros, which is not trained.
    """
    plain: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            plain.append(nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
        elif isinstance(layer, GlobalBatchNorm):
            norm = nn.BatchNorm1d(layer.num_features, eps=layer.eps, momentum=layer.momentum)
            norm.bias.requires_grad_(layer.bias is not None)
            plain.append(norm)
        else:
            plain.append(nn.ReLU(inplace=True))
    head = nn.Sequential(*plain)
    lacking = head.load_state_dict(layers.state_dict(), strict=False)
    assert not lacking.unexpected_keys and all(key.endswith(".bias") for key in lacking.missing_keys)
    return head

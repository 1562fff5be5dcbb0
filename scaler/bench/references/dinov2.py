"""DINOv2's step as one writes it first, from the paper's formulas: what ours is measured against, and checked by.

timm's own ViT on one crop size after the other, every row's score against every prototype in memory for student and
teacher, Sinkhorn-Knopp (or the softmax) on that whole matrix, a loop over all pairs of crops, AdamW parameter by
parameter, the teacher's average in a Python loop, and a look at the loss and the norm in every step. Weights, views,
masks, groups of parameters and schedules are those of the recipe; drop path is timm's, which computes every row.

Shapes: m images, L local crops, T masked tokens, p patches, d features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaler.bench.references.base import At, Reference, make_optimizer, nothing, plain_backbone
from scaler.collectives import World
from scaler.methods.base import Batch, Hyper
from scaler.methods.dinov2.method import DINOv2
from scaler.methods.dinov2.network import Network, parameter_groups
from scaler.recipe import Recipe
from scaler.train import build_method


class DINOv2Reference(Reference):
    """The contender; `student` and `teacher` have our names of parameters."""

    def __init__(self, recipe: Recipe, *, precision: str, device: torch.device, compiled: bool = False) -> None:
        super().__init__(recipe, precision=precision, device=device, compiled=compiled)
        method = build_method(recipe, world=World())
        assert isinstance(method, DINOv2)
        self.student = plain_network(method.student, recipe, drop_path=self.settings.drop_path).to(device)
        self.teacher = plain_network(method.teacher, recipe, drop_path=0.0).to(device)
        self.teacher.requires_grad_(False).eval()
        self.centers = [torch.zeros(self.settings.num_prototypes, device=device) for _ in range(2)]
        groups = parameter_groups(
            self.student,
            prefix="student.",
            layer_decay=recipe.optim.layer_decay,
            patch_embed_lr_scale=recipe.optim.patch_embed_lr_scale,
        )
        self.optimizer = make_optimizer(recipe.optim, groups, one_by_one=True)

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, bool]:
        """See `Reference.refused`."""
        return {"with method.gram_weight": bool(recipe.method.gram_weight)}

    @property
    def made_of(self) -> str:
        """See `Reference.made_of`."""
        return f"timm's {self.settings.backbone}, all scores in memory, the optimiser parameter by parameter"

    def clipped(self) -> Iterable[Iterable[Tensor]]:
        """See `Reference.clipped`: module by module."""
        return [module.parameters() for module in self.student.children()]

    def clip(self, parameters: Iterable[Tensor]) -> None:
        """See `Reference.clip`: parameter by parameter, with a look at the norm."""
        assert self.clip_norm is not None
        float(nn.utils.clip_grad_norm_(parameters, self.clip_norm, foreach=False))

    def average(self, hyper: Hyper) -> None:
        """See `Reference.average`: the teacher follows."""
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(hyper["momentum"]).add_(theirs, alpha=1 - hyper["momentum"])

    def loss(self, batch: Batch, *, hyper: Hyper, at: At = nothing) -> Tensor:
        """See `Reference.loss`."""
        s, crops, temperature = self.settings, batch["crops"], hyper["teacher_temperature"]
        m = len(crops[0]) // 2
        with self.autocast():
            at("observe")
            with torch.no_grad():
                cls, patches = self._tokens(self.teacher, crops[0], None)
                masked = patches.flatten(0, 1)[batch["masked"]]
                scores = [self.teacher.dino_head(cls), self._patch_head(self.teacher)(masked)]
            at("combine")
            teacher, teacher_masked = (
                self._targets(x.float(), center, temperature) for x, center in zip(scores, self.centers, strict=True)
            )
            del scores
            at("forward")
            masks: list[Tensor | None] = [batch["masks"], *[None] * (len(crops) - 1)]
            tokens = [self._tokens(self.student, x, mask) for x, mask in zip(crops, masks, strict=True)]
            at("learn")
            features, patches = tokens[0]
            student = self.student.dino_head(torch.cat([cls for cls, _ in tokens])).float() / s.student_temperature
            student_masked = self._patch_head(self.student)(patches.flatten(0, 1)[batch["masked"]]).float()
            student_masked = student_masked / s.student_temperature
        pairs = []
        for view, scores in enumerate(student.split(m)):
            log_p = F.log_softmax(scores, dim=-1)
            pairs += [-(q * log_p).sum(dim=-1).mean() for other, q in enumerate(teacher.split(m)) if other != view]
        dino = torch.stack(pairs).mean()
        ibot = -(teacher_masked * F.log_softmax(student_masked, dim=-1)).sum(dim=-1)
        ibot = (ibot * batch["mask_weights"]).sum() / (2 * m)
        koleo = torch.stack([_koleo(crop.float(), s.group_size) for crop in features.split(m)]).sum()
        return s.dino_weight * dino + s.ibot_weight * ibot + s.koleo_weight * koleo

    def _tokens(self, network: Any, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class tokens [n, d] and patches [n, p, d], by timm's own forward."""
        network.mask = mask
        tokens = network.backbone.forward_features(images)
        return tokens[:, 0], tokens[:, network.backbone.num_prefix_tokens :]

    def _patch_head(self, network: Any) -> nn.Module:
        head: nn.Module = network.dino_head if network.ibot_head is None else network.ibot_head
        return head

    @torch.no_grad()
    def _targets(self, scores: Tensor, center: Tensor, temperature: float) -> Tensor:
        """Probabilities [n, K] from the teacher's scores."""
        if self.settings.centering == "sinkhorn":
            return sinkhorn(scores, temperature=temperature)
        targets = ((scores - center) / temperature).softmax(dim=-1)
        if len(scores):
            center.lerp_(scores.mean(dim=0), 1 - self.settings.center_momentum)
        return targets


class _Plain(nn.Module):
    """A `Network` with timm's ViT for a backbone; `mask`, bool [n, p], is that of the next images."""

    def __init__(self, network: Network, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, network.dino_head, network.ibot_head
        self.mask: Tensor | None = None
        backbone.patch_embed.register_forward_hook(self._masked)

    def _masked(self, module: nn.Module, arguments: Any, patches: Tensor) -> Tensor:
        """Masked patches [n, h', w', d] become the mask token, before positions are added."""
        if self.mask is None:
            return patches
        mask = self.mask.view(*patches.shape[:3], 1)
        return torch.where(mask, self.backbone.mask_token.to(patches.dtype), patches)


def plain_network(network: Network, recipe: Recipe, *, drop_path: float) -> Any:
    """A network of ours on timm's ViT instead of the packed one, with the same weights under the same names."""
    size = recipe.data.image_size
    backbone = plain_backbone(network.backbone, recipe.method, image_size=size, drop_path=drop_path)
    return _Plain(network, backbone)


def sinkhorn(scores: Tensor, *, temperature: float, num_iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp (SwAV, arXiv 2006.09882) on all scores [n, K] of one process: probabilities [n, K]."""
    if not len(scores):
        return scores
    q = (scores / temperature - (scores / temperature).max()).exp()
    q /= q.sum()
    for _ in range(num_iterations):
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def _koleo(features: Tensor, group_size: int) -> Tensor:
    """The mean over groups of KoLeo (arXiv 1806.03198): minus the mean log distance to the nearest neighbour."""
    losses = []
    for group in features.split(group_size):
        x = F.normalize(group, dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        losses.append(-(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean())
    return torch.stack(losses).mean()

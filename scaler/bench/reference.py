"""DINOv2's step as one writes it first, from the paper's formulas: what ours is measured against, and checked by.

timm's own ViT on one crop size after the other, every row's score against every prototype in memory for student and
teacher, Sinkhorn-Knopp (or the softmax) on that whole matrix, a loop over all pairs of crops, AdamW parameter by
parameter, the teacher's average in a Python loop, and a look at the loss and the norm in every step. Weights, views,
masks, groups of parameters and schedules are those of the recipe; drop path is timm's, which computes every row.

Shapes: m images, L local crops, T masked tokens, p patches, d features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Method
from scaler.methods.dinov2.method import DINOv2
from scaler.methods.dinov2.network import Network, parameter_groups
from scaler.optimizers import set_hyper
from scaler.plan.trace import NUM_SAMPLES, meta_method
from scaler.recipe import Recipe
from scaler.strategies.base import DTYPES
from scaler.timetable import Timetable
from scaler.train import build_method


def why_no_reference(recipe: Recipe, *, ranks: int, num_micro_batches: int, precision: str) -> str | None:
    """What of a recipe the reference has not been written for; None: it can run."""
    if recipe.method.name != "dinov2":
        return f"there is none of {recipe.method.name}"
    reasons = {
        "with method.gram_weight": bool(recipe.method.gram_weight),
        f"with optim.name={recipe.optim.name}": recipe.optim.name != "adamw",
        f"in {precision}": precision == "fp16",
        f"on {ranks} ranks": ranks > 1,
        "with accumulation": num_micro_batches > 1,
    }
    without = [reason for reason, applies in reasons.items() if applies]
    return f"it does not run {' or '.join(without)}" if without else None


class Reference:
    """The contender; it starts from the same weights as ours."""

    def __init__(self, recipe: Recipe, *, precision: str, device: torch.device) -> None:
        self.settings, self.device, self.dtype = recipe.method, device, DTYPES[precision]
        self.seed, self.clip_norm = recipe.run.seed, recipe.optim.clip_norm
        method = build_method(recipe, world=World())
        assert isinstance(method, DINOv2)
        self.student = plain_network(method.student, recipe, drop_path=self.settings.drop_path).to(device)
        self.teacher = plain_network(method.teacher, recipe, drop_path=0.0).to(device)
        self.teacher.requires_grad_(False).eval()
        self.centers = [torch.zeros(self.settings.num_prototypes, device=device) for _ in range(2)]
        self.method: Method = meta_method(recipe, world=World())  # for augmentations and schedules
        self.timetable, self.number = Timetable(recipe, num_samples=NUM_SAMPLES), 0
        groups = parameter_groups(
            self.student,
            prefix="student.",
            layer_decay=recipe.optim.layer_decay,
            patch_embed_lr_scale=recipe.optim.patch_embed_lr_scale,
        )
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps, foreach=False, fused=False
        )

    def step(self, batches: Iterator[list[Batch]], at: Callable[[str], None]) -> None:
        """One step of training on the next batch."""
        at("data")
        (raw,) = next(batches)
        at("augment")
        batch = self.method.augment(raw, seed=self.seed, step=self.number)
        hyper = self.timetable.hyper(self.method, self.number)
        set_hyper(self.optimizer, hyper)
        loss = self.loss(batch, temperature=hyper["teacher_temperature"], at=at)
        at("backward")
        loss.backward()
        at("update")
        if self.clip_norm is not None:
            for module in self.student.children():
                float(nn.utils.clip_grad_norm_(module.parameters(), self.clip_norm, foreach=False))
        self.optimizer.step()
        self.optimizer.zero_grad()
        float(loss.detach())
        at("average")
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(hyper["momentum"]).add_(theirs, alpha=1 - hyper["momentum"])
        self.number += 1
        at("end")

    def loss(self, batch: Batch, *, temperature: float, at: Callable[[str], None] = lambda part: None) -> Tensor:
        """The loss of an augmented batch, [], with everything that its gradient needs."""
        s, crops = self.settings, batch["crops"]
        m = len(crops[0]) // 2
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
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
    s = recipe.method
    options: dict[str, Any] = {
        "img_size": recipe.data.image_size,
        "init_values": s.layer_scale,
        "patch_size": s.patch_size,
        "depth": s.depth,
        "embed_dim": s.embed_dim,
        "num_heads": s.num_heads,
        **({"reg_tokens": s.registers, "no_embed_class": True} if s.registers else {}),
    }
    options = {key: value for key, value in options.items() if value is not None}
    backbone: Any = timm.create_model(s.backbone, num_classes=0, dynamic_img_size=True, **options)
    for block in backbone.blocks if drop_path else ():
        block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
    backbone.load_state_dict(network.backbone.state_dict())
    return _Plain(network, backbone)


def separate_(method: Any) -> None:
    """Let the student of ours run one pass for each crop size, as the reference does, instead of one for all."""
    backbone = method.student.backbone
    packed = backbone.forward

    def forward(crops: Any, *, masks: Any = None, keep: Any = None) -> Any:
        masks = masks or [None] * len(crops)
        keep = keep or [None] * len(crops)
        return [
            packed([x], masks=[mask], keep=None if rows is None else [rows])[0]
            for x, mask, rows in zip(crops, masks, keep, strict=True)
        ]

    backbone.forward = forward


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

"""DINOv2 (Oquab et al., arXiv 2304.07193): a student learns from its own moving average.

Of every micro-batch the teacher's bottlenecks are *observed*; *combined* over all micro-batches and ranks they give one
shift per prototype (Sinkhorn-Knopp, or a moving centre), which turns the teacher's scores into targets; the student
*learns* from these by the DINO loss (class tokens across crops), iBOT (masked patches) and KoLeo (spread features).

Shapes: m images, L local crops, T masked tokens, d features, b bottleneck, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaler.collectives import World
from scaler.methods.base import Batch, Hyper, Lerp, Method, ReadWeights, Shown
from scaler.methods.dinov2 import augment, health, loss
from scaler.methods.dinov2.gram import gram_loss, to_grid
from scaler.methods.dinov2.network import Network, parameter_groups
from scaler.methods.dinov2.prototypes import CrossEntropy, Teacher, cross_entropy
from scaler.methods.dinov2.settings import Settings as DINOv2Settings
from scaler.methods.dinov2.sinkhorn import sinkhorn_log_scaling
from scaler.methods.dinov2.weights import load_centers_, load_heads_
from scaler.nn.backbones import check_image_size
from scaler.nn.precision import at_least_fp32, full_precision
from scaler.nn.vit import PackedViT
from scaler.nn.weights import Weights, load_backbone_
from scaler.schedules import cosine, linear
from scaler.transfer import send, send_together
from shards.decode import View


@dataclass(frozen=True)
class Observation:
    """The teacher's bottlenecks of a micro-batch, at least fp32: class tokens [2m, b] and masked tokens [T, b]."""

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Target:
    """Teacher probabilities in compact form: softmax(bottlenecks · prototypes / temperature + shift), of class tokens
    and of masked ones. Prototypes [K, b] and shifts [K] are those of all micro-batches.
    """

    observation: Observation
    cls_prototypes: Tensor
    patch_prototypes: Tensor
    cls_shift: Tensor
    patch_shift: Tensor


class DINOv2(Method):
    """Student, teacher, and the losses between them; see the module's docstring.

    Attributes:
        tile_elements: most prototype scores in memory at a time; None: as suits the device (`default_tile_elements`).
        fused: whether the passes over them are compiled.
    """

    Settings = DINOv2Settings
    tile_elements: int | None = None
    fused: bool = False

    def __init__(self, settings: DINOv2Settings, *, image_size: int, world: World) -> None:
        super().__init__(settings, image_size=image_size, world=world)
        self.student = Network(settings, image_size=image_size)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.gram_teacher = copy.deepcopy(self.teacher.backbone) if settings.gram_weight else None
        backbone = self.student.backbone
        if settings.num_local_crops and settings.local_size % backbone.patch_size:
            raise ValueError(
                f"method.local_size {settings.local_size} is not a multiple of the patch size {backbone.patch_size};"
                f" take {settings.local_size // backbone.patch_size * backbone.patch_size or backbone.patch_size}"
            )
        self.num_blocks = len(backbone.blocks)
        self.colors = augment.make_colors(settings)
        if settings.centering == "softmax":
            self.register_buffer("cls_center", torch.zeros(settings.num_prototypes))
            self.register_buffer("patch_center", torch.zeros(settings.num_prototypes))

    def views_at(self, image_size: int) -> tuple[View, ...]:
        """See `Method.views_at`; local crops keep their share of the global ones' size, in whole patches."""
        s, patch = self.settings, self.student.backbone.patch_size
        check_image_size(image_size, patch_size=patch, name=s.backbone)
        local = max(1, round(s.local_size * image_size / self.image_size / patch)) * patch
        return augment.make_views(s, image_size=image_size, local_size=local)

    def load_weights(self, read: ReadWeights) -> list[str]:
        """See `Method.load_weights`: student and teacher start alike, from the source's teacher where it has one."""
        s = self.settings
        lines = [] if s.weights is None else self._load_networks(read(s.weights, backbone=s.backbone))
        if self.gram_teacher is None:
            return lines
        if s.gram_teacher == "self":
            self.gram_teacher.load_state_dict(self.teacher.backbone.state_dict())
            return lines
        weights = read(s.gram_teacher, backbone=s.backbone)
        loaded = load_backbone_(
            self.gram_teacher, weights, normalization=self.normalization, what="method.gram_teacher"
        )
        return [*lines, loaded.line]

    def _load_networks(self, weights: Weights) -> list[str]:
        s = self.settings
        loaded = load_backbone_(self.student.backbone, weights, normalization=self.normalization)
        fits, line = load_heads_(self.student, weights, backbone_prefix=loaded.prefix)
        lines = [loaded.line, line]
        if fits and s.centering == "softmax":
            centers = {kind: self.get_buffer(f"{kind}_center") for kind in ("cls", "patch")}
            lines.append(load_centers_(centers, weights))
        self.teacher.load_state_dict(self.student.state_dict())
        return lines

    def train(self, mode: bool = True) -> DINOv2:
        """Training mode for the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    def check_layout(self, *, num_micro_batches: int, micro_batch_size: int) -> None:
        """See `Method.check_layout`."""
        size = self.settings.group_size
        if micro_batch_size % size:
            raise ValueError(
                f"a micro-batch of {micro_batch_size} images does not hold whole groups of method.group_size {size}, in"
                f" which KoLeo and drop path work; take micro-batches that are multiples of {size}, or a group_size"
                f" that divides {micro_batch_size} (which changes the training)"
            )

    # ------------------------------------------------------------------ data

    def augment(self, batch: Batch, *, seed: int, step: int) -> Batch:
        """See `Method.augment`.

        Returns:
            `crops` [2m, 3, S, S] and [L·m, 3, s, s] in `image_dtype`, `keep` rows for drop path or None, `masks` bool
            [2m, p], `masked` int64 [T], `mask_weights` float32 [T], and with a gram teacher its pixels `gram` uint8
            [2m, 3, f·S, f·S]; all on the device of the views.
        """
        (mean, std), patch = self.normalization, self.student.backbone.patch_size
        crops = augment.color_crops(batch, self.colors, seed=seed, mean=mean, std=std, dtype=self.image_dtype)
        masks = augment.mask_tensors(
            batch["positions"],
            self.settings,
            global_batch_size=batch["global_batch_size"],
            grid=(crops[0].shape[-2] // patch, crops[0].shape[-1] // patch),
            seed=seed,
            step=step,
        )
        keep = augment.drop_path_rows(
            batch["positions"], self.settings, num_blocks=self.num_blocks, seed=seed, step=step
        )
        sent = send_together([*masks.values(), *(keep or ())], crops[0].device)
        return {
            "crops": crops,
            "keep": None if keep is None else sent[len(masks) :],
            **dict(zip(masks, sent, strict=False)),
            **({} if self.gram_teacher is None else {"gram": augment.gram_crops(batch)}),
        }

    def shown(self, batch: Batch, augmented: Batch) -> list[Shown]:
        """See `Method.shown`."""
        return augment.shown_crops(batch, augmented, self.colors)

    # ------------------------------------------------------------------ one step

    def observes(self, num_micro_batches: int) -> bool:
        """Always: the teacher's pass is the observation."""
        return True

    def observe(self, batch: Batch, hyper: Hyper) -> Observation:
        """See `Method.observe`: the teacher on the two global crops, unmasked."""
        out = self.teacher.backbone([batch["crops"][0]])[0]
        masked = out.patches.flatten(0, 1).index_select(0, batch["masked"])
        return Observation(
            cls=self.teacher.dino_head.bottleneck(out.cls), patches=self.teacher.patch_head.bottleneck(masked)
        )

    def combine(self, observations: list[Observation], hyper: Hyper) -> list[Target]:
        """See `Method.combine`: one shift per prototype and head, for the whole global batch."""
        teacher, temperature = self.teacher, hyper["teacher_temperature"]
        cls = teacher.dino_head.prototypes()
        patches = cls if teacher.ibot_head is None else teacher.ibot_head.prototypes()
        cls_shift = self._shift("cls", [o.cls for o in observations], cls, temperature)
        patch_shift = self._shift("patch", [o.patches for o in observations], patches, temperature)
        return [Target(observation, cls, patches, cls_shift, patch_shift) for observation in observations]

    def _shift(self, kind: str, bottlenecks: list[Tensor], prototypes: Tensor, temperature: float) -> Tensor:
        if self.settings.centering == "sinkhorn":
            return sinkhorn_log_scaling(
                bottlenecks,
                prototypes,
                temperature=temperature,
                world=self.world,
                tile_elements=self.tile_elements,
                fused=self.fused,
            )
        # The centre of earlier batches is applied, then moved. Scores are linear in the bottlenecks, so the mean score
        # of the global batch is the score of the mean bottleneck.
        center: Tensor = getattr(self, f"{kind}_center")
        shift = -center / temperature
        rows = torch.cat(bottlenecks)
        total = self.world.sum_(torch.cat([rows.sum(dim=0), rows.new_full((1,), float(len(rows)))]))
        with full_precision(total):
            mean = F.linear(total[:-1] / total[-1].clamp(min=1.0), prototypes)
        moved = center.lerp(mean.to(center.dtype), 1.0 - self.settings.center_momentum)
        usable = mean.isfinite().all() & (total[-1] > 0)  # a step that will not be taken must not spoil the centre
        center.copy_(torch.where(usable, moved, center))
        return shift

    def learn(self, batch: Batch, target: Target, hyper: Hyper) -> dict[str, Any]:
        """See `Method.learn`."""
        s, crops = self.settings, batch["crops"]
        anchor = self._anchor(batch, hyper)
        masks = [batch["masks"]] + [None] * (len(crops) - 1)
        outputs = self.student.backbone(crops, masks=masks, keep=batch["keep"] if self.training else None)
        masked = outputs[0].patches.flatten(0, 1).index_select(0, batch["masked"])
        cls = torch.cat([out.cls for out in outputs])
        if self.student.ibot_head is None:
            cls_z, patch_z = self.student.dino_head.bottleneck(torch.cat([cls, masked])).split([len(cls), len(masked)])
        else:
            cls_z, patch_z = self.student.dino_head.bottleneck(cls), self.student.ibot_head.bottleneck(masked)

        m = len(crops[0]) // 2
        total, dino, ibot = self._compare(cls_z.view(-1, m, cls_z.shape[-1]), patch_z, batch, target, hyper)
        groups = at_least_fp32(outputs[0].cls).view(2, -1, s.group_size, outputs[0].cls.shape[-1])
        koleo = loss.koleo_loss(groups).mean(dim=1).sum()  # mean over groups, sum over the two crops
        total = total + s.koleo_weight * koleo
        gram = torch.zeros_like(koleo) if anchor is None else gram_loss(outputs[0].patches, anchor)
        if anchor is not None:
            total = total + hyper["gram_weight"] * gram
        metrics = {
            "loss": total,
            "loss/dino": dino.loss,
            "loss/ibot": ibot.loss,
            "loss/koleo": koleo,
            "embedding_std": embedding_std(groups),
            "prototype_entropy": dino.entropy,
            "agreement": dino.agreement,
            **({} if self.gram_teacher is None else {"loss/gram": gram}),
        }
        return {"loss": total, "metrics": {name: value.detach() for name, value in metrics.items()}}

    def _compare(
        self, cls_z: Tensor, patch_z: Tensor, batch: Batch, target: Target, hyper: Hyper
    ) -> tuple[Tensor, CrossEntropy, CrossEntropy]:
        """DINO's and iBOT's weighted sum and each of them, from student bottlenecks [2 + L, m, b] and [T, b]."""
        s, temperature = self.settings, hyper["teacher_temperature"]
        cls, patches = target.observation.cls.unflatten(0, (2, -1)), target.observation.patches[None]
        dino = loss.dino(
            cls_z,
            Teacher(cls, target.cls_prototypes, target.cls_shift, temperature),
            scale=s.dino_weight,
        )
        ibot = loss.ibot(
            patch_z,
            Teacher(patches, target.patch_prototypes, target.patch_shift, temperature),
            weights=batch["mask_weights"],
            num_crops=len(batch["crops"][0]),
            scale=s.ibot_weight,
        )
        compare = partial(
            cross_entropy, temperature=s.student_temperature, tile_elements=self.tile_elements, fused=self.fused
        )
        if self.student.ibot_head is None:
            total, (of_cls, of_patches) = compare([dino, ibot], self.student.dino_head.prototypes())
            return total, of_cls, of_patches
        cls_total, (of_cls,) = compare([dino], self.student.dino_head.prototypes())
        patch_total, (of_patches,) = compare([ibot], self.student.ibot_head.prototypes())
        return cls_total + patch_total, of_cls, of_patches

    @torch.no_grad()
    def _anchor(self, batch: Batch, hyper: Hyper) -> Tensor | None:
        """The gram teacher's patch features on the student's grid, [2m, p, d]; None while there is no gram loss.

        It runs in every micro-batch's own pass: kept from the observing one, it would take memory for all of them.
        """
        if self.gram_teacher is None or not hyper["gram_weight"]:
            return None
        images, crops, patch = batch["gram"], batch["crops"][0], self.gram_teacher.patch_size
        wide = torch.promote_types(crops.dtype, torch.float32)
        mean, std = send(torch.tensor(self.normalization, dtype=wide), crops.device).view(2, 3, 1, 1)
        patches = self.gram_teacher([(images.to(wide) / 255 - mean) / std])[0].patches
        old, new = ((x.shape[-2] // patch, x.shape[-1] // patch) for x in (images, crops))
        return to_grid(patches, old=old, new=new)

    @torch.no_grad()
    def after_step(self, hyper: Hyper, lerp_: Lerp) -> None:
        """See `Method.after_step`: the teacher follows the student, and at times the gram teacher the teacher."""
        lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - hyper["momentum"])
        if self.gram_teacher is not None and hyper["gram_follows"]:
            lerp_(list(self.gram_teacher.parameters()), list(self.teacher.backbone.parameters()), 1.0)

    # ------------------------------------------------------------------ what the loop asks for

    def hyper(self, step: int, steps: Callable[[str], int]) -> Hyper:
        """See `Method.hyper`: `momentum`, `teacher_temperature`, `last_layer_lr_scale` (0 while frozen), and with a
        gram teacher `gram_weight` (0 before its start) and `gram_follows` (1 where it takes the teacher's weights).
        """
        s = self.settings
        gram: Hyper = {}
        if s.gram_weight:
            start, after = steps(s.gram_start), step + 1
            again = s.gram_refresh is not None and (after - start) % steps(s.gram_refresh) == 0
            # Until its start it follows all the time, so that a step that is not taken does not leave it behind.
            follows = s.gram_teacher == "self" and (after <= start or again)
            gram = {"gram_weight": s.gram_weight if step >= start else 0.0, "gram_follows": float(follows)}
        return {
            **gram,
            "momentum": cosine(step, total=steps("total"), start=s.momentum, end=s.momentum_end),
            "teacher_temperature": linear(
                step,
                length=steps(s.teacher_temperature_warmup),
                start=s.warmup_teacher_temperature,
                end=s.teacher_temperature,
            ),
            "last_layer_lr_scale": 0.0 if step < steps(s.freeze_last_layer) else 1.0,
        }

    def advice(
        self, *, num_samples: int | None, global_batch_size: int, steps: Callable[[str], int], optim: Any
    ) -> list[str]:
        """See `Method.advice`."""
        return list(
            health.advice(
                self.settings, num_samples=num_samples, global_batch_size=global_batch_size, steps=steps, optim=optim
            )
        )

    def symptoms(self, row: Mapping[str, float]) -> dict[str, str]:
        """See `Method.symptoms`."""
        return dict(health.symptoms(self.settings, row))

    def parameter_groups(self, optim: Any) -> list[dict[str, Any]]:
        """See `Method.parameter_groups`; layer decay and clip names are those of `network.parameter_groups`."""
        return parameter_groups(
            self.student,
            prefix="student.",
            layer_decay=optim.layer_decay,
            patch_embed_lr_scale=optim.patch_embed_lr_scale,
        )

    def blocks(self) -> list[nn.Module]:
        """See `Method.blocks`: the student's blocks, then the teachers'."""
        backbones = [self.student.backbone, self.teacher.backbone, self.gram_teacher]
        return [block for backbone in backbones if backbone is not None for block in backbone.blocks()]

    def compile_loss(self) -> None:
        """See `Method.compile_loss`."""
        self.fused = True

    def evaluated_backbone(self) -> PackedViT:
        """See `Method.evaluated_backbone`: the teacher's, whose feature is the class token after the final norm."""
        return self.teacher.backbone


def embedding_std(groups: Tensor) -> Tensor:
    """Spread of L2-normalised features [..., n, d] inside their groups: 1 when isotropic, 0 when collapsed."""
    x = F.normalize(groups.detach(), dim=-1)
    return x.std(dim=-2, unbiased=False).mean() * x.shape[-1] ** 0.5

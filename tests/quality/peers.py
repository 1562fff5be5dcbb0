"""What a plain loop with lightly's losses trains: one process, torchvision's transforms on PIL images, torch's AdamW.

Everything that the recipe says is the same: the backbone and its initial weights, views, colours, batch, steps,
learning rate, temperatures, weights of the losses, momentum. Everything that our side computes by itself is another's
here: the losses and their centring, the heads, the masks, the augmentation, the order of the images, the loop.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from lightly.models.modules.heads import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import random_block_mask
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from scaler.collectives import World
from scaler.methods.base import Method
from scaler.methods.dinov2.augment import make_colors
from scaler.methods.simclr.augment import VIEWS, make_color
from scaler.nn.base import Backbone
from scaler.nn.color import Color
from scaler.nn.init import init_linear_
from scaler.recipe import Recipe
from scaler.schedules import warmup_cosine
from scaler.train import build_method
from shards.decode import View


def train_peer(recipe: Recipe, images: Path, *, steps: int) -> Backbone:
    """The backbone whose features are evaluated, after `steps` steps on the PNG files below `images`."""
    torch.manual_seed(recipe.run.seed)
    random.seed(recipe.run.seed)
    method = build_method(recipe, world=World())
    loop = {"simclr": _simclr, "dinov2": _dinov2}[recipe.method.name]
    return loop(recipe, method, [Image.open(path).convert("RGB") for path in sorted(images.rglob("*.png"))], steps)


def _simclr(recipe: Recipe, method: Any, images: list[Image.Image], steps: int) -> Backbone:
    s, backbone = recipe.method, method.backbone
    head = SimCLRProjectionHead(
        backbone.num_features, s.head_hidden, s.head_out, num_layers=s.head_layers, batch_norm=s.head_batch_norm
    )
    criterion = NTXentLoss(temperature=s.temperature)
    optimizer = _optimizer(recipe, [backbone, head])
    colors = dict.fromkeys(VIEWS, make_color(s, image_size=recipe.data.image_size))
    for step, (first, second) in enumerate(_batches(recipe, method, colors, images, steps)):
        z0, z1 = (head(backbone([x])[0].cls) for x in (first[0], second[0]))
        _update(recipe, optimizer, criterion(z0, z1), step=step, steps=steps)
    return backbone


def _dinov2(recipe: Recipe, method: Any, images: list[Image.Image], steps: int) -> Backbone:
    s, backbone = recipe.method, method.student.backbone
    head, teacher_head = (
        DINOProjectionHead(
            backbone.num_features, s.head_hidden, s.head_bottleneck, s.num_prototypes, norm_last_layer=False
        )
        for _ in range(2)
    )
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            init_linear_(layer, weights=s.initial_weights)  # as the backbone's: 0.02 is for wide networks
    teacher = copy.deepcopy(backbone).requires_grad_(False)
    teacher_head.requires_grad_(False).load_state_dict(head.state_dict())
    dino = DINOLoss(s.num_prototypes, student_temp=s.student_temperature, center_momentum=s.center_momentum)
    ibot = IBOTPatchLoss(s.num_prototypes, student_temp=s.student_temperature, center_momentum=s.center_momentum)
    koleo = KoLeoLoss()
    optimizer = _optimizer(recipe, [backbone, head])
    grid = recipe.data.image_size // backbone.patch_size
    for step, (first, second, *local) in enumerate(_batches(recipe, method, make_colors(s), images, steps)):
        hyper = method.hyper(step, lambda text: steps if text == "total" else int(text.split()[0]))
        temperature = hyper["teacher_temperature"]
        crops = torch.cat([first[0], second[0]])
        with torch.no_grad():
            seen = teacher([crops])[0]
        mask = random_block_mask(
            (len(crops), grid, grid),
            batch_mask_ratio=s.mask_probability,
            min_image_mask_ratio=s.mask_ratio[0],
            max_image_mask_ratio=s.mask_ratio[1],
            min_num_masks_per_block=1,  # of a grid this small
        )
        outputs = backbone([crops, *(torch.cat(list(x)) for x in local)], masks=[mask.flatten(1), *[None] * len(local)])
        student = [part for out in outputs for part in head(out.cls).split(len(first[0]))]
        rows = mask.flatten(1)
        loss = (
            s.dino_weight * dino(list(teacher_head(seen.cls).chunk(2)), student, teacher_temp=temperature)
            + s.ibot_weight
            * ibot(teacher_head(seen.patches[rows]), head(outputs[0].patches[rows]), mask, teacher_temp=temperature)
            + s.koleo_weight * sum(koleo(part) for part in outputs[0].cls.chunk(2))
        )
        _update(recipe, optimizer, loss, step=step, steps=steps)
        with torch.no_grad():
            for ours, theirs in ((teacher, backbone), (teacher_head, head)):
                for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                    a.lerp_(b, 1 - hyper["momentum"])
    return teacher


def _batches(
    recipe: Recipe, method: Method, colors: dict[str, Color], images: list[Image.Image], steps: int
) -> Iterator[list[Tensor]]:
    """For every step its views, each [count, m, 3, size, size]; epochs are shuffled, short batches left out."""
    transforms = {view: _transform(view, colors[view.name], method) for view in method.views}
    size = recipe.data.global_batch_size
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(images)).tolist()
        batch, order = [images[i] for i in order[:size]], order[size:]
        yield [
            torch.stack([torch.stack([transform(image) for image in batch]) for _ in range(view.count)])
            for view, transform in transforms.items()
        ]


def _transform(view: View, color: Color, method: Method) -> v2.Transform:
    """One view of a PIL image, float32 [3, size, size]."""
    jitter = v2.ColorJitter(color.brightness, color.contrast, color.saturation, color.hue)
    blur = [v2.GaussianBlur(color.blur_kernel, color.blur_sigma)] if color.blur_kernel else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([jitter], color.jitter_p),
            v2.RandomGrayscale(color.grayscale_p),
            *([v2.RandomApply(blur, color.blur_p)] if blur else []),
            v2.RandomSolarize(color.solarize_threshold, color.solarize_p),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*method.normalization),
        ]
    )


def _optimizer(recipe: Recipe, modules: list[nn.Module]) -> torch.optim.Optimizer:
    """AdamW, without weight decay on biases and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=recipe.optim.betas, eps=recipe.optim.eps)


def _update(recipe: Recipe, optimizer: torch.optim.Optimizer, loss: Tensor, *, step: int, steps: int) -> None:
    warmup = int(recipe.schedule.warmup.split()[0])
    lr = warmup_cosine(step, total=steps, warmup=warmup, peak=recipe.optim.lr, end=recipe.schedule.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.optim.clip_norm:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.optim.clip_norm)
    optimizer.step()

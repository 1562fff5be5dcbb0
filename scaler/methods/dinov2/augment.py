"""DINOv2's views, and everything random that a step needs: colours, masks, and the rows that drop path keeps.

Two global crops are views of their own (`global_1`, `global_2`), since their colours differ; local crops are copies of
one view. Crop batches are crop-major: row = crop · m + image.

Shapes: m images, L local crops, p patches of a global crop, T masked tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaler.methods.base import Batch, Shown
from scaler.methods.dinov2.masks import batch_masks
from scaler.methods.dinov2.settings import Settings
from scaler.nn.color import Color, apply_color, concatenate, sample_color
from scaler.nn.drop_path import kept_rows
from shards.decode import View

# Probability of blur on the first global, the second global and the local crops. The released code hands the keeping
# probability where the dropping one belongs, which inverts it (facebookresearch/dinov3, pull request 342).
BLUR = {"paper": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5)}

GRAM = {"global_1": "gram_1", "global_2": "gram_2"}  # the same crops for the gram teacher, where it sees them larger


def make_views(settings: Settings, *, image_size: int, local_size: int | None = None) -> tuple[View, ...]:
    """What the loader cuts from every image; local crops have the settings' size unless another is given."""
    s = settings
    views = tuple(View(name, image_size, scale=s.global_scale, flip=s.flip) for name in ("global_1", "global_2"))
    if s.num_local_crops:
        views += (View("local", local_size or s.local_size, count=s.num_local_crops, scale=s.local_scale, flip=s.flip),)
    if s.gram_weight and s.gram_size_factor > 1:
        larger = s.gram_size_factor * image_size
        views += tuple(replace(view, name=GRAM[view.name], size=larger, drawn_as=view.name) for view in views[:2])
    return views


def make_colors(settings: Settings) -> dict[str, Color]:
    """The colour operations of each view."""
    s = settings
    common: dict[str, Any] = {
        "brightness": s.brightness,
        "contrast": s.contrast,
        "saturation": s.saturation,
        "hue": s.hue,
        "jitter_p": s.jitter_probability,
        "grayscale_p": s.grayscale_probability,
        "blur_kernel": s.blur_kernel,
        "blur_sigma": (0.1, 2.0),
    }
    first, second, local = BLUR[s.blur]
    return {
        "global_1": Color(**common, blur_p=first),
        "global_2": Color(**common, blur_p=second, solarize_p=s.solarize_probability, solarize_threshold=128),
        "local": Color(**common, blur_p=local),
    }


def color_crops(
    batch: Batch,
    colors: dict[str, Color],
    *,
    seed: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Coloured, normalised crops: [2m, 3, S, S] global ones and, where there are any, [L·m, 3, s, s] local ones."""
    crops = []
    for local in (False, True):
        views = [view for view in colors if (view == "local") == local and view in batch["views"]]
        if views:
            images = torch.cat([batch["views"][view].flatten(0, 1) for view in views])
            keys = {"seed": seed, "epochs": batch["epochs"], "ids": batch["ids"]}
            drawn = [sample_color(colors[v], **keys, view=v, copy=range(len(batch["views"][v]))) for v in views]
            crops.append(apply_color(images, concatenate(drawn), mean=mean, std=std, dtype=dtype))
    return crops


def shown_crops(batch: Batch, augmented: Batch, colors: dict[str, Color]) -> list[Shown]:
    """The crops of `color_crops` one by one, the global ones with their masks, and what the gram teacher sees."""
    m = len(batch["ids"])
    crops = {kind: part.split(m) for kind, part in zip(("global", "local"), augmented["crops"], strict=False)}
    size, num_patches = crops["global"][0].shape[-2:], augmented["masks"].shape[1]
    rows = round((num_patches * size[0] / size[1]) ** 0.5)
    masks = augmented["masks"].view(2, m, rows, -1)
    shown = [
        Shown(name, 0, images, colors[name], masks=mask)
        for name, images, mask in zip(GRAM, crops["global"], masks, strict=True)
    ]
    shown += [Shown("local", copy, images, colors["local"]) for copy, images in enumerate(crops.get("local", ()))]
    larger = [name for name in GRAM.values() if name in batch["views"]]
    return shown + [Shown(name, 0, batch["views"][name][0], Color()) for name in larger]


def gram_crops(batch: Batch) -> Tensor:
    """The global crops as the gram teacher sees them, before normalisation: uint8 [2m, 3, f·S, f·S], undistorted."""
    views = batch["views"]
    return torch.cat([views.get(larger, views[name])[0] for name, larger in GRAM.items()])


def mask_tensors(
    positions: Tensor, settings: Settings, *, global_batch_size: int, grid: tuple[int, int], seed: int, step: int
) -> dict[str, Tensor]:
    """Masks of the global crops and what the iBOT loss needs of them, on the CPU.

    Returns:
        `masks` bool [2m, p]; `masked` int64 [T], positions of the masked tokens among all 2m · p; `mask_weights`
        float32 [T], one over the number of masked tokens in the token's crop.
    """
    masks = torch.from_numpy(
        batch_masks(
            np.asarray(positions),
            global_batch_size=global_batch_size,
            grid=grid,
            ratio=settings.mask_ratio,
            probability=settings.mask_probability,
            seed=seed,
            step=step,
        )
    )
    masked = masks.flatten().nonzero().squeeze(1)
    counts = masks.sum(dim=1)
    return {"masks": masks, "masked": masked, "mask_weights": 1.0 / counts[masked // masks.shape[1]].float()}


def drop_path_rows(
    positions: Tensor, settings: Settings, *, num_blocks: int, seed: int, step: int
) -> list[Tensor] | None:
    """Kept rows of each crop batch (`Backbone.forward`'s `keep`), on the CPU; None without drop path."""
    if not settings.drop_path:
        return None
    return [
        kept_rows(
            np.asarray(positions),
            num_blocks=num_blocks,
            rate=settings.drop_path,
            group_size=settings.group_size,
            copies=copies,
            seed=seed,
            step=step,
            kind=kind,
        )
        for kind, copies in (("global", 2), ("local", settings.num_local_crops))
        if copies
    ]

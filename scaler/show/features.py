"""What a model makes of each part of an image: the principal components of its patch features as colours.

The picture of DINOv2 (Oquab et al., arXiv 2304.07193, figure 1). All images share the axes, so that equal colours are
equal features: parts of one kind have one colour in every image. Of a CNN it is the last feature map.

    feature_sheet(model, open_images("photos/val"), num=8).save("features.png")
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from scaler.evals.checkpoints import EvaluationModel
from scaler.evals.features import normalized
from scaler.show.pixels import load_images, spread, to_pixels
from scaler.show.projections import principal_components
from scaler.show.sheet import Cell, draw_sheet, to_image, zoomed
from shards.index import ShardIndex

_SIDE = 224  # pixels of a picture in the sheet
_TAILS = (0.01, 0.99)  # quantiles of a component that are its darkest and brightest colour


def feature_sheet(
    model: EvaluationModel, index: ShardIndex, *, num: int, foreground: bool = False, what: str = "model"
) -> Image.Image:
    """Images of `index`, evenly spread, each above its patch features in colours.

    Args:
        foreground: colour only the patches on one side of the first component's zero, by components of their own.
        what: the model's name, for the title.

    Raises:
        ValueError: a model whose features are not a square grid, or no image that can be decoded.
    """
    images = load_images(index, spread(index, num), image_size=model.image_size)
    maps = patch_features(model, images.pixels)
    colors = component_colors(maps, foreground=foreground)
    n, rows, columns, _ = maps.shape
    pixels = (colors * 255).round().to(torch.uint8).numpy()
    shown = to_pixels(images.pixels, normalization=model.method.normalization)
    pairs = [
        (
            Cell(zoomed(to_image(picture), size=model.image_size, side=_SIDE), [key]),
            Cell(to_image(map_).resize(_shape(to_image(picture), model.image_size), Image.Resampling.NEAREST)),
        )
        for picture, map_, key in zip(shown, pixels, images.keys, strict=True)
    ]
    per_row = min(n, 8)
    sheet = []
    for start in range(0, n, per_row):
        part = pairs[start : start + per_row]
        sheet += [[pair[0] for pair in part], [pair[1] for pair in part]]
    notes = [
        f"{rows} × {columns} patches of images of {model.image_size} pixels; equal colours are equal features, "
        "in all images",
        *(["black: background, by the sign of the first component"] if foreground else []),
    ]
    return draw_sheet(sheet, title=f"Patch features of {what}: their principal components as colours", notes=notes)


@torch.no_grad()
def patch_features(model: EvaluationModel, pixels: Tensor, *, batch_size: int = 8) -> Tensor:
    """Patch features float32 [n, h, w, d] of images uint8 [n, 3, s, s]: tokens after the final norm without class and
    register tokens, or the last feature map of a CNN; on the CPU.

    Raises:
        ValueError: features that are not a square grid.
    """
    backbone, parts = model.method.evaluated_backbone(), []
    for part in pixels.split(batch_size):
        patches = backbone([normalized(part.to(model.device), model.method.normalization)])[0].patches
        parts.append(patches.float().cpu())
    tokens = torch.cat(parts)
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"the model gives {tokens.shape[1]} features an image, which are no square grid to draw")
    return tokens.unflatten(1, (side, side))


def component_colors(features: Tensor, *, foreground: bool) -> Tensor:
    """Colours float [n, h, w, 3] from 0 to 1 of features [n, h, w, d]: their first three principal components, over all
    images, between the 1st and the 99th percentile.

    With `foreground`, patches on one side of the first component's zero are black, and the components are those of the
    others. The foreground is the side of which there is less along the images' borders.
    """
    shape, flat = features.shape[:-1], features.flatten(0, -2)
    kept = torch.ones(len(flat), dtype=torch.bool)
    if foreground:
        first = principal_components(flat, num=1)[:, 0]
        border = torch.ones(shape, dtype=torch.bool)
        border[:, 1:-1, 1:-1] = False
        positive = first > 0
        kept = positive if positive[border.flatten()].float().mean() <= 0.5 else ~positive
    components = principal_components(flat[kept], num=3)
    low, high = torch.quantile(components, torch.tensor(_TAILS, dtype=components.dtype), dim=0)
    span = (high - low).clamp(min=1e-12)
    colors = torch.zeros(len(flat), 3)
    colors[kept] = ((components - low) / span).clamp(0, 1).float()
    return colors.unflatten(0, shape)


def _shape(picture: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of a picture in the sheet."""
    shown = zoomed(picture, size=size, side=_SIDE)
    return shown.width, shown.height

"""Where a ViT looks: the attention of the class token in its last block, of each head and their mean.

Queries and keys are taken from the block itself while it runs. Of the weights, which add up to 1 over all tokens, those
on patches are drawn; what goes to the class token and the registers is said below the picture.

    attention_sheet(model, open_images("photos/val"), num=4).save("attention.png")
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaler.evals.checkpoints import EvaluationModel
from scaler.evals.features import normalized
from scaler.nn.vit import PackedViT
from scaler.show.pixels import load_images, spread, to_pixels
from scaler.show.sheet import Cell, draw_sheet, to_image, zoomed
from shards.index import ShardIndex

_SIDE = 160  # pixels of a picture in the sheet
_PER_LINE = 8  # maps side by side


def attention_sheet(model: EvaluationModel, index: ShardIndex, *, num: int, what: str = "model") -> Image.Image:
    """Images of `index`, evenly spread, each before the mean over the heads and all heads.

    Args:
        what: the model's name, for the title.

    Raises:
        ValueError: no plain ViT, or no image that can be decoded.
    """
    images = load_images(index, spread(index, num), image_size=model.image_size)
    weights = class_attention(model, images.pixels)
    vit = model.method.evaluated_backbone()
    assert isinstance(vit, PackedViT)  # or class_attention has refused it
    patches = weights[:, :, vit.num_prefix_tokens :]
    side = math.isqrt(patches.shape[-1])
    maps = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1).unflatten(-1, (side, side))
    names = ["mean", *(f"head {head + 1}" for head in range(weights.shape[1]))]
    sheet: list[list[Cell | None]] = []
    for picture, one, key in zip(to_pixels(images.pixels, normalization=((), ())), maps, images.keys, strict=True):
        shown = zoomed(to_image(picture), size=model.image_size, side=_SIDE)
        cells = [
            Cell(heat(map_).resize(shown.size, Image.Resampling.NEAREST), [name, f"{float(map_.sum()):.0%} on patches"])
            for map_, name in zip(one, names, strict=True)
        ]
        lines = [cells[start : start + _PER_LINE] for start in range(0, len(cells), _PER_LINE)]
        sheet += [[Cell(shown, [key]) if not number else None, *line] for number, line in enumerate(lines)]
    registers = vit.num_prefix_tokens - 1
    others = f"the class token itself and {registers} registers" if registers else "the class token itself"
    notes = [f"{side} × {side} patches, each map from 0 to its own maximum; the rest of the attention goes to {others}"]
    return draw_sheet(sheet, title=f"Attention of the class token in the last block of {what}", notes=notes)


@torch.no_grad()
def class_attention(model: EvaluationModel, pixels: Tensor, *, batch_size: int = 8) -> Tensor:
    """The class token's attention in the last block, float32 [n, heads, tokens], of images uint8 [n, 3, s, s]: over
    class token, registers and patches, in this order, adding up to 1; on the CPU.

    Raises:
        ValueError: no plain ViT.
    """
    vit = model.method.evaluated_backbone()
    if not isinstance(vit, PackedViT):
        raise ValueError("only plain ViTs have a class token whose attention can be drawn; try `scaler show features`")
    attention: Any = vit.blocks[-1].attn
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name, module in (("q", attention.q_norm), ("k", attention.k_norm))  # the identity in most models
    ]
    parts = []
    try:
        for part in pixels.split(batch_size):
            vit([normalized(part.to(model.device), model.method.normalization)])
            scores = found["q"][:, :, :1].float() @ found["k"].float().transpose(-2, -1)  # [n, heads, 1, tokens]
            parts.append((scores[:, :, 0] * attention.head_dim**-0.5).softmax(dim=-1).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


def heat(map_: Tensor) -> Image.Image:
    """A map [h, w] of numbers from 0 on as colours from dark to bright, RGB."""
    scaled = (map_ / map_.max().clamp(min=1e-12)).numpy()
    colors = matplotlib.colormaps["inferno"](scaled)[..., :3]
    return to_image((colors * 255).round().astype(np.uint8))

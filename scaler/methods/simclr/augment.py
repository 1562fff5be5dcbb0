"""The two views of SimCLR (arXiv 2002.05709, appendix A): what the loader cuts, and the colours on top."""

from __future__ import annotations

import torch
from torch import Tensor

from scaler.methods.base import Batch, Shown
from scaler.methods.simclr.settings import SimCLRSettings
from scaler.nn.color import Color, apply_color, concatenate, sample_color
from shards.decode import View

VIEWS = ("view_1", "view_2")


def make_views(settings: SimCLRSettings, *, image_size: int) -> tuple[View, ...]:
    """Two random resized crops of the whole image, drawn independently."""
    return tuple(View(name, image_size, scale=settings.crop_scale, flip=settings.flip) for name in VIEWS)


def make_color(settings: SimCLRSettings, *, image_size: int) -> Color:
    """Strengths and probabilities of the colour operations, the same for both views."""
    s = settings
    jitter = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    own = {name: value for name in jitter if (value := getattr(s, name)) is not None}
    kernel = s.blur_kernel
    if kernel == "auto":
        kernel = image_size // 10 // 2 * 2 + 1
        kernel = kernel if kernel > 1 else 0
    return Color(
        **{name: strength * s.color_strength for name, strength in jitter.items()} | own,
        jitter_p=s.jitter_probability,
        grayscale_p=s.grayscale_probability,
        blur_p=s.blur_probability,
        blur_kernel=kernel,
    )


def color_views(
    batch: Batch,
    settings: SimCLRSettings,
    *,
    seed: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Loader batch of m images → [2m, 3, size, size]: the first view of all images, then the second."""
    views, keys = batch["views"], {"seed": seed, "epochs": batch["epochs"], "ids": batch["ids"]}
    color = make_color(settings, image_size=views[VIEWS[0]].shape[-1])
    drawn = [sample_color(color, **keys, view=name, copy=0) for name in VIEWS]
    images = torch.cat([views[name][0] for name in VIEWS])
    return apply_color(images, concatenate(drawn), mean=mean, std=std, dtype=dtype, channels_last=channels_last)


def shown_views(batch: Batch, augmented: Batch, settings: SimCLRSettings) -> list[Shown]:
    """The two views of `color_views` one by one."""
    color = make_color(settings, image_size=batch["views"][VIEWS[0]].shape[-1])
    return [Shown(name, 0, images, color) for name, images in zip(VIEWS, augmented["images"].chunk(2), strict=True)]

"""Views by torchvision, and small helpers: the oracles of the decoding tests."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from shards.decode import View, decode_views
from shards.random import keyed_uniform

BIG = 10**9
CROP = View("crop", 64, count=2, scale=(0.3, 1.0))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def views_of(data: bytes, *views: View, seed: int = 0, epoch: int = 0, sample_id: int = 0) -> dict[str, torch.Tensor]:
    return decode_views(data, views=views, seed=seed, epoch=epoch, sample_id=sample_id, max_pixels=BIG)


def difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(mean, max) of |a - b| in grey levels."""
    delta = (a.float() - b.float()).abs()
    return float(delta.mean()), float(delta.max())


def box_oracle(view: View, width: int, height: int, numbers: list[float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, its random draws replaced by `numbers`: top, left, height, width."""
    log_ratio = [math.log(r) for r in view.ratio]
    for k in range(10):
        u = numbers[4 * k : 4 * k + 4]
        target_area = width * height * (view.scale[0] + u[0] * (view.scale[1] - view.scale[0]))
        aspect_ratio = math.exp(log_ratio[0] + u[1] * (log_ratio[1] - log_ratio[0]))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[2] * (height - h + 1)), math.floor(u[3] * (width - w + 1)), h, w
    in_ratio = width / height
    w, h = width, height
    if in_ratio < min(view.ratio):
        h = round(w / min(view.ratio))
    elif in_ratio > max(view.ratio):
        w = round(h * max(view.ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def views_oracle(
    pixels: np.ndarray, view: View, *, seed: int = 0, epoch: int = 0, sample_id: int = 0
) -> list[torch.Tensor]:
    """The views by torchvision's v2 `resized_crop` of the fully decoded picture (uint8 [h, w, 3])."""
    height, width, _ = pixels.shape
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    mode = InterpolationMode(view.interpolation)
    result = []
    for copy in range(view.count):
        numbers = keyed_uniform("crop", seed, epoch, sample_id, view.name, copy, count=41).tolist()
        top, left, h, w = box_oracle(view, width, height, numbers)
        out = tv.resized_crop(image, top, left, h, w, [view.size, view.size], interpolation=mode, antialias=True)
        result.append(tv.horizontal_flip(out) if numbers[40] < view.flip else out)
    return result


def full_decode(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))

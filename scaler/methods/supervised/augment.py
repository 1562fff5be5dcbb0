"""The view that a classifier is trained on: what the loader cuts, the colours on top, and labels that are checked."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from scaler.methods.base import Batch, Shown
from scaler.methods.supervised.boxes import inside, sides
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.color import Color, apply_color, sample_color
from scaler.transfer import send_together
from shards.decode import View
from shards.random import keyed_bits

VIEW = "image"


def make_views(settings: SupervisedSettings, *, image_size: int) -> tuple[View, ...]:
    """One random resized crop."""
    return (View(VIEW, image_size, scale=settings.crop_scale, flip=settings.flip),)


def make_color(settings: SupervisedSettings) -> Color:
    """The colour operations; none by default."""
    strength = settings.color_jitter
    return Color(
        brightness=strength,
        contrast=strength,
        saturation=strength,
        hue=settings.hue,
        jitter_p=1.0,
        grayscale_p=settings.grayscale_probability,
    )


def color_view(
    batch: Batch,
    color: Color,
    *,
    seed: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Loader batch of m images → coloured and normalised [m, 3, size, size]."""
    parameters = sample_color(color, seed=seed, epochs=batch["epochs"], ids=batch["ids"], view=VIEW, copy=0)
    images: Tensor = batch["views"][VIEW][0]
    return apply_color(images, parameters, mean=mean, std=std, dtype=dtype, channels_last=channels_last)


def shown_images(augmented: Batch, color: Color) -> list[Shown]:
    """The only view, with the classes that each image is to be taken for."""
    notes = []
    for target in augmented["targets"].cpu():
        if target.is_floating_point():
            shares = [(float(target[c]), c) for c in target.nonzero()[:, 0].tolist()]
            notes.append(" + ".join(f"{share:.2f} of class {c}" for share, c in sorted(shares, reverse=True)))
        else:
            notes.append(f"class {int(target)}")
    return [Shown(VIEW, 0, augmented["images"], color, notes=notes)]


def erase_(images: Tensor, batch: Batch, *, probability: float, seed: int) -> None:
    """Zero a rectangle of each of these images [m, 3, h, w], with this probability (Zhong et al., arXiv 1708.04896)."""
    height, width = images.shape[-2:]
    boxes = erased_boxes(batch, probability=probability, seed=seed, height=height, width=width)
    images.masked_fill_(inside(*send_together(sides(boxes, height=height, width=width), images.device)), 0.0)


def erased_boxes(batch: Batch, *, probability: float, seed: int, height: int, width: int) -> NDArray[np.int64]:
    """Top, bottom, left and right of the rectangles, int64 [m, 4]; zeros: none.

    They are those that timm's RandomErasing would draw from Python's generator, seeded for each sample.
    """
    timms = RandomErasing(probability, mode="const", device="cpu")
    assert timms.min_count == timms.max_count == 1
    boxes = np.zeros((len(batch["ids"]), 4), dtype=np.int64)
    for box, bits in zip(boxes, keyed_bits("erase", seed, batch["epochs"].numpy(), batch["ids"].numpy()), strict=True):
        draw = random.Random(int(bits))
        if draw.random() > timms.probability:
            continue
        for _ in range(10):
            area = draw.uniform(timms.min_area, timms.max_area) * (height * width)
            aspect = math.exp(draw.uniform(*timms.log_aspect_ratio))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = draw.randint(0, height - h), draw.randint(0, width - w)
                box[:] = top, top + h, left, left + w
                break
    return boxes


def check_labels(labels: Tensor, ids: Tensor, *, num_classes: int) -> None:
    """Refuse labels [m] (on the CPU) that are no class; on a GPU the loss would abort the process without a word.

    Raises:
        ValueError: names the first sample without a label, or with one beyond the last class.
    """
    wrong = torch.nonzero((labels < 0) | (labels >= num_classes)).flatten()
    if not len(wrong):
        return
    label, sample = int(labels[wrong[0]]), int(ids[wrong[0]])
    if label < 0:
        raise ValueError(
            f"sample {sample} has no label ({label}), and supervised training needs one in 0 … {num_classes - 1} for "
            "every image; convert from a folder of class folders, or train simclr or dinov2"
        )
    raise ValueError(
        f"sample {sample} has label {label}, but method.num_classes={num_classes} allows 0 … {num_classes - 1}; set "
        "method.num_classes to the number of classes in the shards"
    )

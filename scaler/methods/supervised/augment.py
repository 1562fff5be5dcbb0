"""The view that a classifier is trained on: what the loader cuts, the colours on top, and labels that are checked."""

from __future__ import annotations

import random

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from scaler.methods.base import Batch, Shown
from scaler.methods.supervised.settings import SupervisedSettings
from scaler.nn.color import Color, apply_color, sample_color
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


def color_view(batch: Batch, color: Color, *, seed: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Loader batch of m images → coloured and normalised float32 [m, 3, size, size]."""
    parameters = sample_color(color, seed=seed, epochs=batch["epochs"], ids=batch["ids"], view=VIEW, copy=0)
    return apply_color(batch["views"][VIEW][0], parameters, mean=mean, std=std)


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
    """Zero a rectangle of each of these images [m, 3, h, w], with this probability (Zhong et al., arXiv 1708.04896).

    By timm, whose draws come from Python's global generator, seeded for each sample meanwhile.
    """
    erasing = RandomErasing(probability, mode="const", device=images.device)
    before = random.getstate()
    for image, bits in zip(
        images, keyed_bits("erase", seed, batch["epochs"].numpy(), batch["ids"].numpy()), strict=True
    ):
        random.seed(int(bits))
        erasing(image)
    random.setstate(before)


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

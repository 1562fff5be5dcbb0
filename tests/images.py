"""Synthetic image folders for the tests: smooth "photographs" with grain, of varied sizes, made from a seed alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ENDINGS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def make_pixels(width: int, height: int, *, seed: int, label: int = -1) -> NDArray[np.uint8]:
    """A photo-like picture: uint8 [height, width, 3]. With a label, a faint tint tells the classes apart."""
    generator = np.random.default_rng([seed, label + 1])
    coarse = generator.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    smooth += generator.normal(0.0, 6.0, size=smooth.shape).astype(np.float32)
    if label >= 0:
        smooth += np.random.default_rng([991, label]).uniform(-60, 60, size=3).astype(np.float32)
    return smooth.clip(0, 255).astype(np.uint8)


def encode_image(pixels: NDArray[np.uint8], *, format: str = "jpeg", quality: int = 85) -> bytes:
    """The picture (uint8 [height, width, 3] or [height, width]) as the bytes of a `jpeg`, `png` or `webp` file."""
    stream = io.BytesIO()
    options = {} if format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(stream, format=format.upper(), **options)
    return stream.getvalue()


def make_image_folder(
    path: str | Path,
    *,
    num_images: int = 24,
    classes: int | Sequence[str] = 3,
    size: int = 48,
    format: str = "jpeg",
    seed: int = 0,
) -> list[Path]:
    """Write `num_images` pictures below `path` and return their paths, in the order they were made.

    Sides vary from 3/4 to 3/2 of `size` pixels. `classes` is the number of class folders (named class_0, …) or their
    names, the images going round them in turn; 0 or an empty list makes a flat folder. `format`: jpeg, png, webp or
    mixed (in turn).
    """
    path = Path(path)
    names = [f"class_{i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    formats = list(ENDINGS) if format == "mixed" else [format]
    generator = np.random.default_rng(seed)
    written = []
    for i in range(num_images):
        label = i % len(names) if names else -1
        folder = path / names[label] if names else path
        folder.mkdir(parents=True, exist_ok=True)
        width, height = generator.integers(max(1, size * 3 // 4), max(2, size * 3 // 2), size=2)
        kind = formats[i % len(formats)]
        file = folder / f"image_{i:05d}.{ENDINGS[kind]}"
        pixels = make_pixels(int(width), int(height), seed=seed * 1_000_003 + i, label=label)
        file.write_bytes(encode_image(pixels, format=kind))
        written.append(file)
    return written

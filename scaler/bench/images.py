"""Photo-like JPEG files made from a seed, for benchmarks on machines that have no data set at hand.

Photographs have a power spectrum of about 1/f² and edges, so a picture is noise with amplitudes of 1/f, a few shapes of
one colour with sharp borders, and fine grain. The grain is scaled until the file has the size that is asked for, since
a decoder's time goes with the bytes as much as with the pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_DISTINCT = 64  # pictures that differ; more files than that repeat them
_CLASSES = 10


def make_folder(
    path: Path, *, num_images: int, num_bytes: int, width: int, height: int, quality: int = 92, seed: int = 0
) -> None:
    """Write `num_images` JPEG files of `num_bytes` on average, 15 % more or less, into ten class folders below `path`;
    every fourth is upright."""
    files = []
    for i, share in enumerate(np.linspace(0.85, 1.15, min(num_images, _DISTINCT))):
        size = (height, width) if i % 4 == 3 else (width, height)
        files.append(photo(*size, num_bytes=round(share * num_bytes), quality=quality, seed=seed + i))
    for label in range(min(num_images, _CLASSES)):
        (path / f"class_{label}").mkdir(parents=True)
    for i in range(num_images):
        (path / f"class_{i % _CLASSES}" / f"{i:06d}.jpg").write_bytes(files[i % len(files)])


def photo(width: int, height: int, *, num_bytes: int, quality: int, seed: int) -> bytes:
    """One JPEG file within a few percent of `num_bytes`, as far as grain between none and a lot of it allows."""
    generator = np.random.default_rng(seed)
    smooth, grain = _smooth(width, height, generator), generator.normal(size=(height, width, 1))
    low, high = 0.0, 64.0  # grey levels
    data = b""
    for _ in range(7):
        level = (low + high) / 2
        data = _encode(smooth + level * grain, quality)
        low, high = (level, high) if len(data) < num_bytes else (low, level)
    return data


def _smooth(width: int, height: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Shapes and 1/f noise around the middle grey, float [height, width, 3]."""
    image = Image.new("RGB", (width, height), tuple(generator.integers(60, 196, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = generator.integers(-width // 4, width), generator.integers(-height // 4, height)
        box = (x, y, x + generator.integers(8, width // 2 + 9), y + generator.integers(8, height // 2 + 9))
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape([int(v) for v in box], fill=tuple(generator.integers(30, 226, 3).tolist()))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) * max(width, height)
    spectrum = np.fft.rfft2(generator.normal(size=(height, width, 3)), axes=(0, 1))
    noise = np.fft.irfft2(spectrum / np.maximum(frequency, 1.0)[..., None], s=(height, width), axes=(0, 1))
    # Colours of photographs go together: mostly one brightness, a little of each channel's own.
    noise = 0.8 * noise.mean(axis=2, keepdims=True) + 0.4 * noise
    return np.asarray(image, dtype=np.float64) + 28 * noise / noise.std()


def _encode(pixels: NDArray[np.float64], quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()

"""The demo's images: scikit-learn's 1,797 scans of handwritten digits, made into a task that pixels do not solve.

Each 8×8 scan is enlarged and painted once, in a colour of its own, somewhere on a coloured, blotchy background of
32×32 pixels. Colour, size, place and background say nothing about the class, so whoever compares pixels compares
those; a model that has learned to look past them sees the digit. Every number is keyed by the scan: the files are the
same each time, everywhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from shards.random import keyed_permutation, keyed_uniform

SIZE = 32  # pixels of a side
NUM_VAL = 360  # of 1,797 scans; the others train
_GLYPH = (0.55, 0.9)  # side of the scan, of the picture's
_BLOTCHES = 3  # a grid of so many background colours each way, blended
_BLOTCH_STRENGTH = 0.2
_MIN_CONTRAST = 0.35  # in luma, between digit and background
_LUMA = np.array([0.299, 0.587, 0.114])


def write_digits(folder: Path) -> dict[str, int]:
    """Write `folder/train/CLASS/NNNN.png` and `folder/val/…`, replacing what was there; returns the files per part."""
    shutil.rmtree(folder, ignore_errors=True)
    scans = load_digits()
    part_of = np.where(keyed_permutation(len(scans.images), "demo split") < NUM_VAL, "val", "train")
    for number, (scan, label, part) in enumerate(zip(scans.images, scans.target, part_of, strict=True)):
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(scan / 16, number=number)).save(path)
    return {part: int((part_of == part).sum()) for part in ("train", "val")}


def paint(scan: NDArray[np.float64], *, number: int) -> NDArray[np.uint8]:
    """A scan [8, 8] of ink from 0 to 1 as a picture uint8 [SIZE, SIZE, 3]; everything else is drawn from `number`."""
    side_, top_, left_ = keyed_uniform("demo place", number, count=3)
    side = round(SIZE * (_GLYPH[0] + side_ * (_GLYPH[1] - _GLYPH[0])))
    top, left = int(top_ * (SIZE - side + 1)), int(left_ * (SIZE - side + 1))
    ink = np.zeros((SIZE, SIZE, 1))
    ink[top : top + side, left : left + side, 0] = _enlarge(scan, side).clip(0, 1)

    for draw in range(1000):
        digit, ground = keyed_uniform("demo colour", number, draw, count=6).reshape(2, 3)
        if abs((digit - ground) @ _LUMA) > _MIN_CONTRAST:
            break
    grid = keyed_uniform("demo background", number, np.arange(3), count=_BLOTCHES**2) - 0.5
    blotches = np.stack([_enlarge(channel.reshape(_BLOTCHES, _BLOTCHES), SIZE) for channel in grid], axis=-1)
    picture = (ground + 2 * _BLOTCH_STRENGTH * blotches).clip(0, 1) * (1 - ink) + digit * ink
    return (picture * 255).round().astype(np.uint8)


def _enlarge(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Values [n, n] resized smoothly to [side, side]."""
    image = Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)

"""The demo's images: scikit-learn's 1,797 scans of handwritten digits, made into a task that pixels do not solve.

Each 8×8 scan is enlarged and painted once, in a colour of its own, somewhere on a darker, colourfully blotched
background of 32×32 pixels. Colour, size, place and background say nothing about the class, so whoever compares pixels
compares those; a model that has learned to look past them sees the digit. Every number is keyed by the scan: the files
are the same each time, everywhere.
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
_GLYPH = (0.75, 0.9)  # side of the scan, of the picture's
_BLOTCHES = 3  # a grid of so many background colours each way, blended
_BLOTCH_STRENGTH = 0.6  # in colour only: blotches are as bright as the ground around them
_GROUND = (0.15, 0.35)  # luma of the background
_CONTRAST = (0.35, 0.45)  # by how much luma of the digit is above it
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

    dark, gap = keyed_uniform("demo luma", number, count=2)
    luma = _GROUND[0] + dark * (_GROUND[1] - _GROUND[0])
    ground = _colour(luma, "demo ground", number)
    digit = _colour(luma + _CONTRAST[0] + gap * (_CONTRAST[1] - _CONTRAST[0]), "demo digit", number)
    grid = keyed_uniform("demo background", number, np.arange(3), count=_BLOTCHES**2) - 0.5
    blotches = np.stack([_enlarge(channel.reshape(_BLOTCHES, _BLOTCHES), SIZE) for channel in grid], axis=-1)
    blotches -= (blotches @ _LUMA)[..., None]
    picture = (ground + 2 * _BLOTCH_STRENGTH * blotches).clip(0, 1) * (1 - ink) + digit * ink
    return (picture * 255).round().astype(np.uint8)


def _colour(luma: float, purpose: str, number: int) -> NDArray[np.float64]:
    """A random colour [3] of this brightness (to 0.03)."""
    draws = keyed_uniform(purpose, number, np.arange(2000), count=3)
    return draws[np.abs(draws @ _LUMA - luma) < 0.03][0]


def _enlarge(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Values [n, n] resized smoothly to [side, side]."""
    image = Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)

"""Two sets of small pictures whose classes cannot be told by comparing pixels, made from a seed alone.

* `photos`: things of ten kinds. A kind is a shape together with a texture, and neither alone is enough: every shape and
  every texture belongs to two kinds. Colours, place, size, rotation, light, shadow, background, clutter and grain are
  drawn for each picture.
* `digits`: scikit-learn's 1,797 scans of handwritten digits, each pasted at random places and scales, in random colours
  and polarity, on such backgrounds and clutter. A scan is in one part only.

    write_images("photos", Path("photos"), counts={"train": 4000, "val": 1000})   # photos/train/KIND/NNNNN.png, …
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SETS = ("photos", "digits")
SIZE = 40  # pixels of a side
KINDS = 10

_SHAPES = ("disc", "ring", "triangle", "square", "star")
_TEXTURES = ("plain", "stripes", "checks", "dots", "blotches")
_VAL_SCANS = 360  # of the 1,797
_PARTS = {"train": 0, "val": 1}
_LUMA = np.array([0.299, 0.587, 0.114])

Field = NDArray[np.float64]  # [SIZE, SIZE] of anything, or [SIZE, SIZE, 3] of a colour from 0 to 1


def write_images(name: str, folder: Path, *, counts: dict[str, int], seed: int = 0) -> None:
    """Write `folder`/PART/KIND/NNNNN.png, the kinds going round in turn, for the set called `name`.

    Args:
        counts: pictures of the parts `train` and `val`.
        seed: of everything that is drawn.
    """
    scans = load_digits()
    order = np.random.default_rng([seed, 17]).permutation(len(scans.images))
    for part, count in counts.items():
        chosen = order[:_VAL_SCANS] if part == "val" else order[_VAL_SCANS:]
        by_class = [chosen[scans.target[chosen] == digit] for digit in range(KINDS)]
        for number in range(count):
            kind = number % KINDS
            generator = np.random.default_rng([seed, SETS.index(name), _PARTS[part], number])
            if name == "photos":
                picture = photo(kind, generator)
            else:
                scan = by_class[kind][number // KINDS % len(by_class[kind])]
                picture = pasted_digit(scans.images[scan] / 16, generator)
            path = folder / part / str(kind) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)


def photo(kind: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A thing of this kind, uint8 [SIZE, SIZE, 3]: lit from somewhere, with its shadow, before a cluttered ground."""
    shape, texture = _SHAPES[kind % 5], _TEXTURES[(2 * kind + kind // 5) % 5]
    picture = ground(generator)
    radius, angle = generator.uniform(13, 17), generator.uniform(-0.35, 0.35)
    x, y = generator.uniform(radius - 2, SIZE + 2 - radius, 2)
    light = generator.uniform(0, 2 * np.pi)
    shadow = outline(shape, _turned(x + 2.5 * np.cos(light), y + 2.5 * np.sin(light), angle, scale=radius), radius)
    picture *= 1 - 0.5 * shadow[..., None]

    u, v = _turned(x, y, angle, scale=radius)
    first, second = _two_colours(generator)
    mix = pattern(texture, u, v, generator)[..., None]
    surface = first * (1 - mix) + second * mix
    towards = -(np.cos(light) * (_COLUMNS - x) + np.sin(light) * (_ROWS - y)) / radius
    surface *= (1 + 0.3 * towards)[..., None]  # brighter on the lit side
    alpha = outline(shape, (u, v), radius)[..., None]
    return _exposed(picture * (1 - alpha) + surface * alpha, generator)


def pasted_digit(scan: Field, generator: np.random.Generator) -> NDArray[np.uint8]:
    """A scan [8, 8] of ink from 0 to 1 on clutter, uint8 [SIZE, SIZE, 3]."""
    picture = ground(generator)
    side = int(generator.integers(26, 38))
    top, left = generator.integers(0, SIZE - side + 1, 2)
    ink = np.zeros((SIZE, SIZE))
    ink[top : top + side, left : left + side] = _enlarged(scan, side).clip(0, 1)
    # A colour that stands out from what is behind, darker or brighter.
    behind = (picture @ _LUMA * ink).sum() / ink.sum()
    gap = generator.uniform(0.35, 0.5)
    luma = behind + gap if behind < 0.5 else behind - gap
    colour = _colour(luma, generator)
    picture = picture * (1 - ink[..., None]) + colour * ink[..., None]
    return _exposed(picture, generator)


def ground(generator: np.random.Generator) -> Field:
    """A ground blotched in colours of about the same brightness, with strokes of any colour on it."""
    grid = generator.uniform(-0.5, 0.5, (3, 3, 3))
    picture = np.stack([_enlarged(channel, SIZE) for channel in np.moveaxis(grid, -1, 0)], axis=-1)
    picture += (generator.uniform(0.2, 0.8) - picture @ _LUMA)[..., None]
    for _ in range(generator.integers(1, 4)):
        x, y = generator.uniform(0, SIZE, 2)
        length, width = generator.uniform(3, 9), generator.uniform(0.7, 1.5)
        u, v = _turned(x, y, generator.uniform(0, np.pi), scale=1)
        alpha = _inside(np.maximum(np.abs(u) - length, np.abs(v) - width))[..., None]
        picture = picture * (1 - alpha) + generator.uniform(0, 1, 3) * alpha
    return picture


def outline(shape: str, turned: tuple[Field, Field], radius: float) -> Field:
    """Cover from 0 to 1 of a shape of radius 1 (in pixels: `radius`) around the origin of these coordinates."""
    u, v = turned
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    if shape == "ring":
        edge = np.abs(distance - 0.75) - 0.3
    elif shape == "disc":
        edge = distance - 1
    elif shape == "star":
        edge = distance - (0.72 + 0.33 * np.cos(5 * angle))
    else:
        sides = {"triangle": 3, "square": 4}[shape]
        sector = (angle % (2 * np.pi / sides)) - np.pi / sides
        edge = distance * np.cos(sector) - {3: 0.62, 4: 0.8}[sides]
    return _inside(edge * radius)


def pattern(texture: str, u: Field, v: Field, generator: np.random.Generator) -> Field:
    """How much of the second colour, from 0 to 1, a surface with these coordinates (radius 1) shows where."""
    if texture == "plain":
        return np.zeros_like(u)
    if texture == "blotches":
        blobs = _enlarged(generator.normal(0, 1, (9, 9)), SIZE)
        return _step(3 * blobs)
    frequency, phase = generator.uniform(6.5, 9), generator.uniform(0, 2 * np.pi, 2)
    a, b = np.sin(frequency * u + phase[0]), np.sin(frequency * v + phase[1])
    if texture == "stripes":
        return _step(4 * a)
    if texture == "checks":
        return _step(6 * a * b)
    return _step(5 * (a + b - 0.7))  # dots


def _two_colours(generator: np.random.Generator) -> tuple[Field, Field]:
    """Two colours [3] that differ in brightness, either of which may be the brighter one."""
    low = generator.uniform(0.1, 0.45)
    pair = [_colour(low, generator), _colour(low + generator.uniform(0.3, 0.45), generator)]
    if generator.random() < 0.5:
        pair.reverse()
    return pair[0], pair[1]


def _colour(luma: float, generator: np.random.Generator) -> Field:
    """A random colour [3] of this brightness."""
    tint = generator.uniform(-0.4, 0.4, 3)
    colour: Field = luma + tint - tint @ _LUMA
    return colour.clip(0, 1)


def _exposed(picture: Field, generator: np.random.Generator) -> NDArray[np.uint8]:
    """The picture through a camera: uneven light, exposure, grain."""
    slope = generator.uniform(-0.15, 0.15, 2)
    light = 1 + (slope[0] * _COLUMNS + slope[1] * _ROWS) / SIZE - slope.sum() / 2
    picture = picture * (light * generator.uniform(0.75, 1.2))[..., None] + generator.normal(0, 0.02, picture.shape)
    return np.asarray((picture.clip(0, 1) * 255).round(), dtype=np.uint8)


_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE] + 0.5


def _turned(x: float, y: float, angle: float, *, scale: float) -> tuple[Field, Field]:
    """Coordinates of all pixels around (x, y), turned by `angle`, in units of `scale` pixels."""
    dx, dy = (_COLUMNS - x) / scale, (_ROWS - y) / scale
    return np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx


def _inside(edge: Field) -> Field:
    """Cover of pixels whose distance to the edge (negative: inside) is this many pixels."""
    return np.asarray((0.5 - edge).clip(0, 1))


def _step(x: Field) -> Field:
    return 1 / (1 + np.exp(-2 * x))


def _enlarged(values: Field, side: int) -> Field:
    """Values [n, n] resized smoothly to [side, side]."""
    image = Image.fromarray(values.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)

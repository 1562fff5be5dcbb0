"""Image bytes → uint8 views: one decode for all views of a sample, then crop, antialiased resize and flip.

The header is read first, and the crop boxes of all views are drawn from it, so that a JPEG can be decoded at the
smallest of the scales 1, ½, ¼ and ⅛ (done in the DCT, nearly free) at which every crop still has 1.4 times the pixels
of its view along each side. Sharp photographs then differ from a full decode by 1 grey level on average and by 2 at
most; with no pixels to spare it would be 2 and 4. shards/resize.py cuts the views.

Pixels are 8-bit RGB as Pillow's `convert("RGB")` gives them: grey and palette images are expanded, alpha is dropped
(not composited), CMYK is converted, an animation gives its first frame; 16-bit greys are scaled by 255/65535. The EXIF
orientation is honoured: boxes are drawn in the picture as shown.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from shards.image_header import DEFAULT_MAX_PIXELS, DecodeError, ImageInfo, inspect
from shards.random import Key, keyed_uniform
from shards.resize import Cut, Pixels, cut

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "DecodeError",
    "ImageInfo",
    "View",
    "boxes",
    "decode_into",
    "decode_picture",
    "decode_views",
    "draw",
    "inspect",
    "plan",
]

_TRIES = 10
_UNIFORMS = 4 * _TRIES + 1  # (area, ratio, top, left) of every try, then the flip
_SCALES = (8, 4, 2)  # DCT scales 1/s, smallest picture first
_SPARE = 1.4  # a scaled box has so many times the pixels that it needs along each side
_MAX_ELONGATION = 8  # of a picture that is resized whole (kind "center")

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass
class Seconds:
    """Wall time that a worker has spent, in seconds."""

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0

    @contextlib.contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Count the time inside the `with` as that of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)


@dataclass(frozen=True)
class View:
    """How one kind of view is cut from a picture; `count` copies of it are drawn independently.

    `random_resized_crop` is torchvision's: an area fraction uniform in `scale`, an aspect ratio log-uniform in `ratio`,
    resized to size x size and mirrored with probability `flip`. `center` has no randomness: the short side is resized
    to size / `crop_fraction` and the middle size x size is cut out (the ends of pictures longer than 8:1 are cut off
    first). `drawn_as` names the view whose random numbers this one shares: the same boxes, at another size.
    """

    name: str
    size: int
    count: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    kind: str = "random_resized_crop"
    crop_fraction: float = 0.875
    drawn_as: str = ""

    def __post_init__(self) -> None:
        rules = {
            "size must be at least 1": self.size >= 1,
            "count must be at least 1": self.count >= 1,
            "scale must be two fractions 0 < low <= high <= 1": 0 < self.scale[0] <= self.scale[1] <= 1,
            "ratio must be two numbers 0 < low <= high": 0 < self.ratio[0] <= self.ratio[1],
            "flip must be a probability": 0 <= self.flip <= 1,
            "interpolation must be bicubic or bilinear": self.interpolation in ("bicubic", "bilinear"),
            "kind must be random_resized_crop or center": self.kind in ("random_resized_crop", "center"),
            "crop_fraction must be in (0, 1]": 0 < self.crop_fraction <= 1,
        }
        for rule, holds in rules.items():
            if not holds:
                field = rule.split()[0]
                raise ValueError(f"view {self.name!r}: {rule}, not {getattr(self, field)!r}")


def decode_views(
    data: bytes,
    *,
    views: Sequence[View],
    seed: int,
    epoch: int,
    sample_id: int,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> dict[str, Tensor]:
    """The views of one image file: {name: uint8 [count, 3, size, size]}, contiguous.

    Every random number is a function of (seed, epoch, sample_id, view name, copy), see `draw`.

    Raises:
        DecodeError: the image cannot be used; the message is one line with the reason.
    """
    out = {view.name: torch.empty((view.count, 3, view.size, view.size), dtype=torch.uint8) for view in views}
    draws = [draw(view, seed=seed, epoch=epoch, sample_id=sample_id) for view in views]
    arrays = [tensor.numpy() for tensor in out.values()]
    decode_into(arrays, data, views=views, draws=draws, max_pixels=max_pixels, seconds=Seconds())
    return out


def draw(view: View, *, seed: int, epoch: Key, sample_id: Key) -> NDArray[np.float64]:
    """The uniform numbers behind a view: float64 [count, 41], or [n, count, 41] for n epochs and ids at once."""
    if view.kind == "center":
        return np.empty((*np.shape(sample_id), view.count, 0))
    epochs, ids = np.asarray(epoch)[..., None], np.asarray(sample_id)[..., None]
    return keyed_uniform("crop", seed, epochs, ids, view.drawn_as or view.name, np.arange(view.count), count=_UNIFORMS)


def decode_into(
    out: Sequence[Pixels],
    data: bytes,
    *,
    views: Sequence[View],
    draws: Sequence[NDArray[np.float64]],
    max_pixels: int,
    seconds: Seconds,
) -> None:
    """`decode_views` with its numbers drawn already, writing to `out`: one uint8 [count, 3, size, size] a view.

    What it takes is added to `seconds`.
    """
    started = time.perf_counter()
    info = inspect(data, max_pixels=max_pixels)
    plans = [plan(view, info, numbers) for view, numbers in zip(views, draws, strict=True)]
    scale = 1
    if info.format == "jpeg" and info.components != 4:
        scale = next((s for s in _SCALES if all(_fits(c, s) for cuts in plans for c in cuts)), 1)
    picture, scale = decode_picture(data, info, scale)
    decoded = time.perf_counter()
    for view, whole, target in zip(views, plans, out, strict=True):
        cuts = whole if scale == 1 else [_scaled(c, scale) for c in whole]
        cut(target, picture, cuts, interpolation=view.interpolation)
    seconds.decode += decoded - started
    seconds.resize += time.perf_counter() - decoded


def boxes(view: View, info: ImageInfo, *, seed: int, epoch: int, sample_id: int) -> list[Cut]:
    """Where the copies of a view are cut from the picture as shown, a `Cut` each, in its pixels."""
    return plan(view, info, draw(view, seed=seed, epoch=epoch, sample_id=sample_id))


def plan(view: View, info: ImageInfo, numbers: NDArray[np.float64]) -> list[Cut]:
    """`boxes` with its numbers drawn already: float64 [count, 41]."""
    return [_plan(view, info, copy) for copy in numbers.tolist()]


def _fits(c: Cut, scale: int) -> bool:
    """Whether a box still has pixels to spare at 1/scale."""
    return min(c.height / c.resized_height, c.width / c.resized_width) >= scale * _SPARE


def _scaled(c: Cut, scale: int) -> Cut:
    """The same view of a picture decoded at 1/scale: a pixel of that covers scale x scale of the whole one."""
    return c._replace(top=c.top / scale, left=c.left / scale, height=c.height / scale, width=c.width / scale)


def _plan(view: View, info: ImageInfo, numbers: list[float]) -> Cut:
    if view.kind == "center":
        return _center(view, info)
    box = _random_box(view, info.height, info.width, numbers)
    return Cut(*box, view.size, view.size, flip=numbers[-1] < view.flip)


def _random_box(view: View, height: int, width: int, numbers: list[float]) -> Box:
    """torchvision's RandomResizedCrop.get_params on given uniform numbers."""
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for k in range(0, 4 * _TRIES, 4):
        area = height * width * (view.scale[0] + (view.scale[1] - view.scale[0]) * numbers[k])
        ratio = math.exp(low + (high - low) * numbers[k + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[k + 2] * (height - h + 1)), int(numbers[k + 3] * (width - w + 1)), h, w
    h, w = height, width  # no box fitted: the middle of the picture, at the nearest allowed ratio
    if width / height < view.ratio[0]:
        h = min(height, max(1, round(width / view.ratio[0])))
    elif width / height > view.ratio[1]:
        w = min(width, max(1, round(height * view.ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _center(view: View, info: ImageInfo) -> Cut:
    short = round(view.size / view.crop_fraction)
    height, width = info.height, info.width
    longest = _MAX_ELONGATION * min(height, width)  # so that a 1 x 100,000,000 picture is not blown up to terabytes
    h, w = min(height, longest), min(width, longest)
    resized = (short, short * w // h) if h <= w else (short * h // w, short)
    offset = round((resized[0] - view.size) / 2), round((resized[1] - view.size) / 2)
    return Cut((height - h) // 2, (width - w) // 2, h, w, *resized, *offset)


def decode_picture(data: bytes, info: ImageInfo, scale: int) -> tuple[NDArray[np.uint8], int]:
    """The picture as shown, uint8 [h, w, 3], and the scale 1/s at which it was really decoded."""
    array: NDArray[np.uint8] | None = None
    if info.format == "jpeg" and info.components != 4:
        array = _decode_jpeg(data, info, scale)
    if array is None:
        array, scale = _decode_pillow(data, info), 1
    return _orient(array, info.orientation), scale


def _decode_jpeg(data: bytes, info: ImageInfo, scale: int) -> NDArray[np.uint8] | None:
    """simplejpeg's decode; None where it refuses a file that Pillow may still read (it takes warnings as errors)."""
    width, height = info.stored_size
    height, width = -(-height // scale), -(-width // scale)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != info.stored_size[::-1]:
            raise DecodeError("JPEG with more than one frame header")
        array = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=scale)
    except DecodeError:
        raise
    except ValueError as error:
        reason = str(error)
        if "remature end" in reason or "Huffman" in reason:
            raise DecodeError(f"JPEG is truncated or damaged: {reason}") from error
        return None
    assert array.shape == (height, width, 3), (array.shape, height, width)
    return array


def _decode_pillow(data: bytes, info: ImageInfo) -> NDArray[np.uint8]:
    # The plugin classes are opened directly: Image.open would apply Pillow's own bomb limits, a global setting with
    # warnings, where `inspect` has applied ours.
    plugins: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
        "jpeg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }
    try:
        with plugins[info.format](io.BytesIO(data)) as image:
            if image.size != info.stored_size:
                raise DecodeError(f"{info.format} header and contents give different sizes")
            return _rgb(image)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{info.format} cannot be decoded: {reason}") from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [h, w, 3], writable (torch wants that)."""
    image.load()
    if image.mode.startswith("I"):  # 16-bit greys, which convert() would clip at 255
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _orient(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn stored pixels [h, w, 3] into the picture as shown (EXIF tag 0x0112)."""
    if orientation == 1:
        return array
    if orientation >= 5:
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):  # after the exchange of the axes: upside down
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)

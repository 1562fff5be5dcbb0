"""The colour operations of `scaler.nn.color` as Triton kernels, which read a pixel once, or thrice where it is blurred.

A program works on one image, whose operations and factors it reads from a table, so that it branches as a whole and
computes nothing that its image does not get:

    means     of the images whose contrast changes: their mean grey when it is that operation's turn
    colors    jitter, grayscale; then of sharp images solarise, normalise and store, the others go to a scratch
    rows      of blurred images: the Gaussian along each row, from scratch to scratch
    columns   … and along each column, solarise, normalise, store

Results are stored in any float dtype and as channels-last memory if wanted. Sums run in a fixed order: the same bits on
every repetition.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from scaler.transfer import send_together

if TYPE_CHECKING:
    from scaler.nn.color import ColorParameters

# Columns of the table, float32 [m, _WIDTH]: factors by operation, operation by position (-1: none), and the rest.
_WIDTH = 12
_ORDER, _GRAYSCALE, _SOLARIZE, _SIGMA, _SLOT = (tl.constexpr(column) for column in (4, 8, 9, 10, 11))
_BRIGHTNESS, _CONTRAST, _SATURATION = (tl.constexpr(operation) for operation in range(3))
_RED, _GREEN, _BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)  # torchvision's luma
_BLOCK = 1024  # pixels of a program; 8 a thread, which are read as one word
_CONSTANTS = {"WIDTH": _WIDTH, "BLOCK": _BLOCK, "enable_fp_fusion": False}  # rounded as on a CPU: memory is the limit


def apply(
    x: Tensor,
    parameters: ColorParameters,
    *,
    operations: NDArray[np.int64],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`scaler.nn.color.apply_color` on a device that Triton compiles for.

    Args:
        x: uint8 or float32 [m, 3, h, w].
        operations: int64 [m, 4], the jitter's operation at each position, -1 for none.
    """
    table = np.empty((len(x), _WIDTH), dtype=np.float32)
    table[:, :4], table[:, 4:8] = parameters.factors, operations
    table[:, 8], table[:, 9], table[:, 10] = parameters.grayscale, parameters.solarize, parameters.sigma
    blurred = np.flatnonzero(parameters.sigma > 0)
    table[:, 11] = -1
    table[blurred, 11] = np.arange(len(blurred))
    host = [
        torch.from_numpy(table),
        torch.from_numpy(blurred.astype(np.int32)),
        torch.tensor([*mean, *std], dtype=torch.float32),
    ]
    table_, rows, normalization = send_together(host, x.device)
    return _color(
        x.contiguous(),
        table_,
        rows,
        normalization,
        contrast=bool((operations == _CONTRAST.value).any()),
        blur_kernel=parameters.blur_kernel,
        threshold=parameters.solarize_threshold / 255.0,
        dtype=dtype,
        channels_last=channels_last,
    )


@torch.library.custom_op("scaler::color", mutates_args=(), device_types=("cpu", "cuda"))  # cpu: as interpreted in tests
def _color(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    normalization: Tensor,
    contrast: bool,
    blur_kernel: int,
    threshold: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    m, _, h, w = x.shape
    out = _like(x, dtype, channels_last)
    strides = (out.stride(0), out.stride(1), out.stride(3))
    means = x.new_empty(m, dtype=torch.float32)
    scratch = x.new_empty((2, len(rows), 3, h, w), dtype=torch.float32)
    blocks = triton.cdiv(h * w, _BLOCK)
    with torch.cuda.device_of(x):  # where Triton launches
        if contrast:
            _means[(m,)](x, means, table, h * w, BYTES=x.dtype == torch.uint8, **_CONSTANTS)
        _colors[(m, blocks)](
            x, out, scratch, table, means, normalization, h * w, threshold, *strides,
            BYTES=x.dtype == torch.uint8, **_CONSTANTS,
        )  # fmt: skip
        if len(rows):
            grid = (len(rows), blocks)
            _rows[grid](scratch[0], scratch[1], table, rows, h * w, w, blur_kernel, **_CONSTANTS)
            _columns[grid](
                scratch[1], out, table, rows, normalization, h, w, blur_kernel, threshold, *strides,
                **_CONSTANTS,
            )  # fmt: skip
    return out


@_color.register_fake
def _(
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    normalization: Tensor,
    contrast: bool,
    blur_kernel: int,
    threshold: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return _like(x, dtype, channels_last)


def _like(x: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format)


# ---------------------------------------------------------------------- kernels


@triton.jit
def _means(x, means, table, num_pixels, BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """means[image]: of its grey values when contrast's turn comes; images without contrast are left out."""
    image = tl.program_id(0).to(tl.int64)
    row = table + image * WIDTH
    turn = 4
    for position in range(4):
        if tl.load(row + _ORDER + position).to(tl.int32) == _CONTRAST:
            turn = position
    if turn < 4:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_pixels, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < num_pixels
            r, g, b = _load(x + image * 3 * num_pixels, pixel, num_pixels, inside, BYTES)
            for position in range(turn):
                operation = tl.load(row + _ORDER + position).to(tl.int32)
                r, g, b = _jitter(r, g, b, row, operation, 0.0)
            total += tl.where(inside, _gray(r, g, b), 0.0)
        tl.store(means + image, tl.sum(total, axis=0) / num_pixels)


@triton.jit
def _colors(
    x, out, scratch, table, means, normalization, num_pixels, threshold, image_stride, channel_stride, pixel_stride,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything but the blur of a block of an image's pixels."""
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    row = table + image * WIDTH
    r, g, b = _load(x + image * 3 * num_pixels, pixel, num_pixels, inside, BYTES)
    for position in range(4):
        operation = tl.load(row + _ORDER + position).to(tl.int32)
        mean = 0.0
        if operation == _CONTRAST:
            mean = tl.load(means + image)
        r, g, b = _jitter(r, g, b, row, operation, mean)
    if tl.load(row + _GRAYSCALE) != 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    slot = tl.load(row + _SLOT).to(tl.int64)
    if slot < 0:
        place = out + image * image_stride + pixel.to(tl.int64) * pixel_stride
        _finish(r, g, b, place, channel_stride, tl.load(row + _SOLARIZE), threshold, normalization, inside)
    else:
        _keep(r, g, b, scratch + slot * 3 * num_pixels + pixel, num_pixels, inside)


@triton.jit
def _rows(source, target, table, rows, num_pixels, width, taps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Blur a block of an image's pixels along its rows, between scratches [images, 3, h, w]."""
    slot = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    sigma = tl.load(table + tl.load(rows + slot).to(tl.int64) * WIDTH + _SIGMA)
    column = pixel % width
    line = source + slot * 3 * num_pixels + (pixel - column)
    r, g, b = _blur(line, column, 1, width, num_pixels, sigma, taps, inside, BLOCK)
    _keep(r, g, b, target + slot * 3 * num_pixels + pixel, num_pixels, inside)


@triton.jit
def _columns(
    source, out, table, rows, normalization, height, width, taps, threshold,
    image_stride, channel_stride, pixel_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur a block of an image's pixels along its columns, and finish it."""
    slot = tl.program_id(0).to(tl.int64)
    num_pixels = height * width
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    image = tl.load(rows + slot).to(tl.int64)
    row = table + image * WIDTH
    line = source + slot * 3 * num_pixels + pixel % width
    r, g, b = _blur(line, pixel // width, width, height, num_pixels, tl.load(row + _SIGMA), taps, inside, BLOCK)
    place = out + image * image_stride + pixel.to(tl.int64) * pixel_stride
    _finish(r, g, b, place, channel_stride, tl.load(row + _SOLARIZE), threshold, normalization, inside)


@triton.jit
def _load(place, pixel, num_pixels, inside, BYTES: tl.constexpr):
    """Three channels from planes, 0 to 1."""
    r = tl.load(place + pixel, mask=inside, other=0).to(tl.float32)
    g = tl.load(place + num_pixels + pixel, mask=inside, other=0).to(tl.float32)
    b = tl.load(place + 2 * num_pixels + pixel, mask=inside, other=0).to(tl.float32)
    if BYTES:  # rounded as on a CPU: a threshold may lie on one of these values
        r, g, b = tl.div_rn(r, 255.0), tl.div_rn(g, 255.0), tl.div_rn(b, 255.0)
    return r, g, b


@triton.jit
def _keep(r, g, b, place, num_pixels, inside):
    """Three channels into planes."""
    tl.store(place, r, mask=inside)
    tl.store(place + num_pixels, g, mask=inside)
    tl.store(place + 2 * num_pixels, b, mask=inside)


@triton.jit
def _gray(r, g, b):
    return r * _RED + g * _GREEN + b * _BLUE


@triton.jit
def _unit(v):
    return tl.minimum(tl.maximum(v, 0.0), 1.0)


@triton.jit
def _jitter(r, g, b, row, operation, mean):
    """One operation of the jitter; none if it is -1."""
    if operation >= 0:
        factor = tl.load(row + operation)
        if operation == _BRIGHTNESS:
            r, g, b = _unit(r * factor), _unit(g * factor), _unit(b * factor)
        elif operation == _CONTRAST:
            rest = mean * (1.0 - factor)
            r, g, b = _unit(r * factor + rest), _unit(g * factor + rest), _unit(b * factor + rest)
        elif operation == _SATURATION:
            gray = _gray(r, g, b) * (1.0 - factor)
            r, g, b = _unit(r * factor + gray), _unit(g * factor + gray), _unit(b * factor + gray)
        else:
            top = tl.maximum(tl.maximum(r, g), b)
            chroma = top - tl.minimum(tl.minimum(r, g), b)
            safe = tl.where(chroma == 0.0, 1.0, chroma)
            sixths = tl.where(top == r, (g - b) / safe, tl.where(top == g, (b - r) / safe + 2.0, (r - g) / safe + 4.0))
            sixths += 6.0 * factor
            r = _turned(top, chroma, sixths + 5.0)
            g = _turned(top, chroma, sixths + 3.0)
            b = _turned(top, chroma, sixths + 1.0)
    return r, g, b


@triton.jit
def _turned(top, chroma, sixths):
    """A channel of a colour whose hue has been turned; see `scaler.nn.color._turn_hue_`."""
    k = sixths - 6.0 * tl.floor(sixths / 6.0)
    return top - chroma * _unit(tl.minimum(k, 4.0 - k))


@triton.jit
def _blur(line, at, step, length, num_pixels, sigma, taps, inside, BLOCK: tl.constexpr):
    """Three channels, [BLOCK] each: the Gaussian of so many taps around position `at` of a line of `length` pixels that
    lie `step` apart, reflected at its ends."""
    r, g, b = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total = 0.0
    for tap in range(taps):
        distance = tap - taps // 2
        ratio = distance / sigma
        weight = tl.exp(-0.5 * ratio * ratio)
        total += weight
        there = tl.abs(at + distance)
        there = tl.minimum(there, 2 * (length - 1) - there)
        r += weight * tl.load(line + there * step, mask=inside, other=0.0)
        g += weight * tl.load(line + num_pixels + there * step, mask=inside, other=0.0)
        b += weight * tl.load(line + 2 * num_pixels + there * step, mask=inside, other=0.0)
    return r / total, g / total, b / total


@triton.jit
def _finish(r, g, b, place, channel_stride, solarize, threshold, normalization, inside):
    """Solarise, normalise and store three channels."""
    if solarize != 0:
        r = tl.where(r >= threshold, 1.0 - r, r)
        g = tl.where(g >= threshold, 1.0 - g, g)
        b = tl.where(b >= threshold, 1.0 - b, b)
    r = (r - tl.load(normalization)) / tl.load(normalization + 3)
    g = (g - tl.load(normalization + 1)) / tl.load(normalization + 4)
    b = (b - tl.load(normalization + 2)) / tl.load(normalization + 5)
    kind = place.dtype.element_ty
    tl.store(place, r.to(kind), mask=inside)
    tl.store(place + channel_stride, g.to(kind), mask=inside)
    tl.store(place + 2 * channel_stride, b.to(kind), mask=inside)

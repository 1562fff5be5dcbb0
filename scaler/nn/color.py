"""Colour operations on a batch, every image with its own parameters, on whatever device the batch is on.

    parameters = sample_color(color, seed=0, epochs=epochs, ids=ids, view="view_1", copy=0)
    x = apply_color(views["view_1"][0], parameters, mean=mean, std=std)          # uint8 → normalised float32

Each operation means what its namesake in torchvision.transforms.v2.functional means for a float image in [0, 1];
images go through jitter (its four operations in an order of their own), grayscale, blur, solarise, normalise. The
parameters are drawn on the CPU, keyed by sample, and the rows that an operation touches are known there, so nothing
waits for the device and nothing is computed for images that were not selected. On a GPU, where Triton is installed, the
operations are the few kernels of `scaler.nn.color_kernels`; elsewhere torch's.

Shapes: m images, c = 3 channels, h by w pixels, k blur taps, r selected rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scaler.nn.kernels import runs_kernels
from scaler.nn.precision import full_precision
from scaler.transfer import send_together
from shards.random import keyed_uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_GRAY = (0.2989, 0.587, 0.114)  # the luma weights of torchvision
_CACHED_FLOATS = 1 << 18  # 1 MiB: on the CPU images are taken in chunks that stay in a core's cache


@dataclass(frozen=True)
class Color:
    """Strengths and probabilities; a strength or kernel of 0 and a probability of 0 switch an operation off.

    Factors are uniform in [max(0, 1 - v), 1 + v] for brightness, contrast and saturation and in [-hue, hue] for the
    hue, as in torchvision's ColorJitter. `blur_kernel` counts taps (odd); `solarize_threshold` is out of 255.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_p: float = 0.0
    grayscale_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 0
    solarize_p: float = 0.0
    solarize_threshold: float = 128.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0:
            raise ValueError(f"colour strengths must not be negative, got {self}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue={self.hue} is outside [0, 0.5], half a turn of the colour circle")
        for name in ("jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; give a number in [0, 1]")
        if self.blur_kernel < 0 or (self.blur_kernel > 0 and self.blur_kernel % 2 == 0):
            raise ValueError(f"blur_kernel={self.blur_kernel} must be odd (or 0 for no blur), so that it has a middle")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma={self.blur_sigma} must be (low, high) with 0 < low <= high")


@dataclass(frozen=True)
class ColorParameters:
    """What was drawn for m images; arrays on the CPU.

    factors float32 [m, 4] (brightness, contrast, saturation, hue), order int64 [m, 4] (operation at each position),
    jitter, grayscale, solarize bool [m], sigma float32 [m] (0: not blurred).
    """

    factors: NDArray[np.float32]
    order: NDArray[np.int64]
    jitter: NDArray[np.bool_]
    grayscale: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]
    blur_kernel: int
    solarize_threshold: float

    def __len__(self) -> int:
        return len(self.jitter)


def sample_color(
    color: Color,
    *,
    seed: int,
    epochs: Tensor | NDArray[np.int64],
    ids: Tensor | NDArray[np.int64],
    view: str,
    copy: int | range,
) -> ColorParameters:
    """Draw the parameters of m images, a pure function of (seed, epoch, id, view, copy) of each (int64 [m]).

    Of several copies they come copy by copy, m each.
    """
    copies = np.atleast_1d(np.asarray(copy))[:, None]
    u = keyed_uniform("color", seed, np.asarray(epochs), np.asarray(ids), view, copies, count=13).reshape(-1, 13)
    strengths = np.array([color.brightness, color.contrast, color.saturation])
    low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    factors = np.concatenate([low + u[:, :3] * (high - low), (2.0 * u[:, 3:4] - 1.0) * color.hue], axis=1)
    sigma = color.blur_sigma[0] + u[:, 7] * (color.blur_sigma[1] - color.blur_sigma[0])
    blurred = (u[:, 6] < color.blur_p) & (color.blur_kernel > 0)
    return ColorParameters(
        factors=factors.astype(np.float32),
        order=np.argsort(u[:, 9:13], axis=1, kind="stable"),
        jitter=u[:, 4] < color.jitter_p,
        grayscale=u[:, 5] < color.grayscale_p,
        sigma=np.where(blurred, sigma, 0.0).astype(np.float32),
        solarize=u[:, 8] < color.solarize_p,
        blur_kernel=color.blur_kernel,
        solarize_threshold=color.solarize_threshold,
    )


def concatenate(parts: Sequence[ColorParameters]) -> ColorParameters:
    """The parameters of several batches of images as of one, for fewer and larger operations.

    Raises:
        ValueError: blurs or solarisations of different kinds.
    """
    kinds = {(part.blur_kernel, part.solarize_threshold) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"images with {len(kinds)} different (blur_kernel, solarize_threshold) cannot be one batch")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _DRAWN}
    return replace(parts[0], **arrays)


_DRAWN = ("factors", "order", "jitter", "grayscale", "sigma", "solarize")  # of each image


@torch.no_grad()
def apply_color(
    x: Tensor,
    parameters: ColorParameters,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Colour and normalise images [m, 3, h, w] (uint8, or float in [0, 1]); a new tensor of that shape.

    Args:
        mean, std: of each channel, of pixels from 0 to 1.
        dtype: of the result, which is computed in fp32 and rounded once.
        channels_last: of the result's memory, as convolutions like it.

    Raises:
        ValueError: another number of images than parameters, or images too small for the blur kernel.
    """
    m, _, h, w = x.shape
    if m != len(parameters):
        raise ValueError(f"{m} images but colour parameters of {len(parameters)}; draw them for the same samples")
    if parameters.sigma.any() and parameters.blur_kernel // 2 >= min(h, w):
        raise ValueError(
            f"blur_kernel={parameters.blur_kernel} needs images of more than {parameters.blur_kernel // 2} pixels,"
            f" got {h}x{w}; use a smaller kernel, or 0 for none"
        )
    if runs_kernels(x):
        from scaler.nn import color_kernels

        return color_kernels.apply(
            x,
            parameters,
            operations=jitter_operations(parameters),
            mean=mean,
            std=std,
            dtype=dtype,
            channels_last=channels_last,
        )
    out = apply_color_with_torch(x, parameters, mean=mean, std=std)
    return out.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.no_grad()
def apply_color_with_torch(
    x: Tensor, parameters: ColorParameters, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """`apply_color`, float32 and contiguous, by torch's own operations on any device."""
    m, _, h, w = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    size = m if x.is_cuda or x.is_meta else max(1, _CACHED_FLOATS // (3 * h * w))
    normalization = torch.tensor([mean, std], dtype=torch.float32).view(2, 3, 1, 1)
    operations = jitter_operations(parameters)
    with full_precision(out):
        for start in range(0, m, max(1, size)):
            part = out[start : start + size].copy_(x[start : start + size])
            if x.dtype == torch.uint8:
                part.div_(255.0)
            steps = _plan(parameters, operations, slice(start, start + size))
            numbers = (_flat([rows for _, rows, _ in steps]), _flat([values for _, _, values in steps]))
            (shift, scale), *sent = send_together([normalization, *numbers], x.device)
            cut = (flat.split([len(rows) for _, rows, _ in steps]) for flat in sent)
            for (operation, _, _), rows, values in zip(steps, *cut, strict=True):
                _apply_rows(operation, part, rows, values, parameters)
            part.sub_(shift).div_(scale)
    return out


def jitter_operations(parameters: ColorParameters) -> NDArray[np.int64]:
    """The jitter's operation at each position, int64 [m, 4]; -1 where there is none that would change anything."""
    p = parameters
    wanted = p.jitter[:, None] & (p.factors != np.array([1.0, 1.0, 1.0, 0.0], dtype=np.float32))  # by operation
    return np.where(np.take_along_axis(wanted, p.order, axis=1), p.order, -1)


def _plan(
    parameters: ColorParameters, operations: NDArray[np.int64], part: slice
) -> list[tuple[int | str, NDArray[np.int64], NDArray[np.float32]]]:
    """(operation, rows int64 [r], values float32 [r]) in the order of execution, where there are rows."""
    p = parameters
    factors, first = p.factors[part], operations[part]
    steps: list[tuple[int | str, NDArray[np.int64], NDArray[np.float32]]] = []
    for position in range(4):
        for operation in range(4):
            rows = np.flatnonzero(first[:, position] == operation)
            steps.append((operation, rows, factors[rows, operation]))
    for name, chosen in (("grayscale", p.grayscale[part]), ("blur", p.sigma[part] > 0), ("solarize", p.solarize[part])):
        rows = np.flatnonzero(chosen)
        steps.append((name, rows, p.sigma[part][rows]))
    return [step for step in steps if len(step[1])]


def _flat(arrays: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0)


def _apply_rows(operation: int | str, x: Tensor, rows: Tensor, values: Tensor, parameters: ColorParameters) -> None:
    """Apply one operation in place to the given rows of x [n, 3, h, w]."""
    everything = len(rows) == len(x)  # rows ascend, so equal lengths mean all rows, in order
    y = x if everything else x.index_select(0, rows)
    factor = values.view(-1, 1, 1, 1)
    if operation == BRIGHTNESS:
        y.mul_(factor).clamp_(0.0, 1.0)
    elif operation == CONTRAST:
        mean = _gray(y).mean((-2, -1), keepdim=True)
        y.mul_(factor).add_(mean.mul_(1.0 - factor)).clamp_(0.0, 1.0)
    elif operation == SATURATION:
        gray = _gray(y).mul_(1.0 - factor)
        y.mul_(factor).add_(gray).clamp_(0.0, 1.0)
    elif operation == HUE:
        _turn_hue_(y, values)
    elif operation == "grayscale":
        y.copy_(_gray(y))
    elif operation == "blur":
        blur = _blur_by_convolution if y.is_cuda else _blur_by_shifts
        y.copy_(blur(y, gaussian_taps(values, parameters.blur_kernel)))
    elif operation == "solarize":
        y.copy_(torch.where(y >= parameters.solarize_threshold / 255.0, 1.0 - y, y))
    if not everything:
        x.index_copy_(0, rows, y)


def _gray(y: Tensor) -> Tensor:
    """Luma, float32 [r, 1, h, w]."""
    red, green, blue = y.split(1, dim=1)
    return red.mul(_GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _turn_hue_(y: Tensor, turns: Tensor) -> None:
    """Add `turns` [r] (of a full circle) to the hue of y [r, 3, h, w], in place.

    HSV without its value and saturation: with M the largest channel, c = M - smallest and h6 the hue in sixths, the
    channels of the turned colour are M - c * clamp(min(k, 4 - k), 0, 1), k = (n + h6) mod 6, n = 5, 3, 1.
    """
    red, green, blue = y.unbind(dim=1)
    top = y.amax(1)
    chroma = top - y.amin(1)
    safe = chroma.masked_fill(chroma == 0, 1.0)
    sixths = torch.where(
        top == red,
        (green - blue).div_(safe),
        torch.where(top == green, (blue - red).div_(safe).add_(2.0), (red - green).div_(safe).add_(4.0)),
    )
    sixths.add_(6.0 * turns.view(-1, 1, 1))
    for channel, n in enumerate((5.0, 3.0, 1.0)):
        k = sixths.add(n).remainder_(6.0)
        k = torch.minimum(k, 4.0 - k).clamp_(0.0, 1.0)
        torch.addcmul(top, k, chroma, value=-1.0, out=y[:, channel])


def gaussian_taps(sigma: Tensor, kernel: int) -> Tensor:
    """Normalised Gaussian weights, float32 [r, kernel], one row for every sigma [r]."""
    offset = torch.arange(kernel, dtype=torch.float32, device=sigma.device) - kernel // 2
    return torch.softmax(-0.5 * (offset / sigma[:, None]).square(), dim=1)


def _blur_by_convolution(y: Tensor, taps: Tensor) -> Tensor:
    """Blur y [r, 3, h, w] by taps [r, k] with reflected borders: two depth-wise convolutions, few kernels for a GPU."""
    r, c, h, w = y.shape
    k = taps.shape[1]
    weight = taps.repeat_interleave(c, dim=0)  # [r * c, k]
    padded = F.pad(y, (k // 2,) * 4, mode="reflect").view(1, r * c, h + k - 1, w + k - 1)
    rows = F.conv2d(padded, weight.view(r * c, 1, 1, k), groups=r * c)
    return F.conv2d(rows, weight.view(r * c, 1, k, 1), groups=r * c).view(r, c, h, w)


def _blur_by_shifts(y: Tensor, taps: Tensor) -> Tensor:
    """The same as shifted sums, pairing equal taps: up to 15 times faster than the convolution on a CPU."""
    (h, w), k = y.shape[-2:], taps.shape[1]
    half = k // 2
    weight = taps.view(len(taps), k, 1, 1, 1)
    padded = F.pad(y, (half,) * 4, mode="reflect")
    rows = padded[..., half : half + w] * weight[:, half]
    for i in range(half):
        rows.addcmul_(padded[..., i : i + w] + padded[..., k - 1 - i : k - 1 - i + w], weight[:, i])
    out = rows[:, :, half : half + h] * weight[:, half]
    for i in range(half):
        out.addcmul_(rows[:, :, i : i + h] + rows[:, :, k - 1 - i : k - 1 - i + h], weight[:, i])
    return out

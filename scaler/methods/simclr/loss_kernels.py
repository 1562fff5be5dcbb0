"""NT-Xent's two passes over all pairs as Triton kernels: no score ever leaves a GPU's multiprocessor.

A program has a block of anchors and goes over blocks of keys. In the first pass it adds up exp(score) of all others
(keys that are neither the anchor nor its positive) and keeps the highest score; in the second it computes the scores
again, turns them into weights and adds up weight · key. Nothing is added up by atomics and no order depends on timing:
the same numbers come out bit by bit. The maths is in `scaler.methods.simclr.loss`; here is how it is rounded.

Tensor cores multiply fp16 exactly and add in fp32. Unit vectors fit them in two pieces, 256 z = high + low, which
together hold 22 bits, as fp32's split into three TF32 products would, at twice their speed and without work in the
inner loop:

    exact    score = high·high + high·low + low·high        weights in two pieces too: fp32 but for a few roundings
    half     score = high·high, of vectors made one long again        weights in fp16

Rounded to fp16 a vector is longer or shorter than one by up to 2⁻¹², which a temperature of 0.05 would make 1 % of the
weight of its nearest keys; so scores are divided by the lengths of the rounded vectors (`lengths`), which leaves of an
error only what is across the vector. The keys of the second product have both pieces in either precision: between
vectors that are almost equal the gradient is their difference, which is smaller than what rounding does to them.

Weights are at most twice M, the largest share of a softmax that is not its positive's. Multiplied by 2¹⁴/M they fit
into fp16, and whatever is above 2⁻²⁸ M keeps all its bits; the gradient as a whole is about as large as M.

Tensor cores round what they add towards zero. Thousands of such steps would shift the gradient by 1e-4 of it, so a
block's product begins at zero and is added to the others by an ordinary fp32 addition.

Legend: a anchors, n keys (the first a of them the anchors), d channels, D: d padded to 64, 128, 256 or 512.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_UNIT = 256  # what 1 is in the pieces: so large that the low one is no subnormal number
_ROWS = 128  # keys are padded to a multiple of the largest block
_LARGEST_WEIGHT = 2.0**14  # half of what a weight may become
_MULTIPROCESSORS = 132  # an H200's and an H100's; fixed, so that results do not depend on the device
_MOST_PARTS = 16
_FEW_CHANNELS = 64


class Blocks(NamedTuple):
    """Anchors and keys of a program's tile, channels of its part of the gradient, warps, and keys in flight."""

    anchors: int
    keys: int
    channels: int
    warps: int
    stages: int


def blocks(width: int, *, exact: bool, backward: bool) -> Blocks:
    """What fits the 227 KiB of shared memory (the anchors, and `stages` blocks of keys) and the registers of a thread
    (scores; in the backward pass also a block's product and the sum, anchors × channels in fp32 each). As many anchors
    as possible, since a program reads all keys; 512 channels are made half at a time, with the scores computed anew.
    """
    if backward:
        return {
            64: Blocks(128, 64, 64, 8, 3),
            128: Blocks(128, 64, 128, 8, 3),
            256: Blocks(64, 64, 256, 8, 2),
            512: Blocks(64, 32, 256, 8, 1 if exact else 2),
        }[width]
    return {
        64: Blocks(128, 128, 64, 8, 3),
        128: Blocks(128, 128, 128, 8, 2 if exact else 3),
        256: Blocks(128, 32 if exact else 128, 256, 8, 2),
        512: Blocks(64 if exact else 128, 32, 512, 8, 1 if exact else 2),
    }[width]


class Pieces(NamedTuple):
    """Keys as the kernels read them, padded with zeros: `high` and `low` [≥ n, D] in fp16; `lengths` [≥ n], one over
    those of `high`, which scores of high pieces are multiplied by.
    """

    high: Tensor
    low: Tensor
    lengths: Tensor


class KernelPairs:
    """`scaler.methods.simclr.loss.Pairs` by kernels.

    Args:
        z: [a, d] unit vectors in fp32, d at most 512.
        keys: [n, d], of which the first a are z.
        temperature: divides the scores.
        exact: whether scores and weights have the precision of fp32, or of fp16; they have fp32's where there are few
            channels, over which roundings would not average out.
    """

    def __init__(self, z: Tensor, keys: Tensor, *, temperature: float, exact: bool) -> None:
        self._shape, self._num_keys, self._temperature = z.shape, len(keys), temperature
        self._exact = exact or z.shape[1] < _FEW_CHANNELS
        self._scale = 1 / (temperature * math.log(2)) / (_UNIT**2 if self._exact else 1)
        self._pieces = _pieces(keys)

    def sums(self) -> tuple[Tensor, Tensor]:
        """See `Pairs.sums`."""
        others, best = _sums(*self._pieces, self._scale, self._shape[0], self._num_keys, self._exact)
        return others.sum(dim=0), best.amax(dim=0) * math.log(2)

    def are_ahead(self, positives: Tensor, best: Tensor) -> Tensor:
        """See `Pairs.are_ahead`; positives' scores are taken anew where the others' are rounded."""
        if not self._exact:
            a = self._shape[0]
            unit = self._pieces.high[:a] * self._pieces.lengths[:a, None]
            positives = (unit * unit.roll(a // 2, dims=0)).sum(dim=1) / self._temperature
        steps = self._shape[1] / 16  # of a tensor core, each of which rounds towards zero
        return positives - best > (8 + steps) * torch.finfo(best.dtype).eps / self._temperature

    def add_weighted(self, gradient: Tensor, inverse: Tensor, missing: Tensor) -> None:
        """See `Pairs.add_weighted`."""
        high, low, lengths = self._pieces
        one = missing.amax().clamp(min=2.0**-100) / _LARGEST_WEIGHT
        scaled = F.pad(inverse / one, (0, len(high) - len(inverse)))
        (a, d), n = self._shape, self._num_keys
        parts = _weighted(high, low, lengths, scaled, one / _UNIT, self._scale, a, n, d, self._exact)
        gradient.add_(parts.sum(dim=0))


def _pieces(keys: Tensor) -> Pieces:
    n, d = keys.shape
    whole = F.pad(keys * _UNIT, (0, max(64, triton.next_power_of_2(d)) - d, 0, -n % _ROWS))
    high = whole.half()
    lengths = 1 / high.float().norm(dim=1).clamp(min=1)  # rows of padding have none
    return Pieces(high, (whole - high).half(), lengths)


# ---------------------------------------------------------------------- operators, so that fake tensors can pass


@torch.library.custom_op("scaler::nt_xent_sums", mutates_args=())
def _sums(
    high: Tensor, low: Tensor, lengths: Tensor, scale: float, a: int, n: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Σ 2^score of the others and their highest score, [parts, a] each: of each part of the keys, see `sums_kernel`."""
    width = high.shape[1]
    use = blocks(width, exact=exact, backward=False)
    num_blocks, parts, per_part = _grid(use, a, n, width)
    others, best = (high.new_empty(parts, a, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(high):  # where Triton launches
        sums_kernel[num_blocks, parts](
            high, low, lengths, others, best, scale, a, n, per_part, width=width, block_a=use.anchors, block_n=use.keys,
            exact=exact, num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
    return others, best


@_sums.register_fake
def _(high: Tensor, low: Tensor, lengths: Tensor, scale: float, a: int, n: int, exact: bool) -> tuple[Tensor, Tensor]:
    _, parts, _ = _grid(blocks(high.shape[1], exact=exact, backward=False), a, n, high.shape[1])
    return high.new_empty(parts, a, dtype=torch.float32), high.new_empty(parts, a, dtype=torch.float32)


@torch.library.custom_op("scaler::nt_xent_weighted", mutates_args=())
def _weighted(
    high: Tensor, low: Tensor, lengths: Tensor, inverse: Tensor, unit: Tensor, scale: float, a: int, n: int, d: int,
    exact: bool,
) -> Tensor:  # fmt: skip
    """Σ_j weight_ij z_j, [parts, a, d]: of each part of the keys, see `weighted_kernel`."""
    width = high.shape[1]
    use = blocks(width, exact=exact, backward=True)
    num_blocks, parts, per_part = _grid(use, a, n, width)
    out = high.new_empty(parts, a, d, dtype=torch.float32)
    with torch.cuda.device_of(high):  # where Triton launches
        weighted_kernel[num_blocks, parts, width // use.channels](
            high, low, lengths, inverse, unit, out, scale, a, n, d, per_part, width=width, block_a=use.anchors,
            block_n=use.keys, channels=use.channels, exact=exact, num_warps=use.warps, num_stages=use.stages,
        )  # fmt: skip
    return out


@_weighted.register_fake
def _(
    high: Tensor, low: Tensor, lengths: Tensor, inverse: Tensor, unit: Tensor, scale: float, a: int, n: int, d: int,
    exact: bool,
) -> Tensor:  # fmt: skip
    _, parts, _ = _grid(blocks(high.shape[1], exact=exact, backward=True), a, n, high.shape[1])
    return high.new_empty(parts, a, d, dtype=torch.float32)


def _grid(use: Blocks, a: int, n: int, width: int) -> tuple[int, int, int]:
    """Blocks of anchors, parts of the keys that programs of the same anchors share, and keys of a part.

    There are as few parts as keep the multiprocessors at work for nine tenths of the time, each of 512 keys or more.
    """
    num_blocks = triton.cdiv(a, use.anchors)

    def busy(parts: int) -> float:
        programs = num_blocks * parts * (width // use.channels)
        return programs / (triton.cdiv(programs, _MULTIPROCESSORS) * _MULTIPROCESSORS)

    choices = range(1, max(1, min(_MOST_PARTS, n // 512)) + 1)
    parts = next((parts for parts in choices if busy(parts) >= 0.9), max(choices, key=busy))
    return num_blocks, parts, triton.cdiv(triton.cdiv(n, parts), use.keys) * use.keys


# ---------------------------------------------------------------------- kernels


@triton.jit
def sums_kernel(
    high, low, lengths, others, best, scale, a, n, per_part,
    width: tl.constexpr, block_a: tl.constexpr, block_n: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """For anchors i of block program_id(0) and keys j of part program_id(1), neither i nor its positive:
    others[part, i] = Σ_j 2^score_ij, best[part, i] = max_j score_ij, where a score is scale · high_i · high_j over the
    lengths, or of both pieces.
    """
    first = tl.program_id(0) * block_a
    rows = first + tl.arange(0, block_a)
    a_high, a_low, row_scale = _anchors(high, low, lengths, scale, first, width, block_a, exact)
    offsets = tl.arange(0, block_n)[:, None] * width + tl.arange(0, width)[None, :]
    total = tl.zeros([block_a], tl.float32)
    top = tl.full([block_a], float("-inf"), tl.float32)
    start = tl.program_id(1) * per_part
    for column in range(start, tl.minimum(start + per_part, n), block_n):
        column = tl.multiple_of(column, block_n)
        begin = column.to(tl.int64) * width
        k_high = tl.load(high + begin + offsets)
        k_low = k_high
        if exact:
            k_low = tl.load(low + begin + offsets)
        scores = _scores(a_high, a_low, k_high, k_low, row_scale, lengths + column, block_n, exact)
        scores = _without_pairs(scores, first, column, a, n, block_a, block_n)
        top = tl.maximum(top, tl.max(scores, axis=1))
        total += tl.sum(tl.exp2(scores), axis=1)
    out = tl.program_id(1).to(tl.int64) * a + rows
    tl.store(others + out, total, mask=rows < a)
    tl.store(best + out, top, mask=rows < a)


@triton.jit
def weighted_kernel(
    high, low, lengths, inverse, unit, out, scale, a, n, d, per_part,
    width: tl.constexpr, block_a: tl.constexpr, block_n: tl.constexpr, channels: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """For anchors i of block program_id(0), keys j of part program_id(1), neither i nor its positive, and `channels`
    channels, from program_id(2) on: out[part, i] = Σ_j unit · weight_ij (high_j + low_j), where a weight, which fits
    into fp16, is 2^score_ij (inverse_i + inverse_j).
    """
    first = tl.program_id(0) * block_a
    rows = first + tl.arange(0, block_a)
    mine = tl.program_id(2) * channels
    a_high, a_low, row_scale = _anchors(high, low, lengths, scale, first, width, block_a, exact)
    row_inverse = tl.load(inverse + rows)
    one = tl.load(unit)
    offsets = tl.arange(0, block_n)[:, None] * width + tl.arange(0, width)[None, :]
    my_offsets = tl.arange(0, block_n)[:, None] * width + tl.arange(0, channels)[None, :]
    total = tl.zeros([block_a, channels], tl.float32)
    start = tl.program_id(1) * per_part
    for column in range(start, tl.minimum(start + per_part, n), block_n):
        column = tl.multiple_of(column, block_n)
        begin = column.to(tl.int64) * width
        k_high = tl.load(high + begin + offsets)
        k_low = k_high
        if exact or width == channels:
            k_low = tl.load(low + begin + offsets)
        scores = _scores(a_high, a_low, k_high, k_low, row_scale, lengths + column, block_n, exact)
        scores = _without_pairs(scores, first, column, a, n, block_a, block_n)
        column_inverse = tl.load(inverse + column + tl.arange(0, block_n))
        weights = tl.exp2(scores) * (row_inverse[:, None] + column_inverse[None, :])
        if width != channels:
            k_high = tl.load(high + begin + mine + my_offsets)
            k_low = tl.load(low + begin + mine + my_offsets)
        w_high = weights.to(tl.float16)
        part = tl.dot(w_high, k_low)  # what is small comes first: the less is rounded
        if exact:
            part = tl.dot((weights - w_high.to(tl.float32)).to(tl.float16), k_high, part)
        part = tl.dot(w_high, k_high, part)
        total = tl.fma(part, one, total)  # not `+`, which would be done inside the product
    to_channels = mine + tl.arange(0, channels)
    to = (tl.program_id(1).to(tl.int64) * a + rows)[:, None] * d + to_channels[None, :]
    tl.store(out + to, total, mask=(rows < a)[:, None] & (to_channels < d)[None, :])


@triton.jit
def _anchors(
    high, low, lengths, scale, first, width: tl.constexpr, block_a: tl.constexpr, exact: tl.constexpr
):  # fmt: skip
    """A block's anchors in pieces (without the low ones: the high ones again), and what their scores are times."""
    rows = first + tl.arange(0, block_a)
    offsets = rows.to(tl.int64)[:, None] * width + tl.arange(0, width)[None, :]
    a_high = tl.load(high + offsets)
    a_low = a_high
    row_scale = tl.full([block_a], 1.0, tl.float32) * scale
    if exact:
        a_low = tl.load(low + offsets)
    else:
        row_scale *= tl.load(lengths + rows)
    return a_high, a_low, row_scale


@triton.jit
def _scores(a_high, a_low, k_high, k_low, row_scale, lengths, block_n: tl.constexpr, exact: tl.constexpr):
    """[anchors, keys], of numbers in two pieces or of the high ones; what is small comes first."""
    if exact:
        scores = tl.dot(a_low, tl.trans(k_high))
        scores = tl.dot(a_high, tl.trans(k_low), scores)
        scores = tl.dot(a_high, tl.trans(k_high), scores)
    else:
        column_scale = tl.load(lengths + tl.arange(0, block_n))  # before the product, which hides the wait
        scores = tl.dot(a_high, tl.trans(k_high)) * column_scale[None, :]
    return scores * row_scale[:, None]


@triton.jit
def _without_pairs(scores, first, column, a, n, block_a: tl.constexpr, block_n: tl.constexpr):
    """-inf instead of an anchor's score with itself, with its positive and with padding: few tiles have one."""
    end, m = column + block_n, a // 2
    itself = (column < first + block_a) & (end > first)
    above = (column < first + m + block_a) & (end > first + m)
    below = (column < first - m + block_a) & (end > first - m)
    if itself | above | below | (end > n):
        rows = (first + tl.arange(0, block_a))[:, None]
        columns = (column + tl.arange(0, block_n))[None, :]
        positives = tl.where(rows < m, rows + m, rows - m)
        scores = tl.where((columns != rows) & (columns != positives) & (columns < n), scores, float("-inf"))
    return scores

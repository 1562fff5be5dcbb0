"""JPEGs on their way to a GPU that decodes them: the files of a micro-batch and where its views are cut from them.

A worker makes an `Encoded` (`Packing`), the loader gives it the samples' `Source`, shards/device_decode.py makes pixels
of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shards.decode import Seconds, View, decode_into, plan
from shards.gpu_jpeg import why_not_on_gpu
from shards.image_header import inspect
from shards.order import Ints
from shards.resize import Pixels

CUT_FIELDS = 9  # of a `shards.resize.Cut`, whole numbers where a picture is decoded in full


class Source(Protocol):
    """Whoever has the samples of a micro-batch, and decodes them on the CPU."""

    def redo(self, batch: Mapping[str, Any], row: int, out: Sequence[Pixels]) -> None:
        """Fill `out` (uint8 [count, 3, size, size] a view) with the picture of a row of `batch`, or with its
        replacement, whose label and record then go into `batch`."""


@dataclass(frozen=True)
class Encoded:
    """What of a micro-batch of m samples is decoded on a device, by itself or with the rest.

    Attributes:
        data: uint8 [bytes]: the files, one after the other.
        offsets: int64 [files + 1]: where each begins, and where the last ends.
        sizes: int64 [files, 2]: height and width of each.
        rows: int64 [files]: places in the micro-batch.
        rest: int64 [m - files]: places of the others, which the worker decoded; the batch's `views` hold these alone,
            uint8 [count, m - files, 3, size, size].
        reasons: why, and how many of them.
        cuts: int64 [files, copies, 9], a `shards.resize.Cut` for each copy of each view, in the order of the views.
        interpolations: of each view, bicubic or bilinear.
        images: int64 [m]: positions in the stream.
        source: whoever has the samples; the loader says it.
    """

    data: Tensor
    offsets: Ints
    sizes: Ints
    rows: Ints
    rest: Ints
    reasons: Mapping[str, int]
    cuts: Ints
    interpolations: Mapping[str, str]
    images: Ints
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def file(self, i: int) -> Tensor:
        """The bytes of one file, uint8, without a copy."""
        return self.data[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def pin_memory(self) -> Encoded:
        """The same with its files in pinned memory, as torch's DataLoader asks for it."""
        return replace(self, data=self.data.pin_memory()) if len(self.data) else self


@dataclass
class Packing:
    """The rows of a micro-batch as they come: files for a device, and pixels of what the CPU has to decode."""

    views: Sequence[View]
    max_pixels: int
    files: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    cuts: list[Any] = field(default_factory=list)
    pixels: list[list[Pixels]] = field(default_factory=list)  # of each of the rest, a view each

    def add(self, row: int, data: bytes, *, draws: Sequence[NDArray[np.float64]], seconds: Seconds) -> None:
        """Take in the next row.

        Raises:
            DecodeError: the file cannot be used; nothing has been taken in.
        """
        with seconds.spent("decode"):
            info = inspect(data, max_pixels=self.max_pixels)
            reason = why_not_on_gpu(data, info)
            if reason is None:
                plans = [plan(view, info, numbers) for view, numbers in zip(self.views, draws, strict=True)]
                self.cuts.append([cut for cuts in plans for cut in cuts])
                self.files.append(data)
                self.sizes.append((info.height, info.width))
                self.rows.append(row)
                return
        out = [np.empty((view.count, 3, view.size, view.size), dtype=np.uint8) for view in self.views]
        decode_into(out, data, views=self.views, draws=draws, max_pixels=self.max_pixels, seconds=seconds)
        self.pixels.append(out)
        self.rest.append(row)
        self.reasons[reason] += 1

    def pack(self, images: Ints, *, new: Callable[[tuple[int, ...]], Tensor]) -> tuple[dict[str, Tensor], Encoded]:
        """The views of the rest, and what goes to the device; pixels and files lie in memory from `new`."""
        views = {}
        for i, view in enumerate(self.views):
            views[view.name] = new((view.count, len(self.rest), 3, view.size, view.size))
            for k, out in enumerate(self.pixels):
                views[view.name].numpy()[:, k] = out[i]
        copies = sum(view.count for view in self.views)
        offsets = np.cumsum([0, *map(len, self.files)], dtype=np.int64)
        data = new((int(offsets[-1]),))
        for file, start in zip(self.files, offsets.tolist(), strict=False):
            data.numpy()[start : start + len(file)] = np.frombuffer(file, dtype=np.uint8)
        encoded = Encoded(
            data=data,
            offsets=offsets,
            sizes=np.array(self.sizes, dtype=np.int64).reshape(-1, 2),
            rows=np.array(self.rows, dtype=np.int64),
            rest=np.array(self.rest, dtype=np.int64),
            reasons=dict(self.reasons),
            cuts=np.array(self.cuts, dtype=np.int64).reshape(len(self.files), copies, CUT_FIELDS),
            interpolations={view.name: view.interpolation for view in self.views},
            images=images,
        )
        return views, encoded

"""The order of the training stream: arithmetic on one integer, the number of images seen.

N samples, L lanes. Image i belongs to epoch e = i // N and lane l = i mod L. In epoch e the shards are permuted by
(seed, e), and the permuted sequence of N samples is cut into L consecutive ranges, one a lane. With

    t(x, l) = ⌈(x - l) / L⌉                          images of lane l before image x
    c(e, l) = t((e+1) N, l) - t(e N, l)              images of lane l in epoch e

lane l's range has c(e, l) samples and starts at Σ_{j<l} c(e, j); image i reads offset i // L - t(e N, l) of it, after
each block of `shuffle_window` samples of the range has been permuted by (seed, e, lane, block). So every N consecutive
images from a multiple of N on are one epoch exactly, batches may cross epochs and change their size, a start anywhere
costs what a start at zero costs, and nothing depends on workers or ranks. A lane reads its shards front to back.

Shards are permuted by `keyed_permutation` with the keys ("shards", seed, e), blocks by `permute_within` with the keys
("window", seed, e, lane, block). Memory: a few arrays of the length of the shard list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.permute import permute_within
from shards.random import keyed_permutation

_EPOCHS_KEPT = 3  # a batch that crosses an epoch needs two
_DEFAULT_LANES = 64

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of a global batch in lane-major layout: by lane, and within a lane by image number. All int64 [rows]."""

    ids: Ints  # sample ids (positions in the index)
    epochs: Ints
    images: Ints  # positions in the stream


@dataclass(frozen=True)
class ShardNeed:
    """A shard that images of one lane read, all of them among images `first … past - 1` of the stream."""

    first: int
    past: int
    shard: int


class SampleOrder:
    """Which sample is image i of the training stream, for every i.

    Args:
        shard_sizes: samples of every shard, in the order of the index.
        seed: of the order.
        lanes: ranges read side by side (`default_lanes`), at most the number of samples.
        shuffle_window: samples that are shuffled together; 1 reads each lane's range front to back.

    Raises:
        ValueError: no samples, a negative size, or lanes or window out of range.
    """

    def __init__(self, shard_sizes: ArrayLike, *, seed: int, lanes: int, shuffle_window: int) -> None:
        sizes = np.array(shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or sizes.sum() < 1 or sizes.min() < 0:
            raise ValueError(
                f"shard sizes must be a list of counts with at least one sample in all, not {shard_sizes!r}"
            )
        self.num_samples = int(sizes.sum())
        if not 1 <= lanes <= self.num_samples:
            raise ValueError(f"lanes must be between 1 and the number of samples ({self.num_samples}), not {lanes}")
        if not 1 <= shuffle_window <= 2**31:
            raise ValueError(f"shuffle_window must be between 1 and 2**31 samples, not {shuffle_window}")
        self.seed, self.lanes, self.shuffle_window = int(seed), int(lanes), int(shuffle_window)
        self._sizes = sizes
        self._first_ids = np.cumsum(sizes) - sizes
        self._epochs: dict[int, tuple[Ints, Ints]] = {}  # epoch → (permuted shards, ends of their samples)

    def batch(self, start: int, size: int, *, slice_: tuple[int, int] | None = None) -> GlobalBatch:
        """Images start … start + size - 1 of the stream in lane-major layout, or only rows [a, b) of it.

        The cost grows with the rows asked for (and with the lanes and, in a new epoch, the shards), not with `size`.

        Raises:
            ValueError: a negative start, an empty batch, or a slice outside it.
        """
        a, b = (0, size) if slice_ is None else slice_
        if start < 0 or size < 1 or not 0 <= a <= b <= size:
            raise ValueError(f"cannot take rows {a} to {b} of a batch of {size} images from image {start} on")
        lanes = np.arange(self.lanes, dtype=np.int64)
        seen = self._turns(start, lanes)
        ends = np.cumsum(self._turns(start + size, lanes) - seen)  # of every lane's rows in the layout
        rows = np.arange(a, b, dtype=np.int64)
        lane = np.searchsorted(ends, rows, side="right").astype(np.int64)
        ends_before = np.concatenate([[0], ends[:-1]])
        images = (seen[lane] + rows - ends_before[lane]) * self.lanes + lane
        epochs = images // self.num_samples
        ids = np.empty_like(images)
        for epoch in np.unique(epochs).tolist():
            here = slice(None) if epochs[0] == epochs[-1] == epoch and (epochs == epoch).all() else epochs == epoch
            ids[here] = self._ids(epoch, images[here], lane[here])
        return GlobalBatch(ids=ids, epochs=epochs, images=images)

    def shard_needs(self, start: int, *, stop: int | None, lanes: range) -> Iterator[ShardNeed]:
        """The shards that these lanes read for images `start … stop - 1` (`stop` None: endless), by the image that may
        be the first to need them. A shard that two lanes or epochs read comes as often.
        """
        window = self.shuffle_window
        for epoch in itertools.count(start // self.num_samples):
            shards, ends = self._permuted_shards(epoch)
            lane = np.arange(lanes.start, lanes.stop, dtype=np.int64)
            first_image, past_image = epoch * self.num_samples, (epoch + 1) * self.num_samples
            turns = self._turns(first_image, lane)
            counts = self._turns(past_image, lane) - turns
            begins = self._images_in_lanes_below(past_image, lane) - self._images_in_lanes_below(first_image, lane)
            tables = [np.empty((0, 3), dtype=np.int64)]  # a lane's first, past, shard in each row
            for number, turn, count, begin in zip(lanes, turns.tolist(), counts.tolist(), begins.tolist(), strict=True):
                k = np.arange(np.searchsorted(ends, begin, "right"), np.searchsorted(ends, begin + count) + 1)
                sizes = self._sizes[shards[k]]
                low = np.maximum(ends[k] - sizes - begin, 0)  # the shard's offsets in the lane's range
                high = np.minimum(ends[k] - begin, count)
                last = np.minimum(-(-high // window) * window, count) - 1  # of the block that `high - 1` is in
                first = turn + low // window * window
                rows = np.stack(
                    [first * self.lanes + number, (turn + last) * self.lanes + number + 1, shards[k]], axis=1
                )
                tables.append(rows[(sizes > 0) & (count > 0)])
            table = np.concatenate(tables)
            for row in table[np.argsort(table[:, 0], kind="stable")].tolist():
                if stop is not None and row[0] >= stop:
                    return
                if row[1] > start:
                    yield ShardNeed(*row)

    def _ids(self, epoch: int, images: Ints, lane: Ints) -> Ints:
        """Sample ids of images of one epoch."""
        first, past = epoch * self.num_samples, (epoch + 1) * self.num_samples
        turn = self._turns(first, lane)
        count = self._turns(past, lane) - turn
        start = self._images_in_lanes_below(past, lane) - self._images_in_lanes_below(first, lane)
        offset = images // self.lanes - turn
        block = offset // self.shuffle_window
        block_start = block * self.shuffle_window
        block_size = np.minimum(self.shuffle_window, count - block_start)
        shuffled = permute_within(offset - block_start, block_size, "window", self.seed, epoch, lane, block)
        position = start + block_start + shuffled  # in the permuted sequence
        shards, ends = self._permuted_shards(epoch)
        k = np.searchsorted(ends, position, side="right")
        shard = shards[k]
        return self._first_ids[shard] + position - (ends[k] - self._sizes[shard])

    def _turns(self, image: int, lane: Ints) -> Ints:
        """t(image, lane): how many images of the lane come before `image`."""
        return (image - lane + self.lanes - 1) // self.lanes

    def _images_in_lanes_below(self, image: int, lane: Ints) -> Ints:
        """Σ_{j < lane} t(image, j), in closed form: whole turns of all lanes, then the begun one."""
        return image // self.lanes * lane + np.minimum(image % self.lanes, lane)

    def _permuted_shards(self, epoch: int) -> tuple[Ints, Ints]:
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            shards = keyed_permutation(len(self._sizes), "shards", self.seed, epoch)
            self._epochs[epoch] = shards, np.cumsum(self._sizes[shards])
        return self._epochs[epoch]


def default_lanes(num_samples: int, batch_sizes: Sequence[int]) -> int:
    """gcd(64, every global batch size used), never above the number of samples."""
    return min(math.gcd(_DEFAULT_LANES, *batch_sizes), num_samples)

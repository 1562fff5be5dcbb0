"""Batches for one rank: the training stream from any image on, and one pass for evaluation.

The main process does arithmetic only: it turns the number of images seen into requests (which samples, at which rows of
the global batch), one a micro-batch; shards/workers.py makes the pixels. Every pixel is a function of its request, so
the numbers of workers and ranks change nothing. Of remote shards a third process fetches those that come next
(shards/ahead.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from shards.ahead import reading_ahead
from shards.decode import DEFAULT_MAX_PIXELS, View
from shards.index import ShardIndex
from shards.order import Ints, SampleOrder, ShardNeed
from shards.workers import Batch, EvaluationBatches, Request, TrainingBatches, run_workers

_EVALUATION_AHEAD = 8  # shards fetched before they are needed


class ShardLoader:
    """This rank's micro-batches of the training stream, in order.

    Iterating starts at image number `start` each time and ends before the first batch at or after `stop` (None: never).
    Rank r takes rows [r B / R, (r + 1) B / R) of every global batch, `micro_batch_size` at a time. A micro-batch is

        views               {name: uint8 [count, m, 3, size, size]}
        ids, epochs         int64 [m]: which sample, in which epoch
        positions           int64 [m]: row in the global batch
        labels              int64 [m]: of the picture shown, -1 where there is none
        rejected            list of dicts: image, epoch, id, key, source, shard, reason, replacement_id, replacement_key
        global_batch_size   int
        image_number        int: images before this global batch
        seconds             {read, decode, resize: float}: what the worker took
        encoded             with `decode` gpu: JPEGs that are still to be decoded (shards/device_decode.py does it)

    A sample that cannot be decoded is replaced by the next decodable one of its shard (cyclic), cut with the random
    numbers of the sample that it replaces; `ids` keeps the latter.

    Args:
        num_workers: loader processes; 0 does the work in this one. `prefetch` micro-batches are kept ready by each.
        ranks_per_node: that share the cache of remote shards; each gets its part of the bound.
        read_ahead: fetch whole remote shards before they are needed; without it only what is read is fetched.
        multiprocessing_context: how workers start: fork, spawn or forkserver (None: the system's default).
        decode: cpu (in the workers), or gpu: JPEGs that a GPU can decode are handed on as they are, and `views` hold
            the other samples alone.

    Raises:
        ValueError: an order of other shards, a batch that does not divide, or a rank out of range; while iterating, a
            shard that is missing, cut off, or holds nothing that can be decoded.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: SampleOrder,
        *,
        views: Sequence[View],
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        ranks_per_node: int = 1,
        num_workers: int = 0,
        start: int = 0,
        stop: int | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        prefetch: int = 2,
        read_ahead: bool = True,
        multiprocessing_context: str | None = None,
        decode: str = "cpu",
    ) -> None:
        if decode not in ("cpu", "gpu"):
            raise ValueError(f"decode must be cpu or gpu, not {decode!r}")
        if order.num_samples != index.num_samples:
            raise ValueError(f"the order is one of {order.num_samples} samples, {index.path} has {index.num_samples}")
        if len({view.name for view in views}) != len(views) or not views:
            raise ValueError(f"views need names that differ, not {[view.name for view in views]}")
        if start < 0:
            raise ValueError(f"start is the number of images seen, not {start}")
        check_rank(rank, world_size)
        self.accumulation = accumulation_steps(
            global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
        )
        self.order, self.global_batch_size, self.micro_batch_size = order, global_batch_size, micro_batch_size
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop
        self.index, self.ranks_per_node, self.read_ahead = index, ranks_per_node, read_ahead
        self._samples = TrainingBatches(index, views=views, seed=seed, max_pixels=max_pixels, decode=decode)
        self._run = partial(
            run_workers,
            self._samples,
            num_workers=num_workers,
            prefetch=prefetch,
            multiprocessing_context=multiprocessing_context,
        )

    def __iter__(self) -> Iterator[Batch]:
        lanes = rank_lanes(self.order, self.global_batch_size, rank=self.rank, world_size=self.world_size)
        needs = partial(self.order.shard_needs, self.start, stop=self.stop, lanes=lanes)
        share, ahead = _share(self.index, self.ranks_per_node), 2 * len(lanes)
        index = self.index if self.read_ahead else None
        with reading_ahead(index, needs, start=self.start, share=share, ahead=ahead) as advance:
            for batch in self._run(self._requests()):
                advance(batch["image_number"])
                if "encoded" in batch:
                    batch["encoded"] = replace(batch["encoded"], source=self._samples)
                yield batch

    def _requests(self) -> Iterator[Request]:
        size, micro = self.global_batch_size, self.micro_batch_size
        first = self.rank * size // self.world_size
        past = (self.rank + 1) * size // self.world_size
        start = self.start
        while self.stop is None or start < self.stop:
            batch = self.order.batch(start, size, slice_=(first, past))
            for a in range(0, past - first, micro):
                part = slice(a, a + micro)
                positions = np.arange(first + a, first + a + micro, dtype=np.int64)
                yield Request(batch.ids[part], batch.epochs[part], batch.images[part], positions, size, start)
            start += size


def evaluation_batches(
    index: ShardIndex,
    *,
    view: View,
    batch_size: int,
    ids: Ints | None = None,
    rank: int = 0,
    world_size: int = 1,
    ranks_per_node: int = 1,
    num_workers: int = 0,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    prefetch: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Batch]:
    """Every sample once, in index order: consecutive blocks of `batch_size` go round the ranks.

    With `ids`, int64 in ascending order, only these samples; of remote shards those are then fetched whole of which at
    least half is wanted.

    All ranks get the same number of batches. Each is

        images      uint8 [batch_size, 3, size, size]
        ids         int64 [batch_size], -1 for padding
        labels      int64 [batch_size], -1 where there is none
        weights     float32 [batch_size]: 1, or 0 for padding and for samples that cannot be decoded (both black)
        rejected    list of dicts with id, key, source, shard and reason: the samples that cannot be decoded

    Raises:
        ValueError: a view with randomness, a rank or batch size out of range; while iterating, a shard that is missing
            or cut off.
    """
    check_rank(rank, world_size)
    if view.kind != "center" or view.count != 1:
        raise ValueError(f"evaluation needs one view of kind center, not {view.count} of kind {view.kind}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    count = index.num_samples if ids is None else len(ids)

    def blocks() -> Iterator[Ints]:
        for first in range(0, count, batch_size * world_size):
            at = np.arange(first + rank * batch_size, first + (rank + 1) * batch_size, dtype=np.int64)
            known = np.minimum(at, count - 1)
            yield np.where(at < count, known if ids is None else ids[known], -1)

    def stream() -> Iterator[Batch]:
        share, needs = _share(index, ranks_per_node), partial(_in_order, index, ids)
        with reading_ahead(index, needs, start=0, share=share, ahead=_EVALUATION_AHEAD) as advance:
            batches = run_workers(
                EvaluationBatches(index, view=view, max_pixels=max_pixels),
                blocks(),
                num_workers=num_workers,
                prefetch=prefetch,
                multiprocessing_context=multiprocessing_context,
            )
            for number, batch in enumerate(batches):
                advance(number * batch_size * world_size)
                yield batch

    return stream()


def _in_order(index: ShardIndex, ids: Ints | None) -> Iterator[ShardNeed]:
    """The shards that hold at least half a shard of the wanted samples (None: all), in index order."""
    sizes = index.shard_sizes
    wanted = sizes if ids is None else np.bincount(index.locate(ids)[0], minlength=len(sizes))
    for shard, past in enumerate(np.cumsum(wanted).tolist()):
        count = int(wanted[shard])
        if count and 2 * count >= sizes[shard]:
            yield ShardNeed(past - count, past, shard)


def _share(index: ShardIndex, ranks_per_node: int) -> int:
    """Bytes of the node's cache that one rank may hold."""
    return 0 if index.cache is None else index.cache.max_bytes // ranks_per_node


def rank_lanes(order: SampleOrder, global_batch_size: int, *, rank: int, world_size: int) -> range:
    """The lanes that a rank reads; where the lanes do not divide the batch, all that any of its batches may touch."""
    size, lanes = global_batch_size, order.lanes
    slack = lanes if size % lanes else 0  # a lane's rows lie up to lanes / 4 rows from where they are on average
    unit = 4 * size * world_size  # of a lane in quarters
    first = (4 * rank * size - slack * world_size) * lanes // unit
    past = -(-(4 * (rank + 1) * size + slack * world_size) * lanes // unit)
    return range(max(0, first), min(lanes, past))


def accumulation_steps(global_batch_size: int, *, micro_batch_size: int, world_size: int) -> int:
    """How many micro-batches each rank takes per global batch; `ValueError` with the nearest choices unless whole."""
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise ValueError(
            "global batch, micro-batch and ranks must be at least 1, "
            f"not {global_batch_size}, {micro_batch_size} and {world_size}"
        )
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0:
        return global_batch_size // unit
    low = global_batch_size // unit * unit
    choices = f"a global batch of {' or '.join(str(size) for size in (low, low + unit) if size)}"
    if global_batch_size % world_size == 0:
        per_rank = global_batch_size // world_size
        divisors = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        below = [m for m in divisors if m < micro_batch_size][-1:]
        above = [m for m in divisors if m > micro_batch_size][:1]
        choices += f", or a micro-batch of {' or '.join(map(str, below + above))}"
    raise ValueError(
        f"a global batch of {global_batch_size} is not {micro_batch_size} (micro-batch) x {world_size} (ranks) x a "
        f"whole number; nearest valid choices: {choices}"
    )


def check_rank(rank: int, world_size: int) -> None:
    """`ValueError` unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 … world_size - 1, not {rank} of {world_size}")


def working_set_bytes(index: ShardIndex, order: SampleOrder) -> int:
    """An estimate of the bytes that are read in random order at a time: one window of average samples per lane."""
    samples = min(order.lanes * order.shuffle_window, index.num_samples)
    return samples * index.num_bytes // index.num_samples


def cached_set_bytes(index: ShardIndex, order: SampleOrder, *, num_nodes: int) -> int:
    """An estimate of the bytes of remote shards that a node has to keep so that it fetches none twice an epoch: per
    lane the shards that a window touches, and the next one."""
    shards_per_lane = order.shuffle_window * len(index.shard_names) / index.num_samples + 2
    lanes = -(-order.lanes // num_nodes)
    return min(int(lanes * shards_per_lane * index.num_bytes / len(index.shard_names)), index.num_bytes)

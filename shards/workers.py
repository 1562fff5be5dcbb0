"""What a loader process does: read the samples of one request, decode and cut them, replace what cannot be decoded.

Where a GPU is to decode, it finds out instead which files that can take and where their views are cut, and decodes the
others.

`run_workers` puts that on torch's DataLoader, any number of processes, results in the order of the requests. What a
user can cause (a missing shard, one that holds no picture) comes back as data and is raised in the main process as a
plain one-line ValueError; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import atexit
import math
import signal
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from shards.decode import DecodeError, Seconds, View, decode_into, draw
from shards.encoded import Encoded, Packing
from shards.index import ShardIndex, Span
from shards.order import Ints
from shards.reader import SampleReader
from shards.resize import Pixels

Batch = dict[str, Any]
T = TypeVar("T")
_GRACE = 30  # seconds that a worker goes on after SIGTERM; torchrun gives the main process as many


@dataclass(frozen=True)
class Request:
    """One micro-batch of the training stream to be made; the arrays are int64 [m]."""

    ids: Ints
    epochs: Ints
    images: Ints  # positions in the stream
    positions: Ints  # rows of the global batch
    global_batch_size: int
    image_number: int  # images before the global batch


@dataclass(frozen=True)
class Failure:
    """An error on its way to the main process: one line for the user, and where it came from."""

    message: str
    details: str


class TrainingBatches(Dataset["Batch | Failure"]):
    """`Request` → micro-batch, as `ShardLoader` describes it."""

    def __init__(
        self, index: ShardIndex, *, views: Sequence[View], seed: int, max_pixels: int, decode: str = "cpu"
    ) -> None:
        self.index, self.views, self.seed, self.max_pixels = index, list(views), seed, max_pixels
        self.decode = decode
        self.reader = SampleReader(index)

    def __getitem__(self, request: Request) -> Batch | Failure:
        size, seconds = len(request.ids), Seconds()
        draws = self._draw(request.epochs, request.ids)
        views: dict[str, Tensor] = {}
        packing = Packing(self.views, self.max_pixels) if self.decode == "gpu" else None
        if packing is None:
            views = {v.name: new_pixels((v.count, size, 3, v.size, v.size)) for v in self.views}
        arrays = [pixels.numpy() for pixels in views.values()]
        labels = torch.empty(size, dtype=torch.int64)
        rejected: list[dict[str, Any]] = []
        try:
            for row, wanted in enumerate(self.index.spans(request.ids)):
                numbers = [drawn[row] for drawn in draws]
                if packing is None:
                    use = self._cut_into([array[:, row] for array in arrays], numbers, seconds)
                else:
                    use = partial(packing.add, row, draws=numbers, seconds=seconds)
                shown, reason = self._show(wanted, use, seconds)
                labels[row] = shown.label
                if reason is not None:
                    image, epoch = int(request.images[row]), int(request.epochs[row])
                    rejected.append(self._replaced(wanted, shown, reason, image=image, epoch=epoch))
        except ValueError as error:
            return Failure(str(error), traceback.format_exc())
        encoded = None
        if packing is not None:
            views, encoded = packing.pack(request.images, new=new_pixels)
        return training_batch(request, views=views, labels=labels, rejected=rejected, seconds=seconds, encoded=encoded)

    def redo(self, batch: Mapping[str, Any], row: int, out: Sequence[Pixels]) -> None:
        """See `shards.encoded.Source.redo`: what this class does where no device decodes, one row of it."""
        epoch, image = int(batch["epochs"][row]), int(batch["encoded"].images[row])
        (wanted,) = self.index.spans([int(batch["ids"][row])])
        numbers = self._draw(np.array([epoch]), np.array([wanted.id]))
        seconds = Seconds()
        use = self._cut_into(out, [drawn[0] for drawn in numbers], seconds)
        shown, reason = self._show(wanted, use, seconds)
        batch["labels"][row] = shown.label
        batch["rejected"][:] = [record for record in batch["rejected"] if record["image"] != image]
        if reason is not None:
            batch["rejected"].append(self._replaced(wanted, shown, reason, image=image, epoch=epoch))
            batch["rejected"].sort(key=lambda record: batch["encoded"].images.tolist().index(record["image"]))

    def _draw(self, epochs: Ints, ids: Ints) -> list[NDArray[np.float64]]:
        return [draw(view, seed=self.seed, epoch=epochs, sample_id=ids) for view in self.views]

    def _cut_into(
        self, out: Sequence[Pixels], numbers: Sequence[NDArray[np.float64]], seconds: Seconds
    ) -> Callable[[bytes], None]:
        return partial(decode_into, out, views=self.views, draws=numbers, max_pixels=self.max_pixels, seconds=seconds)

    def _replaced(self, wanted: Span, shown: Span, reason: str, *, image: int, epoch: int) -> dict[str, Any]:
        """The record of a sample for which another one is shown."""
        return {
            "image": image,
            "epoch": epoch,
            **describe(self.index, wanted.id, reason),
            "replacement_id": shown.id,
            "replacement_key": self.index.entry(shown.id).key,
        }

    def _show(self, wanted: Span, use: Callable[[bytes], None], seconds: Seconds) -> tuple[Span, str | None]:
        """Give the file of a sample to `use`, or that of the next sample of its shard for which `use` raises no
        DecodeError; (which, why not the wanted one)."""
        reason = None
        for shown in self._from(wanted):
            data = _read(self.reader, shown, seconds)
            try:
                use(data)
                return shown, reason
            except DecodeError as error:
                reason = reason or str(error)
        raise ValueError(
            f"shard {self.index.shard_path(wanted.shard)}: none of its {self.index.shard_sizes[wanted.shard]} samples "
            f"can be decoded ({self.index.entry(wanted.id).key!r}: {reason}); take it out and run "
            f"`scaler index {self.index.path}`"
        )

    def _from(self, sample: Span) -> Iterator[Span]:
        """The sample and then, cyclic, the others of its shard."""
        yield sample
        local, size = int(self.index.locate(sample.id)[1]), int(self.index.shard_sizes[sample.shard])
        for k in range(1, size):
            yield from self.index.spans([sample.id - local + (local + k) % size])


class EvaluationBatches(Dataset["Batch | Failure"]):
    """Sample ids, int64 [m] with -1 for padding → batch, as `evaluation_batches` describes it."""

    def __init__(self, index: ShardIndex, *, view: View, max_pixels: int) -> None:
        self.index, self.view, self.max_pixels = index, view, max_pixels
        self.reader = SampleReader(index)

    def __getitem__(self, ids: Ints) -> Batch | Failure:
        images, seconds = new_pixels((len(ids), 3, self.view.size, self.view.size)), Seconds()
        array = images.numpy()
        labels = torch.full((len(ids),), -1, dtype=torch.int64)
        weights = torch.zeros(len(ids))
        rejected = []
        drawn = [draw(self.view, seed=0, epoch=0, sample_id=0)]
        images[np.flatnonzero(ids < 0)] = 0
        rows = np.flatnonzero(ids >= 0)
        options: dict[str, Any] = {"views": [self.view], "draws": drawn, "max_pixels": self.max_pixels}
        try:
            for row, sample in zip(rows.tolist(), self.index.spans(ids[rows]), strict=True):
                labels[row] = sample.label
                data = _read(self.reader, sample, seconds)
                try:
                    decode_into([array[row : row + 1]], data, **options, seconds=seconds)
                    weights[row] = 1.0
                except DecodeError as error:
                    images[row] = 0
                    rejected.append(describe(self.index, sample.id, str(error)))
        except ValueError as error:
            return Failure(str(error), traceback.format_exc())
        return {
            "images": images,
            "ids": torch.from_numpy(ids),
            "labels": labels,
            "weights": weights,
            "rejected": rejected,
            "seconds": vars(seconds),
        }


def training_batch(
    request: Request,
    *,
    views: dict[str, Tensor],
    labels: Tensor,
    rejected: list[dict[str, Any]],
    seconds: Seconds,
    encoded: Encoded | None = None,
) -> Batch:
    """What was made for `request`, as `ShardLoader` describes it."""
    batch = {
        "views": views,
        "ids": torch.from_numpy(request.ids),
        "epochs": torch.from_numpy(request.epochs),
        "positions": torch.from_numpy(request.positions),
        "labels": labels,
        "rejected": rejected,
        "global_batch_size": request.global_batch_size,
        "image_number": request.image_number,
        "seconds": vars(seconds),
    }
    return batch if encoded is None else {**batch, "encoded": encoded}


def new_pixels(shape: tuple[int, ...]) -> Tensor:
    """uint8, not initialised; in a worker process in memory that the main process gets without a copy."""
    if get_worker_info() is None or not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def _read(reader: SampleReader, sample: Span, seconds: Seconds) -> bytes:
    """The bytes that were indexed: what a disk or a network has changed since is an error, never other pixels, and no
    bad picture either, which would be replaced."""
    started = time.perf_counter()
    data = reader.read(sample)
    if reader.is_local and zlib.crc32(data) != sample.crc32:  # what came over a network is proven by the reader
        index, key = reader.index, reader.index.entry(sample.id).key
        raise ValueError(
            f"shard {index.shard_path(sample.shard)} is damaged: {key!r} is not what was indexed (its crc32 is "
            f"another); copy the shard again, or run `scaler index {index.path}` if the change is meant"
        )
    seconds.read += time.perf_counter() - started
    return data


def describe(index: ShardIndex, id: int, reason: str) -> dict[str, Any]:
    """The record of a sample that cannot be decoded: id, key, source, shard (file name) and reason."""
    entry = index.entry(id)
    return {
        "id": id,
        "key": entry.key,
        "source": entry.source,
        "shard": index.shard_names[entry.shard],
        "reason": reason,
    }


def run_workers(
    dataset: Dataset[Batch | Failure],
    requests: Iterator[Any],
    *,
    num_workers: int,
    prefetch: int,
    multiprocessing_context: str | None,
) -> Iterator[Batch]:
    """`dataset[request]` for every request, in order, made by `num_workers` processes (0: here).

    The processes end when the iterator is exhausted, closed or garbage, and some seconds after this process has died
    (torch's watchdog in them). Batches are in pinned memory where there is CUDA.

    Raises:
        ValueError: what a request failed with, in one line (where it came from is in the exception's notes).
    """
    loader: DataLoader[Batch | Failure] = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,  # consumed in this process
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        generator=torch.Generator(),  # DataLoader draws a seed that nobody uses: not from the global generator
    )
    batches = iter(loader)
    # A traceback may keep this iterator alive until the interpreter ends, which would then wait for the workers.
    shut_down = getattr(batches, "_shutdown_workers", lambda: None)
    atexit.register(shut_down)
    try:
        for batch in batches:
            if isinstance(batch, Failure):
                error = ValueError(batch.message)
                error.add_note(batch.details)
                raise error
            yield batch
    finally:
        atexit.unregister(shut_down)
        shut_down()


def _identity(value: T) -> T:
    return value


def _start_worker(_: int) -> None:
    """One thread a worker. Signals are the main process's affair: Ctrl-C, Slurm's warning and the SIGTERM with which
    torchrun stops a run reach the whole group, and the main process needs its batches until it has saved.

    Workers end when the main process tells them to, within seconds of its death, which torch has them look for, and in
    any case `_GRACE` seconds after a SIGTERM.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))

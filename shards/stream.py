"""Training straight from shards that have no index: whatever webdataset opens, drawn with replacement, without end.

webdataset expands the list of sources (braces, `::`), opens each (files, http, gs, hf, `pipe:` where the user lets it),
groups members to samples and shuffles them; tars are walked by shards/tar.py, which tells damage from their end, and
pictures are decoded by shards/decode.py: webdataset's own decoders would unpickle. Schemes that webdataset does not
know are opened by fsspec.

Without an index nobody knows how many samples there are or where one lies. So there are no epochs, each worker draws
shards of its own, and a run that is resumed draws anew: what it sees is another sample of the same distribution.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.gopen import gopen, gopen_schemes, rewrite_url
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from shards.decode import DEFAULT_MAX_PIXELS, DecodeError, Seconds, View, decode_into, draw
from shards.folder import IMAGE_EXTENSIONS
from shards.image_header import MAX_IMAGE_BYTES
from shards.loader import accumulation_steps, check_rank
from shards.places import without_secrets
from shards.random import keyed_bits
from shards.storage import printable
from shards.tar import TarStream, read_label, sample_files
from shards.workers import Batch, Failure, Request, new_pixels, run_workers, training_batch

_MAX_BAD = 1000  # samples in a row that cannot be shown
_MAX_EMPTY = 100  # shards in a row without a sample
_PIECE = 1 << 20
_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

Sample = dict[str, Any]  # __key__, __url__, and ending → bytes (b"" for what is not used), `cls` → int


def expand_sources(sources: str, *, allow_pipes: bool) -> list[str]:
    """Paths, URLs and `pipe:` commands of `sources`, as webdataset has it: braces expanded, `::` between several.

    Raises:
        ValueError: nothing is left, braces do not match, a folder, standard input, or a command that is not allowed;
            in one line.
    """
    try:
        urls = [url for url in expand_urls(sources) if url]
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{without_secrets(sources)!r} cannot be expanded: {error}") from None
    if not urls:
        raise ValueError(f"{sources!r} names no shards; write for example shards/train-{{000000..000099}}.tar")
    for url in urls:
        if not allow_pipes and "pipe" in (_scheme(url), _scheme(rewrite_url(url))):  # the environment may rewrite URLs
            raise ValueError(
                f"{without_secrets(url)!r} is a command, and whoever wrote it can do anything on this machine; if you "
                "trust it, set data.allow_pipes=true"
            )
        if url == "-" or os.path.isdir(url):
            raise ValueError(
                f"{url!r} is no shard; name some, as {url.rstrip('/')}/train-{{000000..000099}}.tar, or index the "
                "folder and read it with data.reader=indexed"
            )
    return urls


def resolve_sources(sources: str) -> str:
    """`sources` with full paths and without secrets, for the run's own recipe."""
    parts = sources.split("::")
    return "::".join(without_secrets(part) if _scheme(part) else os.path.abspath(part) for part in parts)


def sources_fingerprint(urls: Sequence[str]) -> str:
    """Of a list of sources, without what is secret in them (and may change)."""
    return "stream:" + hashlib.sha256("\n".join(map(without_secrets, urls)).encode()).hexdigest()


class StreamLoader:
    """This rank's micro-batches of an endless stream, drawn with replacement from `urls`.

    They look like those of `ShardLoader`. `ids` are the images' positions in the stream, `epochs` are 0, and a rejected
    sample is replaced by the next one of its worker (`shard` is its URL). Ranks and workers draw independently of each
    other, by keys of (seed, rank, worker, start): another number of them is another stream.

    Args:
        urls: from `expand_sources`.
        shuffle_window: samples of this rank that are shuffled together; its workers share them.
        start: images seen before; iterating ends before the first batch at or after `stop` (None: never).

    Raises:
        ValueError: a batch that does not divide, or a rank out of range; while iterating, a source that cannot be read
            or is damaged, or too many samples in a row that cannot be shown.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        views: Sequence[View],
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window: int = 1,
        start: int = 0,
        stop: int | None = None,
        image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        prefetch: int = 2,
        multiprocessing_context: str | None = None,
    ) -> None:
        check_rank(rank, world_size)
        self.accumulation = accumulation_steps(
            global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
        )
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop
        source = Source(
            urls,
            image_extensions=image_extensions,
            shuffle_window=-(-shuffle_window // max(1, num_workers)),
            keys=(seed, rank, start),
        )
        self._batches = partial(StreamBatches, source, views=views, seed=seed, max_pixels=max_pixels)
        self._run = partial(
            run_workers, num_workers=num_workers, prefetch=prefetch, multiprocessing_context=multiprocessing_context
        )

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._batches(), self._requests())

    def _requests(self) -> Iterator[Request]:
        size, micro = self.global_batch_size, self.micro_batch_size
        first, past = (r * size // self.world_size for r in (self.rank, self.rank + 1))
        start = self.start
        while self.stop is None or start < self.stop:
            for a in range(first, past, micro):
                positions = np.arange(a, a + micro, dtype=np.int64)
                images = start + positions
                yield Request(images, np.zeros_like(images), images, positions, size, start)
            start += size


class StreamBatches(Dataset["Batch | Failure"]):
    """`Request` → micro-batch of the next samples of this worker's part of the source."""

    def __init__(self, source: Source, *, views: Sequence[View], seed: int, max_pixels: int) -> None:
        self.source, self.views, self.seed, self.max_pixels = source, list(views), seed, max_pixels
        self._samples: Iterator[Sample] | None = None

    def __getitem__(self, request: Request) -> Batch | Failure:
        if self._samples is None:
            worker = get_worker_info()
            self._samples = self.source.samples(worker=0 if worker is None else worker.id)
        size, seconds = len(request.images), Seconds()
        views = {v.name: new_pixels((v.count, size, 3, v.size, v.size)) for v in self.views}
        arrays = [views[view.name].numpy() for view in self.views]
        draws = [draw(view, seed=self.seed, epoch=request.epochs, sample_id=request.ids) for view in self.views]
        labels = torch.empty(size, dtype=torch.int64)
        rejected: list[dict[str, Any]] = []
        try:
            for row, image in enumerate(request.images.tolist()):
                cut = partial(
                    decode_into,
                    [array[:, row] for array in arrays],
                    views=self.views,
                    draws=[drawn[row] for drawn in draws],
                    max_pixels=self.max_pixels,
                    seconds=seconds,
                )
                shown, bad = self._next(self._samples, cut, seconds)
                labels[row] = shown.get("cls", -1)
                position = {"image": image, "epoch": 0, "id": image}
                replacement = {"replacement_id": image, "replacement_key": shown["__key__"]}
                rejected += [{**position, **record, **replacement} for record in bad]
        except ValueError as error:
            return Failure(str(error), traceback.format_exc())
        return training_batch(request, views=views, labels=labels, rejected=rejected, seconds=seconds)

    def _next(
        self, samples: Iterator[Sample], cut: Callable[[bytes], None], seconds: Seconds
    ) -> tuple[Sample, list[dict[str, Any]]]:
        """The next sample that can be shown, and records of those before it that cannot."""
        bad: list[dict[str, Any]] = []
        while True:
            started = time.perf_counter()
            sample = next(samples)
            seconds.read += time.perf_counter() - started
            extension = next((e for e in self.source.image_extensions if e in sample), None)
            try:
                if extension is None:
                    others = ", ".join(name for name in sample if not name.startswith("__"))
                    raise DecodeError(f"no image among its members ({others})")
                cut(sample[extension])
                return sample, bad
            except DecodeError as error:
                key, shard = printable(sample["__key__"]), without_secrets(sample["__url__"])
                source = key if extension is None else f"{key}.{extension}"
                bad.append({"key": key, "source": source, "shard": shard, "reason": str(error)})
                if len(bad) == _MAX_BAD:
                    raise ValueError(f"shard {shard}: {key!r}, like the {_MAX_BAD - 1} before it: {error}") from error


class Source:
    """The samples of one worker: shards drawn with replacement, their samples shuffled."""

    def __init__(
        self, urls: Sequence[str], *, image_extensions: Sequence[str], shuffle_window: int, keys: tuple[int, ...]
    ) -> None:
        self.urls, self.image_extensions = list(urls), tuple(image_extensions)
        self.shuffle_window, self.keys = shuffle_window, keys

    def samples(self, *, worker: int) -> Iterator[Sample]:
        """Without end; `ValueError` naming the source that cannot be read or is damaged."""
        shards, window = (random.Random(int(keyed_bits(name, *self.keys, worker))) for name in ("shards", "window"))
        found = group_by_keys(self._files(shards))
        return iter(shuffle(self.shuffle_window, initial=self.shuffle_window // 10, rng=window)(found))

    def _files(self, generator: random.Random) -> Iterator[dict[str, Any]]:
        """What webdataset groups: members by name with their contents, and {} after each shard."""
        empty = 0
        while True:
            url = self.urls[generator.randrange(len(self.urls))]
            empty += 1
            for file in self._members(url):
                empty = 0
                yield file
            yield {}
            if empty == _MAX_EMPTY:
                raise ValueError(f"shard {without_secrets(url)} and the {_MAX_EMPTY - 1} before it hold no samples")

    def _members(self, url: str) -> Iterator[dict[str, Any]]:
        tar = TarStream(_pieces(url), name=without_secrets(url))
        last: tuple[str, set[str]] = ("", set())  # the key before, and its endings
        for key, ending, member in sample_files(tar, skipped=[]):
            if key != last[0]:
                last = (key, set())
            if ending in last[1]:
                raise ValueError(f"shard {tar.name} holds {member.name!r} twice")
            last[1].add(ending)
            data: bytes | int = b""
            if ending == "cls":
                data = read_label(tar, member)
            elif ending in self.image_extensions:
                if member.size > MAX_IMAGE_BYTES:
                    raise ValueError(
                        f"shard {tar.name}: {member.name!r} has {member.size} bytes, too many for an image"
                    )
                data = tar.contents()
            yield {"fname": member.name, "data": data, "__url__": url}


def _pieces(url: str) -> Iterator[bytes]:
    """The bytes of a source, unpacked where it is compressed."""
    try:
        with _opened(url) as stream:
            file = io.BufferedReader(_Raw(stream), _PIECE)
            head = file.peek(8)
            unpack = next((open_ for magic, open_ in _COMPRESSED.items() if head.startswith(magic)), None)
            unpacked = file if unpack is None else unpack(file)
            while piece := unpacked.read(_PIECE):
                yield piece
    except Exception as error:  # clients raise errors of many libraries, some of many lines
        reason = without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__
        raise ValueError(f"cannot read shard {without_secrets(url)}: {reason}") from error


def _opened(url: str) -> BinaryIO:
    if _scheme(url) in ("", "file") or _scheme(url) in gopen_schemes:
        return gopen(url)
    return fsspec.open(url, "rb").open()


class _Raw(io.RawIOBase):
    """What webdataset opens (pipes of its own among it), as the standard library's readers want it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _scheme(url: str) -> str:
    return urlsplit(url.strip()).scheme.lower()

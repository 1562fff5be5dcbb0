"""Indexing shards that are there already, wherever they come from and wherever they lie."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from braceexpand import braceexpand

from shards.folder import IMAGE_EXTENSIONS
from shards.index import ShardIndex, ShardRecord
from shards.offsets import Sample, Skipped, offset_name, pack_offsets, parse_offsets
from shards.parallel import default_workers, map_processes
from shards.places import Folder, Location, Url, folder_at, locate
from shards.retry import retry
from shards.storage import write_atomic
from shards.tar import TarStream, scan_tar

_MAX_CLASSES = 10_000_000
_PIECE = 4 << 20  # bytes read at a time; two are in memory
_NAMED = 3  # damaged shards that an error names


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: memoryview, /) -> None: ...


def build_index(
    shards: str | Location,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    progress: bool = False,
) -> ShardIndex:
    """Index the tars of a folder, wherever they come from: write the offset files and `index.json`, and load them.

    Every byte of a shard is read once. Class names are kept from an `index.json` that is there already and has enough
    of them, otherwise they are the numbers; an offset file that agrees with its shard is kept, and with it the source
    paths. What was left out is kept in the offset files (`ShardIndex.skipped`). Warns when the samples are sorted by
    class.

    Args:
        shards: a folder or URL; or such a one with the names of its shards in braces (`…/train-{0000..0099}.tar`), for
            places that do not list their files.
        out: a local folder for the index and offset files; None: beside the shards.

    Raises:
        ValueError: in one line: shards that are truncated or damaged, hold a key twice or a `cls` that is no number
            (the first few are named); no shards; no images; a place that cannot be read or written.
    """
    location, names = _listed(shards)
    if out is None and isinstance(location, Url) and location.text.startswith(("http://", "https://")):
        raise ValueError(f"{location} cannot be written to; give a local folder for the index (--out DIR)")
    folder, target = folder_at(location), folder_at(location if out is None else Path(out))
    sizes = tar_sizes(folder, names)
    results = map_processes(
        partial(_index_shard, folder=folder, target=target, image_extensions=tuple(image_extensions)),
        sizes.items(),
        num_tasks=len(sizes),
        workers=default_workers() if workers is None else workers,
        label="indexing" if progress else None,
        total=sum(sizes.values()),
        amount=lambda result: result.num_bytes,
        in_bytes=True,
    )
    if damaged := [result for result in results if isinstance(result, _Damaged)]:
        more = f" (and {len(damaged) - _NAMED} more)" if len(damaged) > _NAMED else ""
        raise ValueError("; ".join(result.why for result in damaged[:_NAMED]) + more)
    found = [result for result in results if isinstance(result, _Indexed)]
    if not any(result.record.num_samples for result in found):
        hint = next((f"; {key!r} has {why}" for result in found for key, why in result.skipped[:1]), "")
        raise ValueError(
            f"no images ({', '.join(image_extensions)}) in the {len(found)} shards of {location}{hint}; --image-ext "
            "gives the ending of the images"
        )
    index = ShardIndex(
        target.location,
        shards=[result.record for result in found],
        class_names=_class_names(target.location, num_classes=max(result.num_classes for result in found)),
        shards_at=location,
    )
    index.save()
    if (advice := sorted_by_class(index)) is not None:
        warnings.warn(advice, stacklevel=2)
    return index


@dataclass(frozen=True)
class _Indexed:
    record: ShardRecord
    num_classes: int  # that the labels need
    skipped: list[Skipped]  # the first one alone

    @property
    def num_bytes(self) -> int:
        return self.record.num_bytes


@dataclass(frozen=True)
class _Damaged:
    why: str
    num_bytes: int


def _index_shard(
    shard: tuple[str, int], *, folder: Folder, target: Folder, image_extensions: Sequence[str]
) -> _Indexed | _Damaged:
    """Read one shard and write its offset file."""
    name, size = shard
    digest = hashlib.sha256()
    try:
        tar = open_tar(folder, name, size=size, digest=digest)
        samples, skipped = scan_tar(tar, image_extensions=image_extensions)
    except ValueError as error:
        return _Damaged(str(error), size)
    sha256 = digest.hexdigest()
    if not _is_known(target, name, samples, sha256=sha256):
        content = pack_offsets(samples, shard_name=name, num_bytes=size, sha256=sha256, skipped=skipped)
        _write(target, offset_name(name), content)
    num_classes = max((sample.label + 1 for sample in samples), default=0)
    return _Indexed(ShardRecord(name, size, len(samples), sha256), num_classes, skipped[:1])


def open_tar(folder: Folder, name: str, *, size: int, digest: Digest) -> TarStream:
    """A shard of `size` bytes to be read once from beginning to end; `digest` gets all of it on its way."""
    pieces = _pieces(folder, name, size=size, digest=digest)
    return TarStream(pieces, name=str(folder.location / name), num_bytes=size)


def _pieces(folder: Folder, name: str, *, size: int, digest: Digest) -> Iterator[memoryview]:
    """The bytes of a file, the next piece being read while this one is used."""
    if not size:  # or something that is no file, such as a pipe, which nobody may ever write to
        return
    remote = isinstance(folder.location, Url)
    buffers = [memoryview(bytearray(min(_PIECE, size))) for _ in range(2)]

    def read(start: int, buffer: memoryview) -> memoryview:
        piece = buffer[: min(_PIECE, size - start)]
        try:
            if remote:
                retry(lambda: folder.read_into(name, start, piece))
            else:
                folder.read_into(name, start, piece)
        except OSError as error:
            raise ValueError(f"cannot read shard {folder.location / name}: {error.strerror or error}") from error
        return piece

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, 0, buffers[0])
        for start in range(0, size, _PIECE):
            piece = coming.result()
            buffers.reverse()
            if start + _PIECE < size:
                coming = ahead.submit(read, start + _PIECE, buffers[0])
            digest.update(piece)
            yield piece


def _listed(shards: str | Location) -> tuple[Location, list[str] | None]:
    """The folder, and the names of its shards where they were given in braces."""
    text = shards if isinstance(shards, str) else ""
    if not ("{" in text and text.endswith(".tar")):
        return locate(shards), None
    where, _, names = text.rpartition("/")
    try:
        return locate(where or "."), list(braceexpand(names))
    except ValueError as error:
        raise ValueError(f"{text}: {error}; write for example train-{{0000..0099}}.tar") from None


def tar_sizes(folder: Folder, names: list[str] | None = None) -> dict[str, int]:
    """The bytes of the tars of a folder, or of those named, by name in order.

    Raises:
        ValueError: there are none, or the place cannot be read.
    """
    where = folder.location
    try:
        listed = folder.sizes() if names is None else dict.fromkeys(names, 0)
        found = {name: size for name, size in sorted(listed.items()) if "/" not in name and name.endswith(".tar")}
    except OSError as error:
        raise ValueError(f"cannot list the shards of {where}: {error.strerror or error}") from error
    if not found:
        packed = sorted(name for name in listed if re.search(r"\.(tgz|tar\.\w+)$", name))
        hint = f" ({packed[0]} is compressed: shards must be plain tar, so unpack it with gunzip)" if packed else ""
        raise ValueError(f"no .tar files in {where}{hint}; `scaler convert SOURCE {where}` makes shards from images")
    return {name: size or _size(folder, name) for name, size in found.items()}  # web servers list names alone


def _size(folder: Folder, name: str) -> int:
    try:
        return folder.size(name) if isinstance(folder.location, Path) else retry(partial(folder.size, name))
    except OSError as error:
        raise ValueError(f"cannot read shard {folder.location / name}: {error.strerror or error}") from error


def _write(folder: Folder, name: str, content: bytes) -> None:
    """Write a small file whole; locally an identical one is left alone."""
    if isinstance(folder.location, Path):
        folder.location.mkdir(parents=True, exist_ok=True)
        write_atomic(folder.location / name, content)
        return
    try:
        folder.write(name, content)
    except OSError as error:
        raise ValueError(f"cannot write {error}; --out DIR puts the index into a local folder") from error


def _is_known(folder: Folder, shard_name: str, samples: list[Sample], *, sha256: str) -> bool:
    """Whether the offset file says all this already; then it is kept, since only `convert` knows the source paths."""
    name = offset_name(shard_name)
    try:
        table = parse_offsets(folder.read(name), folder.location / name)
    except (ValueError, OSError):
        return False
    if (table.shard_name, table.sha256, len(table)) != (shard_name, sha256, len(samples)):
        return False
    return all(replace(table.sample(i), source=sample.source) == sample for i, sample in enumerate(samples))


def _class_names(location: Location, *, num_classes: int) -> list[str]:
    with contextlib.suppress(ValueError):
        names = ShardIndex.load(location).class_names
        if len(names) >= num_classes > 0:
            return names
    if num_classes > _MAX_CLASSES:
        raise ValueError(
            f"the labels in {location} go up to {num_classes - 1}; class numbers count from 0, and at most "
            f"{_MAX_CLASSES} classes are possible"
        )
    return [str(number) for number in range(num_classes)]


def sorted_by_class(index: ShardIndex) -> str | None:
    """A sentence for the user when labels come in long runs, as in shards that were filled class by class.

    The training order reads contiguous ranges and shuffles only within a window, so sorted shards give batches of few
    classes. Counts, in up to 16 shards, how often the label changes from one sample to the next: with probability
    1 - Σ p² in shuffled shards. Less than half of that, by more than chance can do (3.5 sigma), is told.
    """
    chosen = np.unique(np.linspace(0, len(index.shard_names) - 1, 16).astype(np.int64))
    labels = [part[part >= 0] for part in (index._table(int(shard)).labels for shard in chosen)]
    shares = np.unique(np.concatenate(labels), return_counts=True)[1] / max(1, sum(map(len, labels)))
    expected = float(1 - (shares**2).sum()) * sum(max(0, len(part) - 1) for part in labels)
    changes = sum(int((part[1:] != part[:-1]).sum()) for part in labels)
    if changes >= min(expected / 2, expected - 3.5 * (2 * expected) ** 0.5):
        return None
    return (
        f"the samples of {index.path} are sorted by class (the label changes {changes} times where {expected:.0f} are "
        "expected), so batches will hold few classes; convert again without --no-shuffle"
    )

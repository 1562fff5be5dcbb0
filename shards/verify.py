"""Whether shards are what their index says: `scaler verify DST`.

Each shard is read once: its sha256 against `index.json`, and every member of the tar against the offset file, in both
directions: what the one says of a sample (key, ending, position, size, label, crc32) the other must say too. Files
that the index does not know, and ones that it misses, are named.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shards.image_header import DEFAULT_MAX_PIXELS, MAX_IMAGE_BYTES, DecodeError
from shards.index import INDEX_NAME, ShardIndex, ShardRecord
from shards.indexing import open_tar
from shards.offsets import ENDING, OffsetTable, offset_name, parse_offsets
from shards.parallel import default_workers, map_processes
from shards.places import Folder, Location, folder_at
from shards.retry import retry
from shards.storage import printable
from shards.tar import Member, TarStream, read_label, sample_files

_NAMED = 3  # samples that one problem names


@dataclass(frozen=True)
class FileReport:
    """What was found of one file: a shard with its offset file, or one that should not be there.

    Attributes:
        num_samples: by the index; 0 for files that it does not list.
        num_bytes: as found; 0 for missing ones.
        problems: one line each; empty when all is well.
    """

    name: str
    num_samples: int
    num_bytes: int
    problems: list[str]


def verify(
    shards: str | Location,
    *,
    workers: int | None = None,
    decode: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: bool = False,
) -> list[FileReport]:
    """Compare all shards of a folder or URL with its index; with `decode`, also decode every image whole.

    Raises:
        ValueError: there is no index, it is damaged, or the place cannot be read.
    """
    index = ShardIndex.load(shards)
    folder, beside = folder_at(index.shards_at), folder_at(index.path)
    records = [index.shard_record(shard) for shard in range(len(index.shard_names))]
    listed = _listed(folder)
    sizes = {record.name: _size(folder, record.name, listed) for record in records}
    reports = map_processes(
        partial(
            _verify_shard,
            folder=folder,
            beside=beside,
            sizes=sizes,
            num_classes=len(index.class_names),
            decode=decode,
            max_pixels=max_pixels,
        ),
        records,
        num_tasks=len(records),
        workers=default_workers() if workers is None else workers,
        label="verifying" if progress else None,
        total=sum(size or 0 for size in sizes.values()),
        amount=lambda report: report.num_bytes,
        in_bytes=True,
    )
    return sorted([*reports, *_strangers(index, listed)], key=lambda report: report.name)


def _listed(folder: Folder) -> dict[str, int]:
    """The files of the folder itself and their sizes; nothing where a web server does not list them."""
    try:
        return {name: size for name, size in folder.sizes().items() if "/" not in name}
    except OSError as error:
        if str(folder.location).startswith(("http://", "https://")):
            return {}
        raise ValueError(f"cannot list {folder.location}: {error.strerror or error}") from error


def _size(folder: Folder, name: str, listed: dict[str, int]) -> int | None:
    """The bytes of a shard, None when it is missing."""
    if isinstance(folder.location, Path):
        return listed.get(name)
    try:
        return listed.get(name) or retry(partial(folder.size, name))
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _strangers(index: ShardIndex, listed: dict[str, int]) -> Iterable[FileReport]:
    """Shards and offset files that the index does not know."""
    known = {*index.shard_names, *map(offset_name, index.shard_names)}
    for name, size in listed.items():
        if name in known or not name.endswith((".tar", ENDING)):
            continue
        if name.endswith(".tar"):
            advice = f"`scaler index {index.path}` takes it in, or remove it"
        else:
            advice = "it belongs to no shard there: remove it"
        yield FileReport(name, 0, size, [f"{name} is not listed in {INDEX_NAME}; {advice}"])


def _verify_shard(
    record: ShardRecord,
    *,
    folder: Folder,
    beside: Folder,
    sizes: dict[str, int | None],
    num_classes: int,
    decode: bool,
    max_pixels: int,
) -> FileReport:
    name, size = record.name, sizes[record.name]
    path, advice = folder.location / name, "copy it again from where it came"
    if size is None:
        problems = [f"shard {path} is missing; {advice}, or run `scaler index {folder.location}` if that is meant"]
        return FileReport(name, record.num_samples, 0, problems)
    problems = []
    if size != record.num_bytes:
        cut = "was cut off" if size < record.num_bytes else "has changed"
        problems.append(f"shard {path} {cut}: {size} bytes, {INDEX_NAME} says {record.num_bytes}; {advice}")
    try:
        table: OffsetTable | None = _read_table(beside, record, num_classes=num_classes)
    except ValueError as error:
        problems.append(str(error))
        table = None
    digest = hashlib.sha256()
    try:
        tar = open_tar(folder, name, size=size, digest=digest)
        problems += _compare(
            tar, table, decode=decode, max_pixels=max_pixels, advice=f"`scaler index {folder.location}`"
        )
        if digest.hexdigest() != record.sha256:
            problems.append(
                f"shard {path} has changed: its sha256 is {digest.hexdigest()}, {INDEX_NAME} says {record.sha256}; "
                f"{advice}, or run `scaler index {folder.location}` if the change is meant"
            )
    except ValueError as error:
        problems.append(str(error))
    return FileReport(name, record.num_samples, size, problems)


def _read_table(folder: Folder, record: ShardRecord, *, num_classes: int) -> OffsetTable:
    """The offset file of a shard; `ValueError` when it is missing, damaged or another shard's."""
    name = offset_name(record.name)
    path = folder.location / name
    fix = f"`scaler index {folder.location}` makes it anew from the shard"
    try:
        content = folder.read(name) if isinstance(folder.location, Path) else retry(partial(folder.read, name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"offset file {path} cannot be read: {getattr(error, 'strerror', '') or error}; {fix}"
        ) from error
    table = parse_offsets(content, path)
    found = ShardRecord(table.shard_name, table.num_bytes, len(table), table.sha256)
    if found != record:
        raise ValueError(f"offset file {path} does not belong to {INDEX_NAME} ({found}, not {record}); {fix}")
    if len(table) and table.labels.max() >= num_classes:
        raise ValueError(
            f"offset file {path} has label {table.labels.max()}, {INDEX_NAME} names {num_classes} classes; {fix}"
        )
    return table


def _compare(tar: TarStream, table: OffsetTable | None, *, decode: bool, max_pixels: int, advice: str) -> list[str]:
    """Problems of a shard's members against its offset file (None: there is none to compare with)."""
    samples = [] if table is None else [table.sample(i) for i in range(len(table))]
    waiting = {sample.offset: sample for sample in samples}
    labels: dict[str, int] = {}
    keys: dict[str, None] = {}  # of the tar, in order
    moved, damaged, undecodable = [], [], []
    for key, ending, member in sample_files(tar, skipped=[]):
        keys[key] = None
        if ending == "cls":
            labels[key] = read_label(tar, member)
        sample = waiting.pop(member.offset, None)
        if sample is None:
            continue
        if (key, ending, member.size) != (sample.key, sample.extension, sample.size):
            moved.append(sample.key)
            continue
        crc32, reason = _look(tar, member, decode=decode, max_pixels=max_pixels)
        if crc32 != sample.crc32:
            damaged.append(sample.key)
        elif reason:
            undecodable.append(f"image {key!r} cannot be decoded ({reason}): training replaces it by another one")
    moved += [sample.key for sample in waiting.values()]
    told = {sample.key for sample in samples} | {what for what, _ in (table.skipped if table is not None else [])}
    unknown = [] if table is None else [key for key in keys if key not in told and printable(key) not in told]
    wrong = [sample.key for sample in samples if sample.key in keys and labels.get(sample.key, -1) != sample.label]
    total = len(samples)
    problems = [
        (damaged, f"{len(damaged)} of {total} images are damaged (their crc32 differs): copy the shard again"),
        (moved, f"{len(moved)} of {total} samples are not where the offset file says: {advice} makes it anew"),
        (wrong, f"{len(wrong)} of {total} labels are not those of the shard: {advice} makes the offset file anew"),
        (unknown, f"{len(unknown)} samples are not in the offset file: {advice} makes it anew"),
    ]
    return [f"{what} ({_few(names)})" for names, what in problems if names] + undecodable


def _look(tar: TarStream, member: Member, *, decode: bool, max_pixels: int) -> tuple[int, str]:
    """The crc32 of an image, and why it cannot be decoded ("": it can, or was not asked for)."""
    if not decode:
        return tar.crc32(), ""
    if member.size > MAX_IMAGE_BYTES:
        return tar.crc32(), f"{member.size} bytes is above the limit of {MAX_IMAGE_BYTES} for one image"
    data = tar.contents()
    return zlib.crc32(data), _why_undecodable(data, max_pixels=max_pixels)


def _why_undecodable(data: bytes, *, max_pixels: int) -> str:
    import torch

    from shards.decode import View, decode_views  # here, since torch takes seconds to import and few ask for this

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    try:
        view = View(name="check", size=8, kind="center")
        decode_views(data, views=[view], seed=0, epoch=0, sample_id=0, max_pixels=max_pixels)
    except DecodeError as error:
        return str(error)
    return ""


def _few(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*(repr(printable(name)) for name in names[:_NAMED]), *more])

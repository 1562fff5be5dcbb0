"""Finding shards to convert, and listing their samples."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from shards.folder import IMAGE_EXTENSIONS, files_digest, image_extension
from shards.index import INDEX_NAME, ShardIndex
from shards.indexing import open_tar, tar_sizes
from shards.offsets import OffsetTable, Sample, Skipped, offset_name, parse_offsets
from shards.parallel import map_processes
from shards.places import Folder, Location, folder_at, locate
from shards.retry import retry
from shards.samples import Samples
from shards.tar import sample_files, scan_tar

Shards = dict[Location, list[str] | None]  # folder → names of its shards, None for all


def find_shards(source: str) -> Shards | None:
    """The shards that `source` names, or None where it is a folder of images.

    A .tar file; a folder of such (without sub-folders or images); any URL of one or the other; or several, with braces
    as webdataset has them. `ValueError` for `pipe:`, which would run a command.
    """
    if source.startswith("pipe:"):
        raise ValueError(f"{source!r} is a command, which convert does not run; give files or URLs")
    braces = "{" in source and not os.path.lexists(source)
    try:
        texts = list(braceexpand(source)) if braces else [source]
    except ValueError as error:
        raise ValueError(f"{source}: {error}; write for example train-{{0000..0099}}.tar") from None
    found: Shards = {}
    for text in texts:
        place = locate(text)
        if place.name.endswith(".tar") and not (isinstance(place, Path) and place.is_dir()):
            names = found.setdefault(place.parent, [])
            if names is not None:
                names.append(place.name)
        elif not isinstance(place, Path) or _holds_tars(place):
            found[place] = None
        else:
            return None
    return found


def _holds_tars(folder: Path) -> bool:
    """Whether this is a folder of shards, rather than one of images in which a tar lies too."""
    tars = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or image_extension(entry.name) in IMAGE_EXTENSIONS:
                    return False
                tars = tars or entry.name.endswith(".tar")
    except OSError:
        return False
    return tars


def scan_shards(
    shards: Shards, *, labels: bool | None, json_members: bool, workers: int, progress: bool = False
) -> Samples:
    """List the samples of shards, from their offset files where there are such, otherwise by reading every byte.

    Class names come from the `index.json` beside the shards; without one they are the numbers. `labels`: whether to
    keep them (None: when there are any). With `json_members` the shards are read to find these.

    Raises:
        ValueError: damaged or missing shards, no images, or folders that name their classes differently.
    """
    tasks: list[tuple[Location, str, int]] = []
    names: dict[tuple[str, ...], Location] = {}
    for place, chosen in shards.items():
        known, folder = _index(place), folder_at(place)
        sizes = tar_sizes(folder) if chosen is None else {name: _size(folder, name) for name in chosen}
        tasks += [(place, name, size) for name, size in sizes.items()]
        names[tuple(known.class_names) if known is not None else ()] = place
    found = map_processes(
        partial(_scan, json_members=json_members),
        tasks,
        num_tasks=len(tasks),
        workers=workers,
        label="listing" if progress else None,
        total=len(tasks),
        amount=lambda _: 1,
    )
    samples = [sample for shard in found for sample in shard.samples]
    skipped = sorted(pair for shard in found for pair in shard.skipped)
    if not samples:
        why = f"; the first member left out, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {len(tasks)} shards{why}")
    columns = np.array([(s.offset, s.size, s.label, s.crc32) for s in samples], dtype=np.int64)
    numbers = np.repeat(np.arange(len(found)), [len(shard.samples) for shard in found])
    if labels is False or (labels is None and columns[:, 2].max() < 0):
        columns[:, 2] = -1
    elif labels and columns[:, 2].min() < 0:
        raise ValueError(f"{(columns[:, 2] < 0).sum()} of {len(samples)} samples have no label (member .cls)")
    return Samples(
        paths=[sample.source for sample in samples],
        sizes=columns[:, 1].copy(),
        labels=columns[:, 2].copy(),
        class_names=_class_names(names, num_classes=int(columns[:, 2].max()) + 1),
        digest=files_digest([sample.source for sample in samples], columns, numbers),
        rejected=[],
        ignored=skipped,
        keys=[f"{sample.key}.{sample.extension.rpartition('.')[2]}" for sample in samples],
        places=[place / name for place, name, _ in tasks],
        shards=numbers,
        offsets=columns[:, 0].copy(),
        crc32=columns[:, 3].astype(np.uint32),
        json=np.array([pair for shard in found for pair in shard.json], dtype=np.int64).reshape(-1, 2),
    )


@dataclass(frozen=True)
class _Scanned:
    samples: list[Sample]
    skipped: list[Skipped]
    json: list[tuple[int, int]]  # offset and size; empty where nobody asked


def _scan(shard: tuple[Location, str, int], *, json_members: bool) -> _Scanned:
    place, name, size = shard
    folder = folder_at(place)
    known = _known_samples(folder, name, size=size)
    if known is None:
        samples, skipped = scan_tar(
            open_tar(folder, name, size=size, digest=hashlib.sha256()), image_extensions=IMAGE_EXTENSIONS
        )
    else:
        samples, skipped = known
    if not json_members:
        return _Scanned(samples, skipped, [])
    members = sample_files(open_tar(folder, name, size=size, digest=hashlib.sha256()), skipped=[])
    found = {key: (member.offset, member.size) for key, ending, member in members if ending == "json"}
    return _Scanned(samples, skipped, [found.get(sample.key, (0, 0)) for sample in samples])


def _size(folder: Folder, name: str) -> int:
    try:
        return folder.size(name) if isinstance(folder.location, Path) else retry(partial(folder.size, name))
    except OSError as error:
        raise ValueError(f"cannot read shard {folder.location / name}: {error.strerror or error}") from error


def _known_samples(folder: Folder, name: str, *, size: int) -> tuple[list[Sample], list[Skipped]] | None:
    """What the offset file beside a shard says, if there is one that belongs to it."""
    place = folder.location / offset_name(name)

    def read() -> OffsetTable:
        return parse_offsets(folder.read(offset_name(name)), place)

    try:
        table = read() if isinstance(folder.location, Path) else retry(read)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__ or error, OSError) and not _is_missing(error):
            raise  # it may be there, and could not be read
        return None
    if (table.shard_name, table.num_bytes) != (name, size):
        return None
    return [table.sample(number) for number in range(len(table))], table.skipped


def _index(place: Location) -> ShardIndex | None:
    try:
        return ShardIndex.load(place)
    except ValueError as error:
        if _is_missing(error):
            return None
        raise  # damaged or out of reach, so that the class names would be lost


def _is_missing(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, FileNotFoundError):
        error = error.__cause__
    return error is not None


def _class_names(found: dict[tuple[str, ...], Location], *, num_classes: int) -> list[str]:
    """The names of the classes in all folders, which must agree, if there are labels."""
    if not num_classes:
        return []
    if len(found) > 1:
        places = " and ".join(str(place) for place in found.values())
        raise ValueError(f"{places} name their classes differently; convert them one at a time")
    (names,) = found
    if 0 < len(names) < num_classes:
        raise ValueError(f"label {num_classes - 1} has no name in {next(iter(found.values())) / INDEX_NAME}")
    return list(names) or [str(number) for number in range(num_classes)]

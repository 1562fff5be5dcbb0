"""Image folder → WebDataset shards, bytes kept: `scaler convert SOURCE DESTINATION`.

The plan is made first, from file names and sizes alone: which files go to which shard, under which keys. Shards are
then written independently by worker processes, so their bytes depend on the plan only, and a run that was interrupted
continues with the shards that are missing. `convert.json` in the destination remembers what the plan was made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.folder import ImageFolder, scan_folder
from shards.image_header import DEFAULT_MAX_PIXELS
from shards.index import INDEX_NAME, ShardIndex, ShardRecord
from shards.keys import KeyMaker
from shards.offsets import Skipped, offset_path
from shards.parallel import default_workers, map_processes
from shards.random import keyed_permutation
from shards.storage import remove_temporaries, write_atomic
from shards.writer import ShardTask, SourceFile, WrittenShard, finished_shard, sample_bytes, write_shard

STATE_NAME = "convert.json"
DEFAULT_SHARD_SIZE = 256_000_000
_MAX_SHARDS = 1_000_000  # six digits in the name
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ConvertReport:
    """What became of the files of a source folder; nothing is left out of it.

    `num_shards` counts all shards, `num_skipped_finished` those of them that an earlier run had finished.
    `rejected` are images (or whole folders) that could not be taken, `ignored` files that are no images; both as
    (path relative to the source, reason), and both also for the part that an earlier run did.
    """

    num_samples: int
    num_shards: int
    num_bytes: int
    num_skipped_finished: int
    class_names: list[str]
    rejected: list[Skipped]
    ignored: list[Skipped]


def parse_size(text: str) -> int:
    """`256MB`, `1.5 GiB`, `4096` → bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 256MB, 1GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    name: str = "shard",
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    labels: bool | None = None,
    json_member: bool = False,
    decode_check: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: bool = False,
) -> ConvertReport:
    """Write the images below `source` to shards `NAME-000000.tar`, … of about `shard_size` bytes, and their index.

    Files are taken in an order shuffled by `seed`, or by path when `shuffle` is off. `labels`: see
    `shards.folder.scan_folder`. `json_member` adds a JSON member (path, width, height) to each sample. Files are
    rejected, and listed with the reason, when their header is not one of a JPEG, PNG or WebP image or gives more than
    `max_pixels`; with `decode_check` also when the image does not decode. Run again after an interruption it continues;
    finished shards are left as they are. The same source and options give byte-identical files.

    Raises:
        ValueError: no images; a destination that holds something else, was begun with other options, or whose source
            has changed since; a disk that refuses; all in one line that says what to do.
    """
    source, destination = Path(source), Path(destination)
    if isinstance(shard_size, str):
        shard_size = parse_size(shard_size)
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"name {name!r} may hold letters, digits, '_', '-' and '.', and begins with a letter or digit")
    if shard_size < 1 or max_pixels < 1:
        raise ValueError(f"shard_size ({shard_size}) and max_pixels ({max_pixels}) must be at least 1")
    real_destination = Path(os.path.realpath(destination))
    if Path(os.path.realpath(source)) in (real_destination, *real_destination.parents):
        raise ValueError(f"the destination {destination} lies in the source {source}; choose a folder outside of it")
    folder = scan_folder(source, labels=labels)
    options = {
        "name": name,
        "shard_size": shard_size,
        "seed": seed,
        "shuffle": shuffle,
        "labels": bool(folder.class_names),
        "json_member": json_member,
        "decode_check": decode_check,
        "max_pixels": max_pixels,
    }
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {destination}: {error.strerror}") from error
    plan = _Plan(
        folder, destination, name=name, shard_size=shard_size, seed=seed if shuffle else None, json=json_member
    )
    with _only_writer(destination):
        remove_temporaries(destination)
        _check_state(source, destination, options=options, digest=folder.digest)
        shards = {number: finished_shard(plan.path(number)) for number in range(plan.num_shards)}
        missing = [number for number, shard in shards.items() if shard is None]
        written = map_processes(
            partial(
                write_shard,
                source=str(source),
                json_member=json_member,
                decode_check=decode_check,
                max_pixels=max_pixels,
            ),
            (plan.task(number) for number in missing),
            num_tasks=len(missing),
            workers=default_workers() if workers is None else workers,
            label="converting" if progress else None,
            total=sum(plan.num_files(number) for number in missing),
            amount=lambda shard: shard.num_samples + len(shard.skipped),
        )
        shards.update(zip(missing, written, strict=True))
        done = [shard for shard in shards.values() if shard is not None]
        index = _finish(destination, done, source=source, class_names=folder.class_names)
    return ConvertReport(
        num_samples=index.num_samples,
        num_shards=len(index.shard_names),
        num_bytes=index.num_bytes,
        num_skipped_finished=plan.num_shards - len(missing),
        class_names=index.class_names,
        rejected=sorted([*folder.rejected, *(pair for shard in done for pair in shard.skipped)]),
        ignored=folder.ignored,
    )


class _Plan:
    """Which files go to which shard, under which keys: a pure function of what the folder holds."""

    def __init__(
        self, folder: ImageFolder, destination: Path, *, name: str, shard_size: int, seed: int | None, json: bool
    ) -> None:
        self._folder = folder
        self._prefix = destination / name
        make_key = KeyMaker()
        self._keys = [make_key(path) for path in folder.paths]
        size = len(folder.paths)
        self._order = np.arange(size) if seed is None else keyed_permutation(size, "convert", seed)
        weights = sample_bytes(folder.sizes.clip(0), label=bool(folder.class_names), json_member=json)[self._order]
        ends = np.cumsum(weights)
        # Equal parts of at most `shard_size` bytes; a file goes to the part in which it begins.
        part_bytes = -(-ends[-1] // -(-ends[-1] // shard_size))
        starts = np.unique((ends - weights) // part_bytes, return_index=True)[1]
        self._cuts: NDArray[np.int64] = np.append(starts, size)
        self.num_shards = len(starts)
        if self.num_shards > _MAX_SHARDS:
            raise ValueError(
                f"{self.num_shards} shards of {shard_size} bytes would be needed, at most {_MAX_SHARDS} are possible; "
                "choose a larger shard_size"
            )

    def path(self, number: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{number:06d}.tar")

    def num_files(self, number: int) -> int:
        return int(self._cuts[number + 1] - self._cuts[number])

    def task(self, number: int) -> ShardTask:
        chosen = self._order[self._cuts[number] : self._cuts[number + 1]]
        folder = self._folder
        columns = zip(chosen.tolist(), folder.sizes[chosen].tolist(), folder.labels[chosen].tolist(), strict=True)
        return ShardTask(
            self.path(number),
            [SourceFile(folder.paths[i], size, key=self._keys[i], label=label) for i, size, label in columns],
        )


def _finish(destination: Path, shards: list[WrittenShard], *, source: Path, class_names: list[str]) -> ShardIndex:
    """Drop the shards that came out empty and write the index of the others."""
    for shard in shards:
        if not shard.num_samples:
            shard.path.unlink(missing_ok=True)
            offset_path(shard.path).unlink(missing_ok=True)
    records = [ShardRecord(s.path.name, s.num_bytes, s.num_samples, s.sha256) for s in shards if s.num_samples]
    if not records:
        path, why = min(pair for shard in shards for pair in shard.skipped)
        raise ValueError(f"not one of the images in {source} can be used; the first, {path}: {why}")
    index = ShardIndex(destination, shards=records, class_names=class_names)
    index.save()
    return index


@contextlib.contextmanager
def _only_writer(destination: Path) -> Iterator[None]:
    """Hold the destination against a second conversion; the system lets go of it when the process dies."""
    descriptor = os.open(destination, os.O_RDONLY)
    try:
        for attempt in range(10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if attempt == 9:
                    raise ValueError(
                        f"another conversion is writing to {destination}; wait until it has ended"
                    ) from error
                time.sleep(0.1)  # the workers of a killed run are still ending
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _check_state(source: Path, destination: Path, *, options: dict[str, Any], digest: str) -> None:
    """Continue only what was begun with the same files and options; otherwise say what differs and what to do."""
    path = destination / STATE_NAME
    state = {"format": 1, "options": options, "source": digest}
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (destination / INDEX_NAME).exists() or any(destination.glob("*.tar")):
            raise ValueError(
                f"{destination} already holds shards that were made otherwise; choose another folder"
            ) from None
        write_atomic(path, json.dumps(state, indent=1).encode())
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); delete {destination} and convert again") from error
    if found == state:
        return
    before = found.get("options", {}) if isinstance(found, dict) else {}
    changes = [f"{key} {before.get(key)!r} → {value!r}" for key, value in options.items() if before.get(key) != value]
    if changes:
        raise ValueError(
            f"{destination} was begun with other options ({', '.join(changes)}); give the same ones to continue, or "
            "delete it (or choose another folder) to convert anew"
        )
    raise ValueError(
        f"files in {source} have been added, removed or changed since {destination} was begun; delete it (or choose "
        "another folder) to convert anew"
    )

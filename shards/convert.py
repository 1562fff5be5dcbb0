"""Images → WebDataset shards: `scaler convert SOURCE DESTINATION`.

The plan is made first, from file names and sizes alone: which images go to which shard, under which keys. Shards are
then written independently by worker processes, so their bytes depend on the plan only, and a run that was interrupted
continues with the shards that are missing. `convert.json` in the destination remembers what the plan was made of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from shards.destination import Destination, WrittenShard
from shards.filelist import scan_list
from shards.folder import scan_folder
from shards.image_header import DEFAULT_MAX_PIXELS
from shards.index import ShardIndex, ShardRecord
from shards.layout import Plan
from shards.offsets import Skipped
from shards.parallel import default_workers, map_processes
from shards.places import Location, locate
from shards.shardlist import find_shards, scan_shards
from shards.sources import Source
from shards.storage import parse_size
from shards.writer import Options

DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class ConvertReport:
    """What became of the images of a source; nothing is left out of it.

    `num_shards` counts all shards, `num_skipped_finished` those of them that an earlier run had finished. `splits` has
    the number of samples of `train` and `val` where the source was split. `rejected` are images (or whole folders) that
    could not be taken, `ignored` files that are no images; both as (path relative to the source, reason), and both also
    for the part that an earlier run did.
    """

    num_samples: int
    num_shards: int
    num_bytes: int
    num_skipped_finished: int
    class_names: list[str]
    splits: dict[str, int]
    rejected: list[Skipped]
    ignored: list[Skipped]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    from_list: str | Path | None = None,
    name: str = "shard",
    shard_size: int | str | None = None,
    workers: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    labels: bool | None = None,
    val_fraction: float | None = None,
    resize: int | None = None,
    quality: int | None = None,
    json_member: bool = False,
    decode_check: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: bool = False,
) -> ConvertReport:
    """Write images to shards `NAME-000000.tar`, … of about equal size, and their index.

    Images are taken in an order shuffled by `seed`, or in the source's when `shuffle` is off. They are rejected, and
    listed with the reason, when their header is not one of a JPEG, PNG or WebP image or gives more than `max_pixels`;
    with `decode_check` also when they do not decode. Run again after an interruption it continues; finished shards are
    left as they are. The same source and options give byte-identical files.

    Args:
        source: a folder of images or of class folders; or shards: a .tar, a folder or URL of them, or a pattern of
            URLs as webdataset has them, `…/{000000..000099}.tar`, whose samples are shuffled anew.
        destination: a folder, or a URL that fsspec can write to (s3://…).
        from_list: a .csv or .parquet file with the columns path (below `source`) and, if there are labels, label.
        shard_size: the bytes of a shard at most, also as "1GiB"; None: 256 MB, and less for a small set, so that it has
            8 shards.
        workers: processes; None: as many as there are CPUs.
        labels: whether to keep them; None: when they are there. For folders see `shards.folder.scan_folder`.
        val_fraction: the part of the images, drawn by `seed` from each class alike, that goes to `destination`/val, the
            others to `destination`/train; both have an index.
        resize: images with a longer short side are reduced to one of this many pixels, and become JPEGs.
        quality: of these JPEGs; None: 90.
        json_member: adds a JSON member (path, width, height, and what the JSON of a source sample says) to each sample.

    Raises:
        ValueError: no images; a destination that holds something else, was begun with other options, or whose source
            has changed since; a disk that refuses; all in one line that says what to do.
    """
    place, size = locate(str(destination)), parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    _check(name=name, shard_size=size, max_pixels=max_pixels, resize=resize, quality=quality, val=val_fraction)
    workers = default_workers() if workers is None else workers
    found = _open(source, place, from_list=from_list, labels=labels, json=json_member, workers=workers, bar=progress)
    options = Options(
        json_member=json_member,
        decode_check=decode_check,
        max_pixels=max_pixels,
        resize=resize or 0,
        quality=quality or DEFAULT_QUALITY,
    )
    plan = Plan(
        found, place, options, name=name, shard_size=size, seed=seed, shuffle=shuffle, val_fraction=val_fraction
    )
    target = Destination(place, parts=list(plan.splits))
    state = {
        "name": name,
        "shard_size": size,
        "seed": seed,
        "shuffle": shuffle,
        "labels": bool(found.class_names),
        "val_fraction": val_fraction,
        **asdict(options),
    }
    with target.only_writer():
        _check_state(source, target, options=state, digest=found.digest, plan=plan.digest)
        shards = target.finished(plan.names)
        missing = [number for number, shard in enumerate(plan.names) if shard not in shards]
        if missing and (resize or decode_check):
            import_module("shards.reencode")  # it takes seconds, which forked workers then do not
        written = map_processes(
            plan.write,
            missing,
            num_tasks=len(missing),
            workers=workers,
            label="converting" if progress else None,
            total=sum(plan.num_images(number) for number in missing),
            amount=lambda shard: shard.num_samples + len(shard.skipped),
        )
        num_finished = len(shards)
        shards |= {shard.name: shard for shard in written}
        done = [shards[shard] for shard in plan.names]
        indices = _finish(target, done, source=source, class_names=found.class_names)
    return ConvertReport(
        num_samples=sum(index.num_samples for index in indices.values()),
        num_shards=sum(len(index.shard_names) for index in indices.values()),
        num_bytes=sum(index.num_bytes for index in indices.values()),
        num_skipped_finished=num_finished,
        class_names=found.class_names,
        splits={part: index.num_samples for part, index in indices.items() if part},
        rejected=sorted([*found.rejected, *(pair for shard in done for pair in shard.skipped)]),
        ignored=found.ignored,
    )


def _check(
    *,
    name: str,
    shard_size: int | None,
    max_pixels: int,
    resize: int | None,
    quality: int | None,
    val: float | None,
) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"name {name!r} may hold letters, digits, '_', '-' and '.', and begins with a letter or digit")
    if (shard_size is not None and shard_size < 1) or max_pixels < 1:
        raise ValueError(f"shard_size ({shard_size}) and max_pixels ({max_pixels}) must be at least 1")
    if resize is not None and resize < 8:
        raise ValueError(f"resize is {resize}; the short side must keep at least 8 pixels")
    if quality is not None and (resize is None or not 1 <= quality <= 100):
        raise ValueError(f"quality {quality} is that of the JPEGs that resize makes, from 1 to 100")
    if val is not None and not 0 < val < 1:
        raise ValueError(f"val_fraction is {val}; a fraction lies between 0 and 1")


def _open(
    source: str | Path,
    destination: Location,
    *,
    from_list: str | Path | None,
    labels: bool | None,
    json: bool,
    workers: int,
    bar: bool,
) -> Source:
    """List what there is to convert."""
    shards = None if from_list is not None else find_shards(str(source))
    if shards is not None:
        return scan_shards(shards, labels=labels, json_members=json, workers=workers, progress=bar)
    folder = Path(source)
    if isinstance(destination, Path):
        real = Path(os.path.realpath(destination))
        if Path(os.path.realpath(folder)) in (real, *real.parents):
            raise ValueError(
                f"the destination {destination} lies in the source {source}; choose a folder outside of it"
            )
    if from_list is not None:
        return scan_list(folder, Path(from_list), labels=labels)
    return scan_folder(folder, labels=labels)


def _finish(
    target: Destination, shards: Sequence[WrittenShard], *, source: str | Path, class_names: list[str]
) -> dict[str, ShardIndex]:
    """Drop the shards that came out empty and write the index of the others, for each part."""
    target.remove([shard.name for shard in shards if not shard.num_samples])
    indices = {}
    for part in target.parts:
        prefix = f"{part}/" if part else ""
        records = [
            ShardRecord(shard.name.removeprefix(prefix), shard.num_bytes, shard.num_samples, shard.sha256)
            for shard in shards
            if shard.num_samples and shard.name.startswith(prefix)
        ]
        if not records:
            path, why = min(pair for shard in shards if shard.name.startswith(prefix) for pair in shard.skipped)
            raise ValueError(f"not one of the images in {source} can be used; the first, {path}: {why}")
        indices[part] = ShardIndex(target.place(part), shards=records, class_names=class_names)
    for index in indices.values():
        index.save()
    return indices


def _check_state(source: str | Path, target: Destination, *, options: dict[str, Any], digest: str, plan: str) -> None:
    """Continue only what was begun with the same files and options; otherwise say what differs and what to do."""
    state = {"format": 2, "options": options, "source": digest, "plan": plan}
    found, place = target.read_state(), target.location
    if found is None:
        if target.holds_shards():
            raise ValueError(f"{place} already holds shards that were made otherwise; choose another folder")
        target.write_state(state)
        return
    if found == state:
        return
    before = found.get("options", {}) if isinstance(found, dict) else {}
    changes = [f"{key} {before.get(key)!r} → {value!r}" for key, value in options.items() if before.get(key) != value]
    if changes:
        raise ValueError(
            f"{place} was begun with other options ({', '.join(changes)}); give the same ones to continue, or delete "
            "it (or choose another folder) to convert anew"
        )
    if isinstance(found, dict) and found.get("source") == digest:
        raise ValueError(
            f"{place} was begun with another version of scaler or Pillow; delete it (or choose another folder) to "
            "convert anew"
        )
    raise ValueError(
        f"files in {source} have been added, removed or changed since {place} was begun; delete it (or choose another "
        "folder) to convert anew"
    )

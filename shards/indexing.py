"""Indexing shards that are there already, wherever they come from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from shards.folder import IMAGE_EXTENSIONS
from shards.index import ShardIndex, ShardRecord
from shards.offsets import Sample, load_offsets, offset_path, pack_offsets
from shards.parallel import default_workers, map_processes
from shards.storage import sha256_file, write_atomic
from shards.tar import scan_tar

_MAX_CLASSES = 10_000_000


def build_index(
    folder: str | Path,
    *,
    workers: int | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    progress: bool = False,
) -> ShardIndex:
    """Index the tars of a folder, wherever they come from: write the offset files and `index.json`, and load them.

    Class names are kept from an `index.json` that is there already and has enough of them, otherwise they are the
    numbers; an offset file that agrees with its shard is kept, and with it the source paths. What was left out is kept
    in the offset files (`ShardIndex.skipped`). Warns when the samples are sorted by class. `ValueError` naming the file
    when a shard is truncated or damaged, holds a key twice or a `cls` that is no number, and when there are no shards
    or no images.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = sorted(file.name for file in folder.glob("*.t*gz")) if folder.is_dir() else []
        hint = f" ({packed[0]} is compressed: shards must be plain tar, so unpack it with gunzip)" if packed else ""
        raise ValueError(f"no .tar files in {folder}{hint}; `scaler convert SOURCE {folder}` makes shards from images")
    shards = map_processes(
        partial(_index_shard, image_extensions=tuple(image_extensions)),
        paths,
        num_tasks=len(paths),
        workers=default_workers() if workers is None else workers,
        label="indexing" if progress else None,
        total=len(paths),
        amount=lambda _: 1,
    )
    num_classes = max(num_classes for _, num_classes in shards)
    if not sum(record.num_samples for record, _ in shards):
        raise ValueError(f"no images ({', '.join(image_extensions)}) in the {len(paths)} shards of {folder}")
    index = ShardIndex(
        folder, shards=[record for record, _ in shards], class_names=_class_names(folder, num_classes=num_classes)
    )
    index.save()
    if (advice := sorted_by_class(index)) is not None:
        warnings.warn(advice, stacklevel=2)
    return index


def _index_shard(path: Path, *, image_extensions: Sequence[str]) -> tuple[ShardRecord, int]:
    """Write the offset file of one shard; its record and the number of classes that its labels need."""
    samples, skipped = scan_tar(path, image_extensions=image_extensions)
    record = ShardRecord(path.name, num_bytes=path.stat().st_size, num_samples=len(samples), sha256=sha256_file(path))
    if not _is_known(path, samples, sha256=record.sha256):
        data = pack_offsets(
            samples, shard_name=path.name, num_bytes=record.num_bytes, sha256=record.sha256, skipped=skipped
        )
        write_atomic(offset_path(path), data)
    return record, max((sample.label + 1 for sample in samples), default=0)


def _is_known(path: Path, samples: list[Sample], *, sha256: str) -> bool:
    """Whether the offset file says all this already; then it is kept, since only `convert` knows the source paths."""
    try:
        table = load_offsets(offset_path(path))
    except ValueError:
        return False
    if (table.shard_name, table.sha256, len(table)) != (path.name, sha256, len(samples)):
        return False
    return all(replace(table.sample(i), source=sample.source) == sample for i, sample in enumerate(samples))


def _class_names(folder: Path, *, num_classes: int) -> list[str]:
    with contextlib.suppress(ValueError):
        names = ShardIndex.load(folder).class_names
        if len(names) >= num_classes > 0:
            return names
    if num_classes > _MAX_CLASSES:
        raise ValueError(
            f"the labels in {folder} go up to {num_classes - 1}; class numbers count from 0, and at most "
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

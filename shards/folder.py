"""What an image folder holds: the images in path order, their classes, and everything that is not taken, with why."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.offsets import Skipped
from shards.sources import Files, look_at_files
from shards.storage import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass
class _Found:
    images: list[tuple[str, int, int]] = field(default_factory=list)  # path, size, time of the last change
    rejected: list[Skipped] = field(default_factory=list)
    ignored: list[Skipped] = field(default_factory=list)


def image_extension(name: str) -> str:
    """The lower-case ending of a file name, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def scan_folder(source: Path, *, labels: bool | None) -> Files:
    """List the images below `source`, following links but no loop of them.

    `labels` True: the sub-folders of `source` are the classes, sorted by name, each with everything below it; False:
    no labels; None: classes when there are images in sub-folders only. `ValueError` when there are no images, or when
    None cannot be decided because there are images both in `source` itself and in sub-folders.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that holds the images or the class folders")
    found = _walk(source)
    loose = [path for path, _, _ in found.images if "/" not in path]
    nested = len(loose) < len(found.images)
    if labels is None and nested and loose:
        raise ValueError(
            f"{source} holds images both itself ({printable(loose[0])}, …) and in sub-folders; say labels=True (the "
            "sub-folders are classes, the loose images are left out) or labels=False (no classes)"
        )
    labelled = nested if labels is None else labels
    if labelled and loose:
        found.ignored += [(path, "outside of the class folders") for path in loose]
        found.images = [image for image in found.images if "/" in image[0]]
    if not all(path.isascii() for path, _, _ in found.images):
        found.images.sort(key=lambda image: os.fsencode(image[0]))
    else:
        found.images.sort()  # the same order, without the bytes
    paths = [path for path, _, _ in found.images]
    folders = [path[: path.index("/")] for path in paths] if labelled else []
    names = _class_folders(source, set(folders), found) if labelled else []
    if not paths:
        others = f"; it holds {len(found.ignored)} other files" if found.ignored else ""
        raise ValueError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {source}{others}")
    numbers = {name: number for number, name in enumerate(names)}
    sizes = np.array([size for _, size, _ in found.images], dtype=np.int64)
    times = np.array([time for _, _, time in found.images], dtype=np.int64)
    labels_column = [numbers[folder] for folder in folders] if labelled else np.full(len(paths), -1)
    return Files(
        root=str(source),
        paths=paths,
        sizes=sizes,
        labels=np.array(labels_column, dtype=np.int64),
        class_names=[printable(name) for name in names],
        digest=files_digest(paths, sizes, times),
        rejected=sorted((printable(path), why) for path, why in found.rejected),
        ignored=sorted((printable(path), why) for path, why in found.ignored),
    )


def files_digest(paths: list[str], *columns: NDArray[np.int64]) -> str:
    """A sha256 that changes with the paths and with any number that belongs to them."""
    digest = hashlib.sha256(os.fsencode("\0".join(paths)))
    for column in columns:
        digest.update(column.tobytes())
    return digest.hexdigest()


def _class_folders(source: Path, used: set[str], found: _Found) -> list[str]:
    """All sub-folders, sorted; hidden ones only if they hold images. An empty class keeps its number and is named."""
    with os.scandir(source) as entries:
        names = {entry.name for entry in entries if _is_folder(entry)}
    empty = [name for name in sorted(names - used, key=os.fsencode) if not name.startswith(".")]
    found.ignored += [(name, "a class folder without images") for name in empty]
    return sorted(used.union(empty), key=os.fsencode)


def _walk(source: Path) -> _Found:
    """Collect what lies below `source`; each folder knows the (device, inode) of those above, to break link loops."""
    found = _Found()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        relative, above = waiting.pop()
        prefix = f"{relative}/" if relative else ""
        try:
            status = os.stat(source / relative)
            here = (status.st_dev, status.st_ino)
            if here in above:
                found.ignored.append((relative, "a link to a folder that it lies in"))
                continue
            names: list[str] = []
            with os.scandir(source / relative) as entries:
                for entry in entries:
                    name = entry.name
                    if _is_folder(entry):
                        waiting.append((prefix + name, above | {here}))
                    elif name[name.rfind(".") + 1 :].lower() in IMAGE_EXTENSIONS and (
                        name[0] != "." or image_extension(name)  # `.jpg` is a name without an ending
                    ):
                        names.append(name)
                    else:
                        found.ignored.append((prefix + name, "not an image ending"))
            columns = (column.tolist() for column in look_at_files(source / relative, names))
            found.images += zip([prefix + name for name in names], *columns, strict=True)
        except OSError as error:
            found.rejected.append((relative or ".", f"unreadable folder: {error.strerror}"))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False

"""What an image folder holds: the images in path order, their classes, and everything that is not taken, with why."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.offsets import Skipped
from shards.storage import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, sorted by path (as bytes). Columns over the n images.

    `paths` are relative; `sizes` int64 [n] in bytes, -1 where the file cannot be looked at (a broken link);
    `labels` int64 [n], -1 without classes; `digest` covers paths, sizes and modification times.
    """

    paths: list[str]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: list[str]
    digest: str
    rejected: list[Skipped]  # folders that cannot be read
    ignored: list[Skipped]  # files that are no images, loops of links, empty class folders


@dataclass
class _Found:
    images: list[tuple[str, int, int]] = field(default_factory=list)  # path, size, modification time
    rejected: list[Skipped] = field(default_factory=list)
    ignored: list[Skipped] = field(default_factory=list)


def image_extension(name: str) -> str:
    """The lower-case ending of a file name, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def scan_folder(source: Path, *, labels: bool | None) -> ImageFolder:
    """List the images below `source`, following links but no loop of them.

    `labels` True: the sub-folders of `source` are the classes, sorted by name, each with everything below it; False:
    no labels; None: classes when there are images in sub-folders only. `ValueError` when there are no images, or when
    None cannot be decided because there are images both in `source` itself and in sub-folders.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that holds the images or the class folders")
    found = _walk(source)
    nested = any("/" in path for path, _, _ in found.images)
    loose = [path for path, _, _ in found.images if "/" not in path]
    if labels is None and nested and loose:
        raise ValueError(
            f"{source} holds images both itself ({printable(loose[0])}, …) and in sub-folders; say labels=True (the "
            "sub-folders are classes, the loose images are left out) or labels=False (no classes)"
        )
    labelled = nested if labels is None else labels
    class_names: list[str] = []
    if labelled:
        found.ignored += [(path, "outside of the class folders") for path in loose]
        found.images = [image for image in found.images if "/" in image[0]]
        class_names = _class_folders(source, found)
    if not found.images:
        others = f"; it holds {len(found.ignored)} other files" if found.ignored else ""
        raise ValueError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {source}{others}")
    found.images.sort(key=lambda image: os.fsencode(image[0]))
    digest = hashlib.sha256()
    for path, size, time in found.images:
        digest.update(b"%b\0%d %d\n" % (os.fsencode(path), size, time))
    numbers = {name: number for number, name in enumerate(class_names)}
    return ImageFolder(
        paths=[path for path, _, _ in found.images],
        sizes=np.array([size for _, size, _ in found.images], dtype=np.int64),
        labels=np.array(
            [numbers[path.partition("/")[0]] if labelled else -1 for path, _, _ in found.images], dtype=np.int64
        ),
        class_names=[printable(name) for name in class_names],
        digest=digest.hexdigest(),
        rejected=sorted((printable(path), why) for path, why in found.rejected),
        ignored=sorted((printable(path), why) for path, why in found.ignored),
    )


def _class_folders(source: Path, found: _Found) -> list[str]:
    """All sub-folders, sorted; hidden ones only if they hold images. An empty class keeps its number and is named."""
    used = {path.partition("/")[0] for path, _, _ in found.images}
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
        try:
            status = os.stat(source / relative)
            here = (status.st_dev, status.st_ino)
            if here in above:
                found.ignored.append((relative, "a link to a folder that it lies in"))
                continue
            with os.scandir(source / relative) as entries:
                for entry in entries:
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    if _is_folder(entry):
                        waiting.append((path, above | {here}))
                    elif image_extension(entry.name) in IMAGE_EXTENSIONS:
                        found.images.append((path, *_size_and_time(entry)))
                    else:
                        found.ignored.append((path, "not an image ending"))
        except OSError as error:
            found.rejected.append((relative or ".", f"unreadable folder: {error.strerror}"))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)

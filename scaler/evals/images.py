"""Images to evaluate on or to look at: shards, or a folder of images as it is.

    index = open_images("shards/val")            # or the URL of shards
    index = open_images("photos/val")            # class folders, or a flat folder
    index.num_samples, index.class_names, index.keys([0, 1]), index.entry(0).source, index.fingerprint

A folder of images becomes shards, by the code that `scaler convert` runs, so that there is one way to read a picture.
They are kept in the user's cache folder for as long as the folder's names, sizes and times stay the same.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path

from scaler.evals.store import Kept
from shards.cache import ShardCache
from shards.convert import convert
from shards.folder import scan_folder
from shards.index import INDEX_NAME, ShardIndex
from shards.places import locate
from shards.shardlist import find_shards


def open_images(
    place: str | Path, *, cache_dir: str | Path | None = None, shard_cache: ShardCache | None = None
) -> ShardIndex:
    """Open shards (a folder or URL with index.json), or a folder of images: its images in the order of their paths.

    Sub-folders are classes, as for `scaler convert`; a file that is no image is left out, with a warning.

    Args:
        cache_dir: where folders of images are kept as shards; None: in the user's cache folder.
        shard_cache: for shards of a URL; None: in the user's cache folder.

    Raises:
        ValueError: neither, no images, or a full disk, in one line.
    """
    folder = locate(str(place))
    if not isinstance(folder, Path) or not folder.is_dir() or (folder / INDEX_NAME).exists() or _is_shards(folder):
        return ShardIndex.load(folder, cache=shard_cache)
    files = scan_folder(folder, labels=None)
    name = hashlib.sha256(os.fsencode(f"{folder.resolve()} {files.digest}")).hexdigest()[:32]
    shards = Kept(cache_dir).entry("images", name)
    if not (shards / INDEX_NAME).exists():
        convert(folder, shards, shuffle=False, progress=sys.stderr.isatty())
    index = ShardIndex.load(shards)
    if left_out := sorted(files.rejected + index.skipped()):
        path, why = left_out[0]
        warnings.warn(f"{len(left_out)} files in {folder} are left out; the first, {path}: {why}", stacklevel=2)
    return index


def _is_shards(folder: Path) -> bool:
    """Whether these are shards without their index, which `ShardIndex.load` says how to make."""
    return find_shards(str(folder)) is not None

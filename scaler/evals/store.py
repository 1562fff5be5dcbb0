"""What evaluations keep on a local disk: features by the content of what made them, and folders of images as shards.

    folder = Kept(cache_dir).entry("features", key)      # it is there, empty or not, and counts as used just now

A folder that has not been used for longest is removed when all of them together pass a bound. Whoever fills one writes
each file whole or not at all, so that a killed evaluation leaves what it had finished, and the next one goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards.cache import default_folder
from shards.storage import write_atomic

KEPT_BYTES = 50 * 10**9
CHUNK = 1024  # samples of a file of features
Content = tuple[Tensor, Tensor, list[dict[str, Any]]]  # of a chunk: ids, features, what could not be decoded
_IN_USE_SECONDS = 3600.0  # what was used so recently stays, whatever the bound


class Kept:
    """A folder of entries, `KIND/NAME`, that may be removed at any time when nobody has used them for an hour.

    Args:
        folder: None: beside the cache of remote shards, in the user's cache folder.
        max_bytes: of all entries together, when one is added.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int = KEPT_BYTES) -> None:
        self.folder = default_folder().with_name("evaluations") if folder is None else Path(folder).absolute()
        self.max_bytes = max_bytes

    def entry(self, kind: str, name: str) -> Path:
        """The folder of an entry, which is made if it is not there.

        Raises:
            ValueError: a place that cannot be written to.
        """
        path = self.folder / kind / name
        try:
            if not path.is_dir():
                self._trim()
                path.mkdir(parents=True, exist_ok=True)
            os.utime(path)
        except OSError as error:
            raise ValueError(
                f"cannot keep {kind} in {self.folder}: {error.strerror}; name another folder (--cache-dir)"
            ) from error
        return path

    def _trim(self) -> None:
        found = []  # (last use, bytes, folder)
        for path in self.folder.glob("*/*/"):
            files = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
            found.append((path.stat().st_mtime, sum(files), path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total > self.max_bytes and time.time() - used > _IN_USE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
                total -= size


def content_key(facts: Mapping[str, Any]) -> str:
    """What an entry is called: a digest of plain facts on which its content depends."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class FeatureStore:
    """Features of the samples of one data set by one model, in files of `CHUNK` consecutive samples each.

    Args:
        facts: all that features depend on; also written beside them, for people.
    """

    def __init__(self, kept: Kept, facts: Mapping[str, Any]) -> None:
        self.folder = kept.entry("features", content_key(facts))
        write_atomic(self.folder / "facts.json", (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())

    def read(self, chunk: int) -> Content | None:
        """Ids int64 [n], features float32 [n, d] and rejected samples of a chunk; None: not here, or damaged."""
        try:
            with safe_open(self._path(chunk), framework="pt") as file:
                rejected = json.loads((file.metadata() or {})["rejected"])
                return file.get_tensor("ids"), file.get_tensor("features"), rejected
        except (FileNotFoundError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def write(self, chunk: int, ids: Tensor, features: Tensor, rejected: list[dict[str, Any]]) -> None:
        """Keep a chunk, whole or not at all. `ValueError` names the file that a disk refuses."""
        tensors = {"ids": ids.contiguous(), "features": features.contiguous()}
        write_atomic(self._path(chunk), save(tensors, metadata={"rejected": json.dumps(rejected)}))

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.safetensors"


def chunk_ids(chunk: int, num_samples: int) -> range:
    """The samples of a chunk."""
    return range(chunk * CHUNK, min((chunk + 1) * CHUNK, num_samples))


def num_chunks(num_samples: int) -> int:
    """Files that hold so many samples."""
    return -(-num_samples // CHUNK)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of named tensors: names, types, shapes and every value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

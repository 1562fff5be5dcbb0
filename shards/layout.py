"""Which images go to which shard, under which keys: decided before anything is written."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from shards.destination import WrittenShard
from shards.keys import KeyMaker
from shards.places import Location
from shards.random import keyed_permutation
from shards.sources import Source
from shards.writer import Options, sample_bytes, size_ratio, write_shard

DEFAULT_SHARD_SIZE = 256_000_000
_FEW_SHARDS, _FEW_RESIZED = 8, 64  # that a small set has at least, so that processes can share the work,
_SMALL_SHARD = 16_000_000  # as long as this many bytes of the source are left to each
_MAX_SHARDS = 1_000_000  # six digits in the name
_MEASURED = 32  # images that are resized to see how large the others will be


class Plan:
    """Which images go to which shard, under which keys: a pure function of the source and the options.

    Attributes:
        splits: the folders below the destination that have shards and an index ("" for itself).
        names: of all shards, below the destination.
        digest: of what lies where; another one where another version plans otherwise.
    """

    def __init__(
        self,
        source: Source,
        place: Location,
        options: Options,
        *,
        name: str,
        shard_size: int | None,
        seed: int,
        shuffle: bool,
        val_fraction: float | None,
    ) -> None:
        self._source, self._place, self._options = source, place, options
        make_key = KeyMaker()
        self._keys = [make_key(path) for path in source.names]
        size = len(source.paths)
        order = keyed_permutation(size, "convert", seed) if shuffle else np.arange(size)
        self.splits = {"": order}
        if val_fraction is not None:
            chosen = _chosen_for_val(source.labels, val_fraction, seed=seed)
            self.splits = {"train": order[~chosen[order]], "val": order[chosen[order]]}
        sizes = source.sizes.clip(0)
        if options.resize:
            drawn = keyed_permutation(size, "size", seed)[:_MEASURED].tolist()
            sizes = np.ceil(sizes * size_ratio(source, drawn, options=options)).astype(np.int64)
        weights = sample_bytes(sizes, label=bool(source.class_names), json_member=options.json_member)
        self.names: list[str] = []
        self._images: list[NDArray[np.int64]] = []
        for part, images in self.splits.items():
            few = min(_FEW_RESIZED if options.resize else _FEW_SHARDS, int(source.sizes[images].sum()) // _SMALL_SHARD)
            cuts = _cuts(weights[images], shard_size=shard_size or DEFAULT_SHARD_SIZE, few=0 if shard_size else few)
            self._images += np.split(images, cuts)
            prefix = f"{part}/{name}" if part else name
            self.names += [f"{prefix}-{number:06d}.tar" for number in range(len(cuts) + 1)]
        digest = hashlib.sha256("\0".join(self._keys).encode())
        for images in self._images:
            digest.update(images.tobytes() + b"|")
        self.digest = digest.hexdigest()

    def num_images(self, number: int) -> int:
        """The images of shard `number`, before any is rejected."""
        return len(self._images[number])

    def write(self, number: int) -> WrittenShard:
        """Write shard `number`."""
        name, place = self.names[number], self._place
        for part in name.split("/"):
            place = place / part
        return write_shard(
            name, place, source=self._source, numbers=self._images[number], keys=self._keys, options=self._options
        )


def _cuts(weights: NDArray[np.int64], *, shard_size: int, few: int) -> NDArray[np.int64]:
    """Where samples of so many bytes (int64 [n]) are cut into equal parts: int64 [shards - 1].

    These have at most `shard_size` bytes, and there are at least `few`.
    """
    ends = np.cumsum(weights)
    total = int(ends[-1])
    num_shards = max(-(-total // shard_size), few)
    # A file goes to the part in which it begins.
    starts = np.unique((ends - weights) // -(-total // num_shards), return_index=True)[1]
    if len(starts) > _MAX_SHARDS:
        raise ValueError(
            f"{len(starts)} shards of {shard_size} bytes would be needed, at most {_MAX_SHARDS} are possible; "
            "choose a larger shard_size"
        )
    return starts[1:]


def _chosen_for_val(labels: NDArray[np.int64], fraction: float, *, seed: int) -> NDArray[np.bool_]:
    """Which of the n images (bool [n]) are for validation: round(fraction · n), and of each class its part, ± 1.

    The images are laid out class by class, each class in an order drawn by the seed, and every 1/fraction-th is taken.
    """
    size = len(labels)
    count = round(fraction * size)
    if not 0 < count < size:
        raise ValueError(f"val_fraction {fraction} of {size} images is {count}; both parts need at least one image")
    order = keyed_permutation(size, "val", seed)
    order = order[np.argsort(labels[order], kind="stable")]
    steps = np.arange(size + 1) * count // size
    chosen = np.zeros(size, dtype=np.bool_)
    chosen[order[steps[1:] > steps[:-1]]] = True
    return chosen

"""Images on their way to people: normalised tensors as pixels, some samples of an index, numbers as colours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaler.evals.checkpoints import EvaluationModel
from scaler.evals.features import normalized
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches


@dataclass(frozen=True)
class Images:
    """Some samples of an index, as a model sees them but for the normalisation.

    Attributes:
        pixels: uint8 [n, 3, size, size].
        ids: int64 [n]; labels: int64 [n], -1 where there is none; keys: [n].
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    keys: list[str]


def to_pixels(images: Tensor, *, normalization: tuple[Sequence[float], Sequence[float]]) -> NDArray[np.uint8]:
    """Images [n, 3, h, w] as uint8 [n, h, w, 3]: floats have their normalisation undone, bytes stay as they are."""
    if images.is_floating_point():
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in normalization)
        images = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def spread(index: ShardIndex, num: int) -> NDArray[np.int64]:
    """At most `num` sample ids, evenly spread over all, ascending."""
    num = min(num, index.num_samples)
    return np.arange(num, dtype=np.int64) * index.num_samples // max(num, 1)


def load_images(index: ShardIndex, ids: NDArray[np.int64], *, image_size: int, crop_fraction: float = 1.0) -> Images:
    """Centre crops of the samples `ids` (ascending); those that cannot be decoded are left out, with a warning.

    Raises:
        ValueError: none of them can be decoded, or a shard is missing or damaged.
    """
    view = View("center", image_size, kind="center", crop_fraction=crop_fraction)
    (batch,) = evaluation_batches(index, view=view, batch_size=len(ids), ids=ids)
    if bad := batch["rejected"]:
        why = f"{bad[0]['key']}: {bad[0]['reason']}"
        if len(bad) == len(ids):
            raise ValueError(f"{index.path}: none of {len(ids)} images can be decoded; the first, {why}")
        warnings.warn(f"{len(bad)} of {len(ids)} images cannot be decoded and are left out; {why}", stacklevel=2)
    good = batch["weights"] > 0
    kept = batch["ids"][good]
    return Images(batch["images"][good], kept, batch["labels"][good], index.keys(kept.numpy()))


@torch.no_grad()
def pooled_features(model: EvaluationModel, pixels: Tensor, *, batch_size: int = 64) -> Tensor:
    """The feature that evaluations use, float32 [n, d] on the CPU, of images uint8 [n, 3, s, s]."""
    parts = pixels.split(batch_size)
    normalization = model.method.normalization
    return torch.cat(
        [model.method.features(normalized(p.to(model.device), normalization)).float().cpu() for p in parts]
    )


def class_name(index: ShardIndex, label: int) -> str | None:
    """The class of a label; None where there is none."""
    return index.class_names[label] if 0 <= label < len(index.class_names) else None

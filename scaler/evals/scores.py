"""Mean scores of a classifier over held-out images: each image once, whatever the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scaler.collectives import World
from scaler.evals.features import Normalization, normalized
from shards.index import ShardIndex
from shards.loader import evaluation_batches

Score = Callable[[Tensor, Tensor], dict[str, Tensor]]  # `Method.evaluate`, or a strategy's call of it


@torch.no_grad()
def mean_scores(
    score: Score,
    index: ShardIndex,
    *,
    world: World,
    device: torch.device,
    normalization: Normalization,
    to_label: Tensor | None = None,
    beat: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[dict[str, float], int]:
    """The mean of each score over all images that can be decoded, and how many cannot; called by all ranks together.

    Args:
        to_label: int64, the model's label of each class of `index`; None: the same.
        beat: called before each batch.
        options: for `evaluation_batches`.

    Raises:
        ValueError: an image without a label, none that can be decoded, a shard that is missing or cut off.
    """
    sums: dict[str, Tensor] = {}
    count = torch.zeros(2, dtype=torch.float64, device=device)  # scored, rejected
    for batch in evaluation_batches(index, rank=world.rank, world_size=world.size, **options):
        beat()
        labels, weights = batch["labels"], batch["weights"]
        if (unlabelled := (weights > 0) & (labels < 0)).any():
            sample = int(batch["ids"][unlabelled][0])
            raise ValueError(
                f"{index.path}: sample {sample} has no label, and every image needs one to be scored; convert from a "
                "folder of class folders"
            )
        labels = labels.clamp(min=0)
        labels = (labels if to_label is None else to_label[labels]).to(device)
        images = normalized(batch["images"].to(device, non_blocking=True), normalization)
        weight = weights.to(device, torch.float64)
        for name, values in score(images, labels).items():
            sums[name] = sums.get(name, 0.0) + torch.where(weight > 0, values.double(), 0.0).sum()
        count += torch.stack([weight.sum(), weight.new_tensor(len(batch["rejected"]))])
    names = sorted(sums)
    *totals, scored, rejected = world.sum_(torch.cat([torch.stack([sums[name] for name in names]), count])).tolist()
    if not scored:
        raise ValueError(f"{index.path}: no image can be decoded")
    return {name: total / scored for name, total in zip(names, totals, strict=True)}, int(rejected)

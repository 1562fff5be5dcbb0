"""Features of every sample of a shard folder, in index order, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from scaler.collectives import World
from scaler.methods.base import Method
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def normalized(images: Tensor, normalization: Normalization) -> Tensor:
    """Images uint8 [n, 3, h, w] as float32, by mean and deviation per channel of pixels from 0 to 1."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in normalization)
    return (images.float() - mean) / std


@torch.no_grad()
def extract_features(
    features_fn: Callable[[Tensor], Tensor],
    index: ShardIndex,
    *,
    view: View,
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
    world: World,
    normalization: Normalization = Method.normalization,
    title: str = "features",
) -> tuple[Tensor, Tensor]:
    """Run `features_fn` over all samples of `index`, each exactly once.

    Samples that cannot be decoded are left out, with a warning that says how many and why.

    Args:
        features_fn: normalised images, float32 [n, 3, size, size] on `device`, to features [n, d]; put the module in
            evaluation mode first. With several ranks it is called equally often on each.
        view: how images are cut, usually `View(…, kind="center")`.
        normalization: mean and standard deviation per channel, for pixels from 0 to 1.
        title: what the progress bar says.

    Returns:
        float32 [n, d] and int64 [n] (-1 where there is no label), on the CPU and the same on every rank, for the
        n samples that decode.

    Raises:
        ValueError: a shard that is missing or cut off (from the loader), or no sample that decodes.
    """
    features, labels = torch.empty(0), torch.full((index.num_samples,), -1, dtype=torch.int64)
    times = torch.zeros(index.num_samples, dtype=torch.int64)
    rejected: list[dict[str, Any]] = []
    batches = evaluation_batches(
        index, view=view, batch_size=batch_size, rank=world.rank, world_size=world.size, num_workers=num_workers
    )
    # No drawing thread, since loader processes are forked while the bar is up.
    progress = Progress(auto_refresh=False, transient=True)
    progress.disable = world.rank > 0 or not progress.console.is_terminal
    with progress:
        task = progress.add_task(title, total=index.num_samples)
        for batch in batches:
            images = normalized(batch["images"].to(device, non_blocking=True), normalization)
            out = world.all_gather(features_fn(images).float()).cpu()
            facts = [torch.as_tensor(batch[key]).to(device) for key in ("ids", "labels", "weights")]
            ids, found, weights = (world.all_gather(fact).cpu() for fact in facts)
            if not len(features):
                features = torch.empty((index.num_samples, out.shape[1]))
            real = weights > 0
            features[ids[real]], labels[ids[real]] = out[real], found[real]
            times[ids[real]] += 1
            rejected += batch["rejected"]
            progress.update(task, advance=int(real.sum()), refresh=True)
    rejected = sorted((r for part in world.gather_objects(rejected) for r in part), key=lambda record: record["id"])
    bad = torch.tensor([record["id"] for record in rejected], dtype=torch.int64)
    times[bad] += 1
    assert (times == 1).all(), f"{int((times != 1).sum())} of {index.num_samples} samples were not read exactly once"
    if rejected:
        why = f"the first, {rejected[0]['key']}: {rejected[0]['reason']}"
        if len(bad) == index.num_samples:
            raise ValueError(f"{index.path}: no sample can be decoded; {why}")
        if world.rank == 0:
            count = f"{len(bad)} of {index.num_samples} samples in {index.path}"
            warnings.warn(f"{count} cannot be decoded and are left out; {why}", stacklevel=2)
    good = torch.ones(index.num_samples, dtype=torch.bool)
    good[bad] = False
    return (features, labels) if good.all() else (features[good], labels[good])

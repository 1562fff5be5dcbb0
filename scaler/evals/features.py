"""Features of every sample of a shard folder, in index order, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.progress import Progress
from torch import Tensor

from scaler.collectives import World
from scaler.methods.base import Method
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches


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
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = Method.normalization,
    title: str = "features",
) -> tuple[Tensor, Tensor]:
    """Run `features_fn` over all samples of `index`, each exactly once.

    Args:
        features_fn: normalised images, float32 [n, 3, size, size] on `device`, to features [n, d]; put the module in
            evaluation mode first. With several ranks it is called equally often on each.
        view: how images are cut, usually `View(…, kind="center")`.
        normalization: mean and standard deviation per channel, for pixels from 0 to 1.
        title: what the progress bar says.

    Returns:
        float32 [N, d] and int64 [N] (-1 where there is no label), on the CPU and the same on every rank.

    Raises:
        ValueError: a sample cannot be decoded (from the loader).
    """
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in normalization)
    features, labels = torch.empty(0), torch.full((index.num_samples,), -1, dtype=torch.int64)
    times = torch.zeros(index.num_samples, dtype=torch.int64)
    batches = evaluation_batches(
        index, view=view, batch_size=batch_size, rank=world.rank, world_size=world.size, num_workers=num_workers
    )
    # No drawing thread, since loader processes are forked while the bar is up.
    progress = Progress(auto_refresh=False, transient=True)
    progress.disable = world.rank > 0 or not progress.console.is_terminal
    with progress:
        task = progress.add_task(title, total=index.num_samples)
        for batch in batches:
            images = (batch["images"].to(device, non_blocking=True).float() - mean) / std
            out = world.all_gather(features_fn(images).float()).cpu()
            facts = [torch.as_tensor(batch[key]).to(device) for key in ("ids", "labels", "weights")]
            ids, found, weights = (world.all_gather(fact).cpu() for fact in facts)
            if not len(features):
                features = torch.empty((index.num_samples, out.shape[1]))
            real = weights > 0
            features[ids[real]], labels[ids[real]] = out[real], found[real]
            times[ids[real]] += 1
            progress.update(task, advance=int(real.sum()), refresh=True)
    assert (times == 1).all(), f"{int((times != 1).sum())} of {index.num_samples} samples were not read exactly once"
    return features, labels

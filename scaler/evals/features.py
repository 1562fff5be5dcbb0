"""Features of the samples of shards: every sample once, on any number of ranks, each of which keeps its part.

    x, labels = extract_features(model, index, view=…, …)                    # all on every rank, in index order
    part = extract_part(model, index, store=…, world=world, …)               # this rank's, kept on disk

`extract_part` works chunk by chunk (`store.CHUNK` consecutive samples), and each rank has a run of chunks, so that a
remote shard is fetched by one of them. With a store each chunk is written as soon as it is complete, so that an
evaluation that was killed goes on where it stopped, also on another number of ranks.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from scaler.collectives import World
from scaler.evals.store import Content, FeatureStore, chunk_ids, num_chunks
from scaler.methods.base import Method
from shards.decode import View
from shards.index import ShardIndex
from shards.loader import evaluation_batches

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
_SAY_SECONDS = 30.0  # between two lines on the progress, where there is no terminal


class Part(NamedTuple):
    """Features of some samples, in ascending order of their ids.

    Attributes:
        ids: int64 [n]. labels: int64 [n], -1 where there is none. features: float32 [n, d].
    """

    ids: Tensor
    labels: Tensor
    features: Tensor

    def to(self, device: torch.device | str) -> Part:
        """The same on another device."""
        return Part(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Extraction:
    """How a part was come by.

    Attributes:
        images: that the model has seen in all, of `num_samples`; the others' features were kept from before.
        images_per_second: of all ranks together, reading and decoding included; None where it has seen none.
    """

    part: Part
    images: int
    num_samples: int
    images_per_second: float | None


def normalized(images: Tensor, normalization: Normalization) -> Tensor:
    """Images uint8 [n, 3, h, w] as float32, by mean and deviation per channel of pixels from 0 to 1."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in normalization)
    return (images.float() - mean) / std


def feature_batches(
    features_fn: Callable[[Tensor], Tensor],
    index: ShardIndex,
    *,
    device: torch.device | str,
    normalization: Normalization = Method.normalization,
    **options: Any,
) -> Iterator[tuple[Part, list[dict[str, Any]]]]:
    """`features_fn` on this rank's batches of `evaluation_batches(index, **options)`: rows on the CPU, without padding
    and without the samples that cannot be decoded, which come with each as records.

    Args:
        features_fn: normalised images, float32 [n, 3, size, size] on `device`, to features [n, d]; put the module in
            evaluation mode first. With several ranks it is called equally often on each.
        normalization: mean and standard deviation per channel, for pixels from 0 to 1.
    """
    for batch in evaluation_batches(index, **options):
        images = normalized(batch["images"].to(device, non_blocking=True), normalization)
        with torch.no_grad():
            features = features_fn(images).float().cpu()
        real = batch["weights"] > 0
        ids = torch.as_tensor(batch["ids"])
        yield Part(ids[real], torch.as_tensor(batch["labels"])[real], features[real]), batch["rejected"]


def extract_features(
    features_fn: Callable[[Tensor], Tensor], index: ShardIndex, *, world: World, **options: Any
) -> tuple[Tensor, Tensor]:
    """Features of all samples of `index`, float32 [n, d], and their labels, int64 [n] (-1: none), on the CPU and the
    same on every rank, for the n samples that decode; `options` and errors are those of `extract_part`.
    """
    part = extract_part(features_fn, index, world=world, **options).part
    ids, labels, features = (torch.cat(parts) for parts in zip(*world.gather_objects(tuple(part)), strict=True))
    order = ids.argsort()
    return features[order], labels[order]


def extract_part(
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
    store: FeatureStore | None = None,
    ranks_per_node: int = 1,
) -> Extraction:
    """Features of this rank's chunks of `index`, called by all ranks together.

    Samples that cannot be decoded are left out, with a warning that says how many and why.

    Args:
        features_fn: see `feature_batches`; it needs no other rank.
        view: how images are cut, usually `View(…, kind="center")`.
        title: what the progress bar says.
        store: where features are kept, and taken from where they are there.

    Raises:
        ValueError: a shard that is missing or cut off (from the loader), or no sample that decodes.
    """
    count = num_chunks(index.num_samples)
    own = range(world.rank * count // world.size, (world.rank + 1) * count // world.size)
    kept = {chunk: None if store is None else store.read(chunk) for chunk in own}
    missing = [chunk for chunk, content in kept.items() if content is None]
    ids = np.concatenate([_NONE, *(np.array(chunk_ids(chunk, index.num_samples)) for chunk in missing)])
    began = time.monotonic()
    batches = feature_batches(
        features_fn,
        index,
        device=device,
        normalization=normalization,
        view=view,
        batch_size=min(batch_size, max(1, len(ids))),
        ids=ids,
        ranks_per_node=ranks_per_node,
        num_workers=num_workers,
    )
    with _progress(title, total=len(ids), shown=world.rank == 0) as advance:
        for chunk, content in _chunks(batches, missing, num_samples=index.num_samples, advance=advance):
            kept[chunk] = content
            if store is not None:
                store.write(chunk, *content)
    found = [content for content in kept.values() if content is not None]
    assert len(found) == len(own), "every chunk is read once"
    seconds = time.monotonic() - began
    facts = world.gather_objects((len(ids), seconds, [r for c in found for r in c[2]], [c[1].shape[1] for c in found]))
    images, slowest = sum(fact[0] for fact in facts), max(fact[1] for fact in facts)
    _warn_of([record for fact in facts for record in fact[2]], index, silent=world.rank > 0)
    width = next(d for fact in facts for d in fact[3])  # which a rank without any chunk does not know
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *(content[0] for content in found)])
    features = torch.cat([torch.empty(0, width), *(content[1] for content in found)])
    part = Part(rows, torch.from_numpy(index.labels(rows.numpy())), features)
    return Extraction(part, images, index.num_samples, images / slowest if images else None)


_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


def _chunks(
    batches: Iterator[tuple[Part, list[dict[str, Any]]]],
    chunks: list[int],
    *,
    num_samples: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Content]]:
    """The rows of batches by chunk, each as soon as it is complete."""
    waiting, rejected, at = Part(*(torch.empty(0, dtype=torch.int64),) * 2, torch.empty(0)), [], 0
    for part, bad in batches:
        advance(len(part.ids) + len(bad))
        rejected += bad
        waiting = Part(*(torch.cat(pair) for pair in zip(waiting, part, strict=True))) if len(waiting.ids) else part
        while at < len(chunks) and len(waiting.ids) + len(rejected) >= len(chunk_ids(chunks[at], num_samples)):
            past = chunk_ids(chunks[at], num_samples).stop
            inside = waiting.ids < past
            bad = [record for record in rejected if record["id"] < past]
            yield chunks[at], (waiting.ids[inside], waiting.features[inside], bad)
            waiting = Part(*(tensor[~inside] for tensor in waiting))
            rejected, at = [record for record in rejected if record["id"] >= past], at + 1


def _warn_of(rejected: list[dict[str, Any]], index: ShardIndex, *, silent: bool) -> None:
    """Say that samples were left out; `ValueError` where these are all."""
    if not rejected:
        return
    first = min(rejected, key=lambda record: int(record["id"]))
    why = f"the first, {first['key']}: {first['reason']}"
    if len(rejected) == index.num_samples:
        raise ValueError(f"{index.path}: no sample can be decoded; {why}")
    if not silent:
        count = f"{len(rejected)} of {index.num_samples} samples in {index.path}"
        warnings.warn(f"{count} cannot be decoded and are left out; {why}", stacklevel=4)


@contextlib.contextmanager
def _progress(title: str, *, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal's standard error, else a line twice a minute."""
    console, began, done, said = Console(stderr=True), time.monotonic(), 0, time.monotonic()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    # No drawing thread, since loader processes are forked while the bar is up.
    bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True)
    bar.disable = not (shown and total and console.is_terminal)
    with bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.monotonic()
            rate = done / max(now - began, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:,.0f} images/s", refresh=True)
            if shown and bar.disable and now - said > _SAY_SECONDS:
                said, left = now, (total - done) / rate
                line = f"{title}: {done:,} of {total:,}, {rate:,.0f} images/s, {left:,.0f} s left"
                print(line, file=sys.stderr, flush=True)

        yield advance

"""What a run trains on: shards with an index, or (`data.reader: stream`) whatever webdataset can open, without one.

    data = open_data(recipe)
    loader = data.loader(method.views, batch_size=256, layout=layout, world=world, start=0, stop=None)

Of indexed shards everything is known: how many samples there are, which comes when, where a resumed run goes on. Of a
stream nothing is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scaler.collectives import World
from scaler.layout import Layout
from scaler.methods.base import Batch, Method
from scaler.nested import flatten
from scaler.recipe import Recipe
from scaler.schedules import Duration
from scaler.strategies.processes import ranks_per_node
from scaler.timetable import Timetable, batch_sizes
from shards.decode import View
from shards.device_decode import why_no_gpu_decoding
from shards.index import ShardIndex
from shards.indexing import sorted_by_class
from shards.loader import ShardLoader, cached_set_bytes, working_set_bytes
from shards.order import SampleOrder, default_lanes
from shards.places import Url


class TrainingData(ABC):
    """The images of a run.

    Attributes:
        index: which images there are; None where nobody knows.
        num_samples: how many there are; None where nobody knows.
        class_names: by label, empty where there are no labels; None where nobody knows.
        fingerprint: of what they are, for checkpoints.
        place: `data.shards` for the resolved recipe.
        remote: whether they come over a network.
    """

    index: ShardIndex | None
    num_samples: int | None
    class_names: Sequence[str] | None
    fingerprint: str
    place: str
    remote: bool

    @abstractmethod
    def check(self, method: Method) -> None:
        """Refuse what `method` cannot be trained on.

        Raises:
            ValueError: says why.
        """

    @abstractmethod
    def loader(
        self, views: Sequence[View], *, batch_size: int, layout: Layout, world: World, start: int, stop: int
    ) -> Iterable[Batch]:
        """This rank's micro-batches, of global batches of one size, from image `start` to `stop`."""

    def batches(
        self,
        method: Method,
        *,
        timetable: Timetable,
        layouts: Mapping[int, Layout],
        world: World,
        step: int,
        images: int,
    ) -> Iterator[Batch]:
        """This rank's micro-batches from `step` (after so many `images`) to the run's end, stage after stage."""
        while step < timetable.stop:
            stage = timetable.stage(step)
            size = stage.global_batch_size
            steps = min(timetable.stop, stage.stop or timetable.stop) - step
            yield from self.loader(
                method.views_at(stage.image_size),
                batch_size=size,
                layout=layouts[size],
                world=world,
                start=images,
                stop=images + steps * size,
            )
            step, images = step + steps, images + steps * size

    @abstractmethod
    def notes(self, *, layout: Layout, resumes: bool) -> Iterator[str]:
        """What the user should know, a line each."""


def open_data(recipe: Recipe) -> TrainingData:
    """The recipe's training data.

    Raises:
        ValueError: there is no such thing, in one line.
    """
    return StreamData(recipe) if recipe.data.reader == "stream" else IndexedData(recipe)


class IndexedData(TrainingData):
    """Shards with an index, in the order that the recipe gives them."""

    index: ShardIndex

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.index = ShardIndex.load(recipe.data.shards, cache=recipe.data.cache())
        self.order = build_order(recipe, self.index)
        self.num_samples, self.fingerprint = self.index.num_samples, self.index.fingerprint
        self.class_names = self.index.class_names
        self.place = str(self.index.path.resolve() if isinstance(self.index.path, Path) else self.index.path)
        self.remote = isinstance(self.index.shards_at, Url)

    def check(self, method: Method) -> None:
        """See `TrainingData.check`."""
        method.check_classes(self.index.class_names)

    def loader(
        self, views: Sequence[View], *, batch_size: int, layout: Layout, world: World, start: int, stop: int
    ) -> ShardLoader:
        """See `TrainingData.loader`."""
        return ShardLoader(
            self.index,
            self.order,
            views=views,
            ranks_per_node=ranks_per_node(world.size),
            start=start,
            stop=stop,
            decode=self._recipe.data.decode,
            **_loader_options(self._recipe, batch_size=batch_size, layout=layout, world=world),
        )

    def notes(self, *, layout: Layout, resumes: bool) -> Iterator[str]:
        """See `TrainingData.notes`: how much is read at a time, and whether the cache is too small for it."""
        index, order, cache = self.index, self.order, self.index.cache
        if cache is None:
            gib = working_set_bytes(index, order) / 2**30
            yield f"data: {order.lanes} lanes, {gib:.2f} GiB read in random order at a time (should fit the page cache)"
            why = f"only shards of a URL are cached, not {index.shards_at}"
            yield from _without_effect(self._recipe, "cache_dir", "cache_size", why=why)
        else:
            num_nodes = -(-layout.ranks // ranks_per_node(layout.ranks))
            needed, bound = cached_set_bytes(index, order, num_nodes=num_nodes) / 1e9, cache.max_bytes / 1e9
            yield (
                f"data: {order.lanes} lanes of {index.path}, about {needed:.3g} GB of shards at a time on each node; "
                f"cached in {cache.folder}, at most {bound:.3g} GB"
            )
            if needed > bound:
                yield (
                    "warning: the cache is smaller than that: samples will be read over the network one by one, or "
                    f"shards more than once; set data.cache_size to {needed:.3g}GB or more, or lower data.lanes or "
                    "data.shuffle_window"
                )
        yield from _without_effect(self._recipe, "allow_pipes", why="only data.reader=stream runs commands")
        if (advice := sorted_by_class(index)) is not None:
            yield f"warning: {advice}"


class StreamData(TrainingData):
    """Shards without an index: drawn with replacement, each rank and worker by itself."""

    index = None
    num_samples = None
    class_names = None
    remote = True  # a disk may be at the other end, but nothing can be read ahead of it

    def __init__(self, recipe: Recipe) -> None:
        from shards.stream import StreamLoader, expand_sources, resolve_sources, sources_fingerprint

        self._recipe, self._loader = recipe, StreamLoader
        values = list(flatten(recipe.model_dump()))
        values += [("data.stages.until", stage.until) for stage in recipe.data.stages]
        values += [("schedule.milestones", milestone) for milestone in recipe.schedule.milestones]
        if epochs := [f"{key}={value}" for key, value in values if _is_in_epochs(value)]:
            raise ValueError(
                "a stream (data.reader) has no epochs, since nobody knows how many images it holds: give "
                f"{', '.join(epochs)} in steps or images"
            )
        self._urls = expand_sources(recipe.data.shards, allow_pipes=recipe.data.allow_pipes)
        self.fingerprint, self.place = sources_fingerprint(self._urls), resolve_sources(recipe.data.shards)

    def check(self, method: Method) -> None:
        """See `TrainingData.check`: what labels there are shows as they come, and then the method looks at each."""

    def loader(
        self, views: Sequence[View], *, batch_size: int, layout: Layout, world: World, start: int, stop: int
    ) -> Iterable[Batch]:
        """See `TrainingData.loader`."""
        return self._loader(
            self._urls,
            views=views,
            shuffle_window=self._recipe.data.shuffle_window,
            start=start,
            stop=stop,
            **_loader_options(self._recipe, batch_size=batch_size, layout=layout, world=world),
        )

    def notes(self, *, layout: Layout, resumes: bool) -> Iterator[str]:
        """See `TrainingData.notes`: what is promised of indexed shards and not of these."""
        yield (
            f"data: a stream of {len(self._urls)} sources without an index, drawn with replacement: there are no "
            "epochs, and which images come depends on the numbers of ranks and workers"
        )
        if resumes:
            yield "warning: resuming is approximate: a stream is drawn anew, not gone on with where it was left"
        why = "a stream has no index that says where its samples lie"
        yield from _without_effect(self._recipe, "lanes", "cache_dir", "cache_size", why=why)


def check_decoding(recipe: Recipe, device: torch.device) -> None:
    """Refuse `data.decode` gpu on a device that cannot.

    Raises:
        ValueError: says why, and the way out.
    """
    if recipe.data.decode == "gpu" and (why := why_no_gpu_decoding(device)) is not None:
        raise ValueError(
            f"data.decode=gpu, but {why}: it takes an NVIDIA GPU and a torchvision that is built for it (PyTorch's "
            "CUDA wheels are); set data.decode=cpu"
        )


def build_order(recipe: Recipe, index: ShardIndex) -> SampleOrder:
    """The order in which the recipe reads these shards."""
    lanes = recipe.data.lanes
    if lanes == "auto":
        lanes = default_lanes(index.num_samples, batch_sizes(recipe))
    return SampleOrder(index.shard_sizes, seed=recipe.run.seed, lanes=lanes, shuffle_window=recipe.data.shuffle_window)


def _is_in_epochs(value: object) -> bool:
    try:
        return Duration.parse(value).unit == "epochs"
    except ValueError:
        return False


def _loader_options(recipe: Recipe, *, batch_size: int, layout: Layout, world: World) -> dict[str, Any]:
    """What both loaders take."""
    return {
        "seed": recipe.run.seed,
        "global_batch_size": batch_size,
        "micro_batch_size": layout.micro_batch_size,
        "rank": world.rank,
        "world_size": world.size,
        "num_workers": recipe.data.num_workers,
        "max_pixels": recipe.data.max_pixels,
    }


def _without_effect(recipe: Recipe, *keys: str, why: str) -> Iterator[str]:
    """A warning when some of `keys` were set."""
    if found := [f"data.{key}" for key in keys if key in recipe.data.changed_keys()]:
        yield f"warning: {' and '.join(found)} set, without effect: {why}"

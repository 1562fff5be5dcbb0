"""Which samples a run reads at a step, and what they look like: arithmetic on its recipe and its shards' index.

batch = run_batch(Path("runs/dinov2"), step=1200)
batch.rows()                                     # position in the global batch, epoch, sample id, key, source, …
next(batch.views(at_least=8, augmented=True))    # what the method makes of the first of them
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scaler.checkpoint import read_manifest, run_checkpoints
from scaler.collectives import World
from scaler.data import build_order
from scaler.methods.base import Batch, Method, Shown
from scaler.nn.color import Color
from scaler.recipe import Recipe, load_recipe
from scaler.timetable import Stage, Timetable
from scaler.train import build_method
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import GlobalBatch


@dataclass(frozen=True)
class Viewed:
    """The pictures of a micro-batch.

    Attributes:
        raw: what the loader gives.
        views: each copy of each view.
        method: the recipe's, without weights.
    """

    raw: Batch
    views: list[Shown]
    method: Method

    def shown_ids(self) -> list[int]:
        """The sample that each picture is really of: another one where a sample could not be decoded."""
        replaced = {record["id"]: record["replacement_id"] for record in self.raw["rejected"]}
        return [replaced.get(id_, id_) for id_ in self.raw["ids"].tolist()]


@dataclass(frozen=True)
class RunBatch:
    """The global batch of one step of a run."""

    recipe: Recipe
    index: ShardIndex
    step: int  # counted from 1, as in metrics.jsonl
    first_image: int  # images seen before this step
    stage: Stage
    batch: GlobalBatch

    def keys(self) -> list[str]:
        """The samples' keys in the order of the global batch (lane-major)."""
        return self.index.keys(self.batch.ids)

    def rows(self) -> list[dict[str, Any]]:
        """One row per sample, in the order of the global batch."""
        columns = (column.tolist() for column in (self.batch.images, self.batch.epochs, self.batch.ids))
        return [
            {"position": position, "image": image, "epoch": epoch, "id": id_, "key": entry.key, "source": entry.source}
            for position, (image, epoch, id_) in enumerate(zip(*columns, strict=True))
            for entry in [self.index.entry(id_)]
        ]

    def views(self, *, at_least: int, augmented: bool) -> Iterator[Viewed]:
        """The views, micro-batch after micro-batch of `at_least` so many samples where the global batch has as many: as
        the loader's workers cut them, with a replacement where a sample cannot be decoded, or `augmented` by the method
        with colours and masks, as the network gets them at this step.

        Raises:
            ValueError: no part of this batch can be a micro-batch of the method (it holds no whole group).
        """
        recipe, size = self.recipe, self.stage.global_batch_size
        with torch.device("meta"):  # no weight is needed for it, and the largest models have gigabytes of them
            method = build_method(recipe, world=World())
        loader = ShardLoader(
            self.index,
            build_order(recipe, self.index),
            views=method.views_at(self.stage.image_size),
            seed=recipe.run.seed,
            global_batch_size=size,
            micro_batch_size=_micro_batch(method, size, at_least=min(at_least, size)),
            start=self.first_image,
            stop=self.first_image + size,
            max_pixels=recipe.data.max_pixels,
            read_ahead=False,
        )
        for raw in loader:
            if augmented:
                views = method.shown(raw, method.augment(raw, seed=recipe.run.seed, step=self.step - 1))
            else:
                views = [
                    Shown(name, copy, images, Color())
                    for name, copies in raw["views"].items()
                    for copy, images in enumerate(copies)
                ]
            yield Viewed(raw, views, method)


def _micro_batch(method: Method, global_batch_size: int, *, at_least: int) -> int:
    """The smallest micro-batch of so many samples or more that a global batch consists of and the method takes."""
    fitting = [m for m in range(at_least, global_batch_size + 1) if global_batch_size % m == 0]
    for size in fitting:
        try:
            method.check_layout(num_micro_batches=1, micro_batch_size=size)
        except ValueError:
            if size == global_batch_size:
                raise
        else:
            return size
    raise AssertionError("the global batch is a micro-batch of itself")


def run_batch(run_dir: Path, *, step: int) -> RunBatch:
    """The batch of `step` (from 1 on) of the run in `run_dir`.

    Raises:
        ValueError: no run there, a step before the first, or shards that are not those the run was trained on.
    """
    found = recipe_batch(load_run_recipe(run_dir), step=step, what=str(run_dir))
    index = found.index
    for checkpoint in run_checkpoints(run_dir)[:1]:
        fingerprint = read_manifest(checkpoint)["fingerprint"]
        if fingerprint != index.fingerprint:
            raise ValueError(
                f"{index.path} is not what {run_dir} was trained on (fingerprint {index.fingerprint[:12]}, the run has "
                f"{fingerprint[:12]}), so its steps held other samples; give back the shards it was trained on"
            )
    return found


def recipe_batch(recipe: Recipe, *, step: int, what: str, index: ShardIndex | None = None) -> RunBatch:
    """The batch of `step` (from 1 on) of a run of this recipe, which `what` names in errors.

    Args:
        index: the images; None: those of `data.shards`.

    Raises:
        ValueError: a step before the first, a stream, or no shards.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1, as in metrics.jsonl")
    if recipe.data.reader == "stream" and index is None:
        raise ValueError(
            f"{what} reads a stream, whose steps cannot be looked up; index its shards (`scaler index`) and train "
            "with data.reader=indexed for that"
        )
    if index is None:
        index = ShardIndex.load(recipe.data.shards, cache=recipe.data.cache())
    timetable = Timetable(recipe, num_samples=index.num_samples)
    stage, first_image = timetable.stage(step - 1), timetable.images(step - 1)
    batch = build_order(recipe, index).batch(first_image, stage.global_batch_size)
    return RunBatch(recipe, index, step, first_image, stage, batch)


def load_run_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run directory.

    Raises:
        ValueError: there is none.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir} is no run directory: it holds no recipe.yaml")
    return load_recipe(str(path))

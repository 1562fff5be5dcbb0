"""Which samples a run reads at a step: arithmetic on its recipe and its shards' index, no training state needed.

batch = run_batch(Path("runs/dinov2"), step=1200)
batch.rows()                # position in the global batch, image number, epoch, sample id, key, source
contact_sheet(batch)        # its views as the loader's workers cut them
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from scaler.checkpoint import read_manifest, run_checkpoints
from scaler.collectives import World
from scaler.data import build_order
from scaler.recipe import Recipe, load_recipe
from scaler.timetable import Stage, Timetable
from scaler.train import build_method
from shards.index import ShardIndex
from shards.loader import ShardLoader
from shards.order import GlobalBatch

_CELL = 64  # pixels that a view gets at least in a sheet
_GAP = 4


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


def run_batch(run_dir: Path, *, step: int) -> RunBatch:
    """The batch of `step` (from 1 on) of the run in `run_dir`.

    Raises:
        ValueError: no run there, a step before the first, or shards that are not those the run was trained on.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1, as in metrics.jsonl")
    recipe = load_run_recipe(run_dir)
    if recipe.data.reader == "stream":
        raise ValueError(
            f"{run_dir} reads a stream, whose steps cannot be looked up; index its shards (`scaler index`) and train "
            "with data.reader=indexed for that"
        )
    index = ShardIndex.load(recipe.data.shards, cache=recipe.data.cache())
    for checkpoint in run_checkpoints(run_dir)[:1]:
        fingerprint = read_manifest(checkpoint)["fingerprint"]
        if fingerprint != index.fingerprint:
            raise ValueError(
                f"{index.path} is not what {run_dir} was trained on (fingerprint {index.fingerprint[:12]}, the run has "
                f"{fingerprint[:12]}), so its steps held other samples; give back the shards it was trained on"
            )
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


def contact_sheet(run_batch: RunBatch, *, limit: int = 64) -> Image.Image:
    """A picture with one row for each of the batch's first `limit` samples: its key and its views.

    The views are what the loader hands to the training process: geometry only, with a replacement where a sample cannot
    be decoded.
    """
    recipe, size = run_batch.recipe, run_batch.stage.global_batch_size
    loader = ShardLoader(
        run_batch.index,
        build_order(recipe, run_batch.index),
        views=build_method(recipe, world=World()).views_at(run_batch.stage.image_size),
        seed=recipe.run.seed,
        global_batch_size=size,
        micro_batch_size=1,
        start=run_batch.first_image,
        stop=run_batch.first_image + size,
        max_pixels=recipe.data.max_pixels,
        read_ahead=False,
    )
    keys = run_batch.keys()
    pictures = []  # per sample, its views as arrays [size, size, 3]
    for sample in itertools.islice(loader, limit):
        copies = (copy[0] for view in sample["views"].values() for copy in view)
        pictures.append([copy.permute(1, 2, 0).numpy() for copy in copies])
    largest = max(len(view) for view in pictures[0])
    zoom = max(1, -(-_CELL // largest))
    cell = largest * zoom + _GAP
    text = 8 * min(32, max(map(len, keys[: len(pictures)])))
    sheet = Image.new("RGB", (text + cell * len(pictures[0]), cell * len(pictures)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, views in enumerate(pictures):
        printable = keys[row][-32:].encode("latin-1", "replace").decode("latin-1")  # all that the built-in font has
        pen.text((_GAP, row * cell + _GAP), printable, fill="black")
        for column, view in enumerate(views):
            sheet.paste(
                Image.fromarray(np.ascontiguousarray(view)).resize((view.shape[1] * zoom, view.shape[0] * zoom), 0),
                (text + column * cell, row * cell),
            )
    return sheet

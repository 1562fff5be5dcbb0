"""The views that are shown are those that the network gets, and the captions say what was done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaler.batches import RunBatch, recipe_batch
from scaler.collectives import World
from scaler.data import IndexedData
from scaler.layout import batch_layout
from scaler.recipe import Recipe, load_recipe
from scaler.show.pixels import to_pixels
from scaler.show.sheet import PALETTE
from scaler.show.views import augmentation_sheet, contact_sheet, hatched
from scaler.timetable import Timetable
from scaler.train import build_method
from shards.index import ShardIndex
from tests.runs import write_recipe

BATCH, STEP = 24, 3  # three steps are 72 of 30 images, so that the third crosses a border of epochs
BATCH_DATA = {"global_batch_size": BATCH, "image_size": 32, "lanes": 3, "num_workers": 0, "max_bad_fraction": 1.0}
METHODS = {
    "dinov2": {"flip": 0.5, "mask_probability": 0.9, "num_local_crops": 3, "gram_weight": 1.0, "gram_start": "1 steps",
               "gram_size_factor": 2},
    "simclr": {},
    "supervised": {"erase_probability": 0.5, "mix_by": "image", "mix_probability": 0.7},
}  # fmt: skip


def recipe_of(method: str, index: ShardIndex, folder: Path, **data: object) -> Recipe:
    path = write_recipe(
        folder / f"{method}.yaml", method, shards=Path(str(index.path)), data={**BATCH_DATA, **data}, strategy={}
    )
    return load_recipe(str(path), overrides=[f"method.{key}={value}" for key, value in METHODS[method].items()])


def batch_of(recipe: Recipe) -> RunBatch:
    return recipe_batch(recipe, step=STEP, what="it")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_shown_is_what_the_network_gets(method: str, index: ShardIndex, tmp_path: Path) -> None:
    """Against the trainer's own loader and method at the same step, two micro-batches a step there."""
    recipe = recipe_of(method, index, tmp_path)
    trained, data = build_method(recipe, world=World()), IndexedData(recipe)
    timetable = Timetable(recipe, num_samples=data.num_samples)
    layouts = {BATCH: batch_layout(BATCH, micro_batch_size=BATCH // 2, ranks=1)}
    images = timetable.images(STEP - 1)
    batches = data.batches(trained, timetable=timetable, layouts=layouts, world=World(), step=STEP - 1, images=images)
    expected = [
        trained.augment(raw, seed=recipe.run.seed, step=STEP - 1) for raw, _ in zip(batches, "ab", strict=False)
    ]
    (shown,) = batch_of(recipe).views(at_least=BATCH, augmented=True)
    views = {(view.view, view.copy): view for view in shown.views}
    names = {"dinov2": [("global_1", 0), ("global_2", 0)], "simclr": [("view_1", 0), ("view_2", 0)]}
    first = names.get(method, [("image", 0)])
    key = "crops" if method == "dinov2" else "images"
    for number, name in enumerate(first):
        parts = [batch[key][0] if method == "dinov2" else batch[key] for batch in expected]
        assert torch.equal(views[name].images, torch.cat([part.chunk(len(first))[number] for part in parts])), name
    if method == "dinov2":
        for copy in range(3):
            local = torch.cat([batch["crops"][1].chunk(3)[copy] for batch in expected])
            assert torch.equal(views["local", copy].images, local)
        masks = torch.cat([batch["masks"].view(2, -1, 16) for batch in expected], dim=1)
        assert torch.equal(torch.stack([views[name].masks.flatten(1) for name in first]), masks) and masks.any()
        gram = torch.cat([batch["gram"].chunk(2)[1] for batch in expected])
        assert torch.equal(views["gram_2", 0].images, gram) and gram.shape[-1] == 64
    if method == "supervised":
        targets = torch.cat([batch["targets"] for batch in expected])
        largest = [f"{float(row.max()):.2f} of class {int(row.argmax())}" for row in targets]
        assert all(note.startswith(words) for note, words in zip(views["image", 0].notes, largest, strict=True))
        assert any("+" in note for note in views["image", 0].notes)
    uncoloured = next(batch_of(recipe).views(at_least=5, augmented=False))
    assert len(uncoloured.raw["ids"]) >= 5 and uncoloured.views[0].images.dtype == torch.uint8


def test_an_undecodable_sample_is_named_with_what_replaces_it(index: ShardIndex, tmp_path: Path) -> None:
    batch = batch_of(recipe_of("simclr", index, tmp_path))
    viewed = next(batch.views(at_least=BATCH, augmented=True))
    wanted, shown = viewed.raw["ids"].tolist(), viewed.shown_ids()
    replaced = [i for i in range(BATCH) if wanted[i] != shown[i]]
    (record,) = {(r["id"], r["replacement_id"]) for r in viewed.raw["rejected"]}
    assert replaced and all((wanted[i], shown[i]) == record for i in replaced)
    contact_sheet(batch, limit=BATCH)
    augmentation_sheet(batch, limit=BATCH, what="simclr", place="shards")


def test_the_sheet_has_a_framed_picture_for_every_view(index: ShardIndex, tmp_path: Path) -> None:
    """A line through the middle of each row crosses the frames of seven views in five colours; no cell is empty."""
    sheet = augmentation_sheet(batch_of(recipe_of("dinov2", index, tmp_path)), limit=3, what="it", place="here")
    pixels = np.asarray(sheet).astype(int)
    colors = [tuple(bytes.fromhex(color[1:])) for color in PALETTE[:5]]
    first = (pixels == colors[0]).all(axis=-1)
    left = int(np.flatnonzero(first.sum(axis=0) >= 3 * 104)[0])  # left of it are boxes of the same colours
    edge = np.flatnonzero(first[:, left])
    starts = [row for row in edge.tolist() if row - 1 not in edge]
    assert len(starts) == 3 and len(edge) == 3 * 104, "three rows"
    for start in starts:
        line = pixels[start + 20, left:]
        counts = [
            int(np.diff((line == color).all(axis=-1).astype(int), prepend=0).clip(min=0).sum()) for color in colors
        ]
        assert counts == [2, 2, 6, 2, 2]
        assert pixels[start + 6 : start + 90, left:].std(axis=(0, 1)).min() > 10


def test_one_image_is_not_shown_twice_while_there_are_others(index: ShardIndex, tmp_path: Path) -> None:
    """A batch of more than two epochs, whose first rows are the same few images."""
    recipe = recipe_of("simclr", index, tmp_path, global_batch_size=96, lanes=24)
    batch = recipe_batch(recipe, step=1, what="it")
    ids = next(batch.views(at_least=4, augmented=False)).shown_ids()
    assert len(set(ids)) < 4
    seen = []
    for viewed in batch.views(at_least=4, augmented=False):
        seen += viewed.shown_ids()
    assert len(set(seen[:32])) >= 4
    sheet = augmentation_sheet(batch, limit=4, what="it", place="here")
    column = np.asarray(sheet)[:, 20 : 20 + 192].reshape(sheet.height, -1)
    assert sheet.height > 4 * 192 and column.std() > 10


def test_masked_patches_are_hatched_and_others_keep_their_pixels() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, size=(48, 48, 3), dtype=np.uint8)
    mask = generator.random((4, 4)) < 0.4
    out = np.asarray(hatched(Image.fromarray(pixels), mask))
    hidden = mask.repeat(12, axis=0).repeat(12, axis=1)
    assert (out[~hidden] == pixels[~hidden]).all()
    assert set(map(tuple, out[hidden])) == {(110,) * 3, (190,) * 3}


def test_normalisation_is_undone() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert np.array_equal(to_pixels(normalised, normalization=(mean, std)), pixels.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(to_pixels(pixels, normalization=(mean, std)), pixels.permute(0, 2, 3, 1).numpy())
